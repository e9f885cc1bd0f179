"""Compose your own: a short training loop on real images, and every sampler in two dimensions.

    python examples/compose.py
    python examples/compose.py --sde ve --model edm --weighting edm --predictor ancestral

`learn_digits` selects the process, parameterization, weighting, time distribution, predictor and
corrector by name; all combinations work. The second part trains on two-dimensional data:
`outputs/compose.png` shows the learned score at several times, and the trajectories of every
sampler from the same noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from digits import Quality, load, pixels
from helpers import argument_parser, picture_path, positive_int, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    Corrector,
    DenoisingTarget,
    EDMModel,
    EDMWeighting,
    EpsModel,
    EulerMaruyama,
    ForwardSDE,
    Langevin,
    LikelihoodWeighting,
    LogNormalTimes,
    MinSNRWeighting,
    PCSampler,
    Predictor,
    ProbabilityFlow,
    ReverseDiffusion,
    ScoreMatching,
    ScoreModel,
    SimpleWeighting,
    StratifiedTimes,
    SubVPSDE,
    TimeLabel,
    TimeSampler,
    UniformTimes,
    VModel,
    Weighting,
    X0Model,
    clipped_step,
)
from diffusionkit.networks import MLP, DDPMpp

SDES: dict[str, ForwardSDE] = {
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(sigma_max=10.0),
    "edm": EDMSDE(),
}
MODELS: dict[str, Callable[..., ScoreModel]] = {
    "eps": EpsModel,
    "x0": X0Model,
    "v": VModel,
    "edm": EDMModel,
}
WEIGHTINGS: dict[str, Weighting] = {
    "simple": SimpleWeighting(),
    "likelihood": LikelihoodWeighting(),
    "edm": EDMWeighting(),
    "min-snr": MinSNRWeighting(),
}
TIMES: dict[str, TimeSampler] = {
    "uniform": UniformTimes(),
    "stratified": StratifiedTimes(),
    "log-normal": LogNormalTimes(),
}
PREDICTORS: dict[str, Predictor | None] = {
    "reverse-diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "euler-maruyama": EulerMaruyama(),
    "ddim": DDIM(),
    "none": None,
}
CORRECTORS: dict[str, Corrector | None] = {
    "langevin": Langevin(snr=0.16),
    "annealed-langevin": AnnealedLangevin(snr=0.16),
    "none": None,
}

TOY_CORRECTOR = Langevin(snr=0.16)
TOY_BATCH, TOY_POINTS = 256, 1000
TOY_STARTS = ((-1.8, 1.6), (2.1, 0.9), (0.3, -2.3))  # initial points of the trajectories shown
COLORS = ("tab:orange", "tab:green", "tab:red")
FIELD_TIMES = (0.9, 0.5, 0.3, 0.15, 0.06, 0.01)
TOY_SAMPLERS: dict[str, tuple[Predictor, Corrector | None]] = {
    "Euler-Maruyama": (EulerMaruyama(), None),
    "reverse diffusion": (ReverseDiffusion(), None),
    "ancestral": (Ancestral(), None),
    "DDIM": (DDIM(), None),
    "PC with Langevin": (ReverseDiffusion(), TOY_CORRECTOR),
}


class Result(NamedTuple):
    """Samples of a sampler and a few of its trajectories.

    Args:
        trajectories: the states of the first points (times, points, 2).
        samples: the final states of all points (n, 2).
        nfe: the number of network evaluations.
    """

    trajectories: Tensor
    samples: Tensor
    nfe: int


def learn_digits(args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Train a model on real images and sample it, with the selected components."""
    data = load().train
    sde = SDES[args.sde]
    network = DDPMpp(channels=1, width=16, multipliers=(1, 2), blocks=1, attention_levels=())
    model = MODELS[args.model](network, sde, label=TimeLabel())
    objective = ScoreMatching(
        WEIGHTINGS[args.weighting], target=DenoisingTarget(), times=TIMES[args.times]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(args.train_steps):
        batch = data[torch.randint(len(data), (64,), generator=generator)]
        loss = objective(model, batch, generator=generator).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        if step % 100 == 0:
            print(f"step {step:5}   loss {loss.item():.4f}")
    predictor, corrector = PREDICTORS[args.predictor], CORRECTORS[args.corrector]
    sampler = PCSampler(model, predictor, corrector, steps=args.steps)
    samples = sampler((64, 1, 8, 8), generator=generator)
    print(f"sampled {tuple(samples.shape)} in {sampler.nfe} network evaluations")
    return samples


def learn_moons(steps: int, generator: torch.Generator) -> tuple[ScoreModel, Tensor]:
    """Train a model on two half-moons; return it with its training points."""
    points = torch.tensor(make_moons(20_000, noise=0.05, random_state=0)[0], dtype=torch.float32)
    points = (points - points.mean(0)) / points.std(0)
    model = EpsModel(MLP(2), VPSDE())
    objective = ScoreMatching(times=StratifiedTimes())
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        batch = points[torch.randint(len(points), (TOY_BATCH,), generator=generator)]
        loss = objective(model, batch, generator=generator).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        schedule.step()
    return model, points


def run_samplers(model: ScoreModel, noise: Tensor, steps: int) -> dict[str, Result]:
    """Run every sampler from the same noise (n, 2)."""
    results: dict[str, Result] = {}
    for name, (predictor, corrector) in TOY_SAMPLERS.items():
        sampler = PCSampler(model, predictor, corrector, steps=steps)
        states = list(sampler.iterate(noise, generator=torch.Generator().manual_seed(0)))
        trajectories = torch.stack([state.x[: len(TOY_STARTS)] for state in states])
        results[name] = Result(trajectories, states[-1].x, sampler.nfe)
    return {**results, "probability flow": run_flow(model, noise)}


def run_flow(model: ScoreModel, noise: Tensor) -> Result:
    """Solve the probability flow from noise (n, 2).

    It is deterministic, so its state at a time is the result of a flow that ends at that time.
    """
    sde, starts = model.sde, noise[: len(TOY_STARTS)]
    flow = ProbabilityFlow(model, rtol=1e-3, atol=1e-3)
    samples = flow.sample(noise)
    between = [
        ProbabilityFlow(model, rtol=1e-3, atol=1e-3, t_end=t, denoise=False).sample(starts)
        for t in np.linspace(sde.T, sde.t_min, 16)[1:-1].tolist()
    ]
    trajectories = torch.stack([starts, *between, samples[: len(TOY_STARTS)]])
    return Result(trajectories, samples, flow.nfe)


def show_field(ax: Axes, model: ScoreModel, points: Tensor, t: float) -> None:
    """Plot the score at time t over the data perturbed to t."""
    noisy = model.sde.perturb(points[:1500], torch.full((1500,), t)).x
    ax.plot(*noisy.T.numpy(), ".", markersize=2, color="tab:blue", alpha=0.25)
    axis = torch.linspace(-2.6, 2.6, 17)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        score = model(x, torch.full((len(x),), t))
    # Scores span decades: arrow lengths are logarithmic.
    length = torch.linalg.vector_norm(score, dim=1, keepdim=True)
    arrows = score / length * torch.log1p(length)
    ax.quiver(*x.T.numpy(), *arrows.T.numpy(), color="0.15", width=0.005, pivot="mid")
    ax.set_title(f"score at t = {t:g}")


def show_result(ax: Axes, name: str, result: Result) -> None:
    """Plot the samples and the trajectories of a sampler."""
    ax.plot(*result.samples.T.numpy(), ".", markersize=2, color="tab:blue", alpha=0.4)
    for path, color in zip(result.trajectories.transpose(0, 1).numpy(), COLORS, strict=True):
        ax.plot(*path.T, color=color, linewidth=0.6, alpha=0.8)
        ax.plot(*path[0], "o", markersize=6, color=color, markerfacecolor="white", zorder=3)
        ax.plot(*path[-1], "o", markersize=6, color=color, markeredgecolor="white", zorder=3)
    ax.set_title(f"{name}\n{result.nfe} evaluations")


def draw_figure(model: ScoreModel, points: Tensor, results: dict[str, Result]) -> Figure:
    """Plot score fields above and samplers below."""
    figure = Figure(figsize=(15, 5.8), layout="constrained")
    axes = figure.subplots(2, 6)
    for ax, t in zip(axes[0], FIELD_TIMES, strict=True):
        show_field(ax, model, points, t)
    for ax, (name, result) in zip(axes[1], results.items(), strict=True):
        show_result(ax, name, result)
    for ax in axes.flat:
        ax.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), xticks=[], yticks=[], aspect="equal")
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    for name, table in (
        ("--sde", SDES),
        ("--model", MODELS),
        ("--weighting", WEIGHTINGS),
        ("--times", TIMES),
        ("--predictor", PREDICTORS),
        ("--corrector", CORRECTORS),
    ):
        choices = list(table)
        parser.add_argument(name, choices=choices, default=choices[0], help=f"the {name[2:]}")
    add = parser.add_argument
    add("--train-steps", type=positive_int, default=400, help="training steps on images")
    add("--toy-steps", type=positive_int, default=3000, help="training steps on half-moons")
    add("--steps", type=positive_int, default=100, help="sampler steps")
    add("--seed", type=int, default=0, help="the random seed")
    add("--output", type=picture_path, default="outputs/compose.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.predictor == args.corrector == "none":
        parser.error("--predictor, --corrector: expected at least one, got none for both")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run both parts and save the picture."""
    args = options(argv)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    samples = learn_digits(args, generator)
    quality, images = Quality(load()), pixels(samples)
    attainable = quality.attainable_energy_distance(len(images))
    print(f"energy distance to the test digits {quality.energy_distance(images):.3f}, "
          f"real digits {attainable:.3f}")  # fmt: skip

    model, points = learn_moons(args.toy_steps, generator)
    noise = model.sde.prior_sample((TOY_POINTS, 2), generator=generator)
    noise[: len(TOY_STARTS)] = torch.tensor(TOY_STARTS)
    save(draw_figure(model, points, run_samplers(model, noise, args.steps)), args.output)
    print(f"picture {args.output}")


if __name__ == "__main__":
    main()
