"""Compare the denoising (DSM) and the stable target (STF): variances, and training on real images.

First the variance of both targets by noise level, for two Gaussians in the plane and for
scikit-learn's digits; then the variance of a network's gradient with either target. Last the same
network is trained with either target on four processes, several seeds each, and evaluated on
held-out digits against training time. It prints tables and saves a picture,
`outputs/stable_target.png`. Runtime: 15 minutes on one CPU core; the second command takes a minute.

    python examples/stable_target.py
    python examples/stable_target.py --seeds 1 --train-steps 100 --processes EDM
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from digits import Digits, Quality, load, pixels
from helpers import argument_parser, mean_and_error, picture_path, positive_int, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from diffusionkit import (
    DDIM,
    EDMSDE,
    EMA,
    VESDE,
    VPSDE,
    DenoisingTarget,
    EDMModel,
    EDMWeighting,
    ForwardSDE,
    GaussianMixtureModel,
    KarrasGrid,
    LogNormalTimes,
    PCSampler,
    ReferenceBatches,
    ScoreMatching,
    ScoreModel,
    StableTarget,
    StratifiedTimes,
    SubVPSDE,
    TimeSampler,
    clipped_step,
)
from diffusionkit.diagnostics import (
    Estimate,
    dsm_variance,
    gradient_variance,
    plot_variances,
    posterior_divergence,
    stf_variance,
)
from diffusionkit.networks import MLP

SIZES = (16, 64, 256)  # reference batch sizes for the variance
BATCH, REFERENCE = 64, 512  # batch and reference batch sizes in training
LEARNING_RATE, EMA_DECAY = 1e-3, 0.998
EVALUATIONS = 4  # evaluations per training run
TARGETS = {"DSM": DenoisingTarget(), "STF": StableTarget()}


class Process(NamedTuple):
    """A process and its distribution of training times."""

    sde: ForwardSDE
    times: TimeSampler


PROCESSES = {
    "VE": Process(VESDE(sigma_min=0.01, sigma_max=20.0), StratifiedTimes()),
    "VP": Process(VPSDE(), StratifiedTimes()),
    "sub-VP": Process(SubVPSDE(t_min=1e-2), StratifiedTimes()),
    "EDM": Process(EDMSDE(), LogNormalTimes()),
}


class Progress(NamedTuple):
    """A training run at one evaluation: time, steps, held-out loss, energy distance."""

    seconds: float
    steps: int
    loss: float
    energy: float


def target_variances(data: Tensor, samples: int, generator: torch.Generator) -> list[Estimate]:
    """Return the target variances of data (n, d), DSM first, then the total variation."""
    sde = EDMSDE(sigma_max=50.0)
    t = torch.logspace(-1, 1.6, 14, dtype=torch.float64)
    found = [dsm_variance(sde, data, t, units="noise", samples=samples, generator=generator)]
    for n in SIZES:
        found.append(
            stf_variance(sde, data, t, n, units="noise", samples=samples, generator=generator)
        )
    found.append(
        posterior_divergence(sde, data, t, kind="tv", samples=samples, generator=generator)
    )
    return found


def endless(data: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches and the reference batches that contain them, epoch after epoch."""
    batches = ReferenceBatches(data, BATCH, min(REFERENCE, len(data)), seed=seed)
    for _ in itertools.count():
        yield from batches


def objective(target: str, process: Process, sigma_data: float) -> ScoreMatching:
    """Return the objective with EDM's weighting and the training times of the process."""
    return ScoreMatching(EDMWeighting(sigma_data), target=TARGETS[target], times=process.times)


