"""Where stable targets help: variances of targets and gradients, and training on real images.

First, the variance of the denoising and of the stable target by noise level: two Gaussians in the
plane, and the digits of scikit-learn. Then the variance of a network's gradient with both. Last,
the same network is trained with both for four processes, several seeds each, and the digits held
out tell how good it is after how much time. That takes about a quarter of an hour on one CPU core.
It prints tables and leaves one picture, `outputs/stable_target.png`; a look at it takes a minute:

    python examples/stable_target.py
    python examples/stable_target.py --seeds 1 --train-steps 100 --processes EDM
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from digits import Digits, Quality, load, pixels
from helpers import count, picture_path, save
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

SIZES = (16, 64, 256)  # of the reference batches whose variance is shown
BATCH, REFERENCE = 64, 512  # of training
LEARNING_RATE, EMA_DECAY = 1e-3, 0.998
EVALUATIONS = 4  # of each training
TARGETS = {"DSM": DenoisingTarget(), "STF": StableTarget()}


class Process(NamedTuple):
    """A process, and the law of the times it is trained at."""

    sde: ForwardSDE
    times: TimeSampler


PROCESSES = {
    "VE": Process(VESDE(sigma_min=0.01, sigma_max=20.0), StratifiedTimes()),
    "VP": Process(VPSDE(), StratifiedTimes()),
    "sub-VP": Process(SubVPSDE(t_min=1e-2), StratifiedTimes()),
    "EDM": Process(EDMSDE(), LogNormalTimes()),
}


class Progress(NamedTuple):
    """How far a training is: seconds, steps, the loss held out, the samples' energy distance."""

    seconds: float
    steps: int
    loss: float
    energy: float


def spread_out(data: Tensor, samples: int, generator: torch.Generator) -> list[Estimate]:
    """Return the variances of the targets of data (n, d), DSM first, and the phases they have."""
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
    """Yield batches and the references they are inside of, epoch after epoch."""
    batches = ReferenceBatches(data, BATCH, min(REFERENCE, len(data)), seed=seed)
    for _ in itertools.count():
        yield from batches


def objective(target: str, process: Process, spread: float) -> ScoreMatching:
    """Return EDM's weighting, in which all noise levels count alike, at the process's times."""
    return ScoreMatching(EDMWeighting(spread), target=TARGETS[target], times=process.times)


def train(
    data: Digits, process: Process, target: str, steps: int, seed: int
) -> Iterator[tuple[float, int, ScoreModel]]:
    """Train a model on images, and yield seconds, steps and its average several times."""
    torch.manual_seed(seed)
    images = data.train.flatten(1)
    spread = float(images.std())
    model = EDMModel(MLP(images.shape[1], width=192, depth=4), process.sde, sigma_data=spread)
    loss_of = objective(target, process, spread)
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
    """Return the denoising loss of the digits for testing, at the same times and noise for all."""
    generator = torch.Generator().manual_seed(0)
    loss = objective("DSM", process, float(data.train.std()))
    images = data.test.flatten(1).repeat(10, 1)
    return float(loss(model, images, generator=generator).mean())


def follow(
    data: Digits, quality: Quality, name: str, target: str, seed: int, args: argparse.Namespace
) -> list[Progress]:
    """Train a model and measure it on the way."""
    found, process = [], PROCESSES[name]
    for seconds, step, model in train(data, process, target, args.train_steps, seed):
        sampler = PCSampler(model, DDIM(eta=0.5), grid=KarrasGrid(), steps=args.steps)
        samples = sampler((args.samples, 64), generator=torch.Generator().manual_seed(seed))
        energy = quality.energy_distance(pixels(samples))
        found.append(Progress(seconds, step, held_out_loss(model, data, process), energy))
    return found


def gradients(data: Digits, steps: int, pairs: int, generator: torch.Generator) -> list[Estimate]:
    """Return the variance of the gradient by noise level, for a briefly trained network."""
    process = PROCESSES["EDM"]
    *_, (_, _, model) = train(data, process, "DSM", steps, seed=0)
    images, state = data.train.flatten(1), generator.get_state()
    spread, t = float(images.std()), torch.logspace(-1, 1.6, 8)
    found = []
    for target in TARGETS:
        generator.set_state(state)  # the same data and noise for both
        found.append(
            gradient_variance(
                model, objective(target, process, spread), images, t, batch_size=BATCH,
                reference_size=REFERENCE, pairs=pairs, label=target, generator=generator,
                progress=lambda items: tqdm(items, desc="gradients", leave=False),
            )
        )  # fmt: skip
    return found