def train(
    data: Digits, process: Process, target: str, steps: int, seed: int
) -> Iterator[tuple[float, int, ScoreModel]]:
    """Train a model on images, yielding seconds, steps and averaged models during training."""
    torch.manual_seed(seed)
    images = data.train.flatten(1)
    sigma_data = float(images.std())
    model = EDMModel(MLP(images.shape[1], width=192, depth=4), process.sde, sigma_data=sigma_data)
    loss_of = objective(target, process, sigma_data)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    ema = EMA(model, decay=EMA_DECAY)
    generator = torch.Generator().manual_seed(seed)
    stops = {max(1, steps * k // EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
    seconds, start = 0.0, time.perf_counter()
    for step, (x0, reference) in zip(range(1, steps + 1), endless(images, seed), strict=False):
        loss = loss_of(model, x0, reference=reference, generator=generator).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        ema.update(model)
        if step in stops:
            seconds += time.perf_counter() - start
            averaged = copy.deepcopy(model)
            averaged.load_state_dict(ema.model.state_dict())
            yield seconds, step, averaged
            start = time.perf_counter()


@torch.no_grad()
def held_out_loss(model: ScoreModel, data: Digits, process: Process) -> float:
    """Return the denoising loss of the test digits, with the same times and noise for all."""
    generator = torch.Generator().manual_seed(0)
    loss = objective("DSM", process, float(data.train.std()))
    images = data.test.flatten(1).repeat(10, 1)
    return float(loss(model, images, generator=generator).mean())


def follow(
    data: Digits, quality: Quality, name: str, target: str, seed: int, args: argparse.Namespace
) -> list[Progress]:
    """Train a model and evaluate it during training."""
    found, process = [], PROCESSES[name]
    for seconds, step, model in train(data, process, target, args.train_steps, seed):
        sampler = PCSampler(model, DDIM(eta=0.5), grid=KarrasGrid(), steps=args.steps)
        samples = sampler((args.samples, 64), generator=torch.Generator().manual_seed(seed))
        energy = quality.energy_distance(pixels(samples))
        found.append(Progress(seconds, step, held_out_loss(model, data, process), energy))
    return found


def gradients(data: Digits, steps: int, pairs: int, generator: torch.Generator) -> list[Estimate]:
    """Return the gradient variance of a briefly trained network by noise level."""
    process = PROCESSES["EDM"]
    *_, (_, _, model) = train(data, process, "DSM", steps, seed=0)
    images, state = data.train.flatten(1), generator.get_state()
    sigma_data, t = float(images.std()), torch.logspace(-1, 1.6, 8)
    found = []
    for target in TARGETS:
        generator.set_state(state)  # the same data and noise for both
        found.append(
            gradient_variance(
                model, objective(target, process, sigma_data), images, t, batch_size=BATCH,
                reference_size=REFERENCE, pairs=pairs, label=target, generator=generator,
                progress=partial(tqdm, desc="gradients", leave=False),
            )
        )  # fmt: skip
    return found


def variance_table(found: Sequence[Estimate]) -> str:
    """Return a table of estimates ± standard errors by noise level."""
    lines = [f"{'sigma / alpha':>13}" + "".join(f"{one.label:>22}" for one in found)]
    for k, noise in enumerate(found[0].noise.tolist()):
        cells = (f"{float(one.value[k]):.3g} ± {float(one.stderr[k]):.1g}" for one in found)
        lines.append(f"{noise:>13.2f}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def training_row(process: str, target: str, runs: Sequence[Sequence[Progress]]) -> str:
    """Return the row of the table for the runs of all seeds."""
    last = [run[-1] for run in runs]
    cells = [
        mean_and_error([1000 * run.seconds / run.steps for run in last], ".1f"),
        mean_and_error([run.loss for run in last], ".4f"),
        mean_and_error([run.energy for run in last], ".4f"),
    ]
    return f"{process:<8}{target:<6}" + "".join(f"{cell:>22}" for cell in cells)


def show_runs(ax: Axes, runs: dict[str, list[list[Progress]]], measure: str) -> None:
    """Plot a measure over training time: the mean of the seeds, and each seed as a point."""
    for color, (target, seeds) in zip(("C0", "C1"), runs.items(), strict=True):
        # (seeds, evaluations, 2)
        points = torch.tensor([[(p.seconds, getattr(p, measure)) for p in run] for run in seeds])
        seconds, values = points.unbind(2)
        ax.plot(seconds.mean(0), values.mean(0), color=color, label=target)
        ax.plot(seconds.flatten(), values.flatten(), ".", color=color, alpha=0.5)
    ax.set(yscale="log", xlabel="training time (s)")


def draw_figure(
    variances: dict[str, list[Estimate]],
    gradient: list[Estimate],
    runs: dict[str, dict[str, list[list[Progress]]]],
) -> Figure:
    """Plot variances above, then held-out loss and energy distance against training time."""
    figure = Figure(figsize=(16, 11), layout="constrained")
    axes = figure.subplots(3, 4, squeeze=False)
    for ax, (name, found) in zip(axes[0], variances.items(), strict=False):
        plot_variances(found[:-1], ax).set(title=f"target, {name}", ylim=(1e-4, 10))
        axes[0, 2].errorbar(found[-1].noise, found[-1].value, 2 * found[-1].stderr, label=name)
    axes[0, 2].set(xscale="log", xlabel="sigma / alpha", title="posterior against data")
    axes[0, 2].set_ylabel("total variation")
    axes[0, 2].legend()
    plot_variances(gradient, axes[0, 3]).set_title("gradient, digits")
    for column in axes[1:].T[len(runs) :]:
        for ax in column:
            ax.set_axis_off()
    for column, (name, both) in zip(axes[1:].T, runs.items(), strict=False):
        for ax, measure in zip(column, ("loss", "energy"), strict=True):
            show_runs(ax, both, measure)
        column[0].set_title(name)
    axes[1, 0].set_ylabel("held-out denoising loss")
    axes[2, 0].set_ylabel("energy distance to test digits")
    axes[1, 0].legend()
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--processes", nargs="+", choices=PROCESSES, default=[*PROCESSES], help="the processes")
    add("--seeds", type=positive_int, default=3, help="seeds per process and target")
    add("--train-steps", type=positive_int, default=3000, help="training steps of a run")
    add("--samples", type=positive_int, default=360, help="samples per evaluation")
    add("--steps", type=positive_int, default=32, help="sampler steps")
    add("--states", type=positive_int, default=2000, help="noisy states per variance")
    add("--pairs", type=positive_int, default=32, help="pairs of gradients, at least 2")
    add(
        "--output",
        type=picture_path,
        default="outputs/stable_target.png",
        help="path of the figure",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure variances, train with both targets, and save the picture."""
    args = options(argv)
    generator = torch.Generator().manual_seed(0)
    data = load()
    quality = Quality(data)
    mixture = GaussianMixtureModel(EDMSDE(), means=[[2.0, 0.0], [-2.0, 0.0]], stds=[0.5, 0.5])
    sets = {
        "two Gaussians": mixture.sample(4000, generator=generator),
        "digits": data.train.flatten(1),
    }
    variances = {}
    for name, points in sets.items():
        variances[name] = target_variances(points, args.states, generator)
        print(f"{name}: variance of the noise target, and total variation\n")
        print(variance_table(variances[name]), "\n", flush=True)
    gradient = gradients(data, max(1, args.train_steps // 10), args.pairs, generator)
    print(f"digits: gradient variance, batch size {BATCH}, {REFERENCE} references\n")
    print(variance_table(gradient), "\n")

    heads = ("ms per step", "held-out loss", "energy distance")
    print(f"{'process':<8}{'':<6}" + "".join(f"{head:>22}" for head in heads), flush=True)
    runs: dict[str, dict[str, list[list[Progress]]]] = {}
    for name in args.processes:
        # Targets alternate within a seed, so that the load of the machine affects both alike.
        runs[name] = {target: [] for target in TARGETS}
        for seed, target in tqdm(
            list(itertools.product(range(args.seeds), TARGETS)), desc=name, leave=False
        ):
            run = follow(data, quality, name, target, seed, args)
            runs[name][target].append(run)
        for target, seeds in runs[name].items():
            print(training_row(name, target, seeds), flush=True)
    real = quality.attainable_energy_distance(args.samples)
    print(f"\nenergy distance of {args.samples} real digits: {real:.4f}")
    save(draw_figure(variances, gradient, runs), args.output)
    print(f"picture {args.output}")


if __name__ == "__main__":
    main()