def variance_table(found: Sequence[Estimate]) -> str:
    """Return estimates by noise level: value and standard error."""
    lines = [f"{'sigma / alpha':>13}" + "".join(f"{one.label:>22}" for one in found)]
    for k, noise in enumerate(found[0].noise.tolist()):
        cells = (f"{float(one.value[k]):.3g} +- {float(one.stderr[k]):.1g}" for one in found)
        lines.append(f"{noise:>13.2f}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Return the mean over seeds and its standard error, of two seeds or more."""
    y = torch.tensor(values, dtype=torch.float64)
    error = f" +- {float(y.std()) / len(y) ** 0.5:.{digits}f}" if len(y) > 1 else ""
    return f"{float(y.mean()):.{digits}f}{error}"


def training_row(process: str, target: str, runs: Sequence[Sequence[Progress]]) -> str:
    """Return what the runs of all seeds came to."""
    last = [run[-1] for run in runs]
    cells = [
        mean_and_error([1000 * run.seconds / run.steps for run in last], 1),
        mean_and_error([run.loss for run in last], 4),
        mean_and_error([run.energy for run in last], 4),
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
    ax.set(yscale="log", xlabel="seconds of training")


def draw_figure(
    variances: dict[str, list[Estimate]],
    gradient: list[Estimate],
    runs: dict[str, dict[str, list[list[Progress]]]],
) -> Figure:
    """Return the picture: variances above, then the loss held out and the samples' distance."""
    figure = Figure(figsize=(16, 11), layout="constrained")
    axes = figure.subplots(3, 4, squeeze=False)
    for ax, (name, found) in zip(axes[0], variances.items(), strict=False):
        plot_variances(found[:-1], ax).set(title=f"target, {name}", ylim=(1e-4, 10))
        axes[0, 2].errorbar(found[-1].noise, found[-1].value, 2 * found[-1].stderr, label=name)
    axes[0, 2].set(xscale="log", xlabel="sigma / alpha", title="posterior and data")
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
    axes[1, 0].set_ylabel("denoising loss, held out")
    axes[2, 0].set_ylabel("energy distance, held out")
    axes[1, 0].legend()
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--processes", nargs="+", choices=list(PROCESSES), default=list(PROCESSES), help="(all)")
    add("--seeds", type=positive_int, default=3, help="how many trainings of each kind (%(default)s)")
    add("--train-steps", type=positive_int, default=3000, help="of each training (%(default)s)")
    add("--samples", type=positive_int, default=360, help="of each evaluation (%(default)s)")
    add("--steps", type=positive_int, default=32, help="sampler steps (%(default)s)")
    add("--states", type=positive_int, default=2000, help="noisy ones, of each variance (%(default)s)")
    add("--pairs", type=positive_int, default=32, help="of gradients, at least 2 (%(default)s)")
    add("--output", type=picture_path, default="outputs/stable_target.png", help="the picture (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure variances, train with both targets, and leave a picture."""
    args = options(argv)
    generator = torch.Generator().manual_seed(0)
    data = load()
    quality = Quality(data)
    law = GaussianMixtureModel(EDMSDE(), means=[[2.0, 0.0], [-2.0, 0.0]], stds=[0.5, 0.5])
    sets = {
        "two Gaussians": law.sample(4000, generator=generator),
        "digits": data.train.flatten(1),
    }
    variances = {}
    for name, points in sets.items():
        variances[name] = spread_out(points, args.states, generator)
        print(f"{name}: variance of the noise as a target, and total variation\n")
        print(variance_table(variances[name]), "\n", flush=True)
    gradient = gradients(data, max(1, args.train_steps // 10), args.pairs, generator)
    print(f"digits: variance of the gradient, batches of {BATCH}, {REFERENCE} references\n")
    print(variance_table(gradient), "\n")

    heads = ("ms per step", "loss held out", "energy distance")
    print(f"{'process':<8}{'':<6}" + "".join(f"{head:>22}" for head in heads), flush=True)
    runs: dict[str, dict[str, list[list[Progress]]]] = {}
    for name in args.processes:
        # One seed after the other, and within it both targets, so that both meet the same machine.
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
