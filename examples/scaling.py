"""Fit scaling laws of likelihood and sample quality in training compute.

The data are gray patches of two photographs, with 256 levels. A network of several widths is
trained with the objective of improved DDPM, several seeds each, and evaluated during training on
held-out patches. Compute is the FLOPs of the forward and backward passes. The power law

    L(C) = floor + (C0 / C)^exponent

is fitted to the lowest loss of any width at compute C, with 95% bootstrap intervals over seeds. It
prints tables and saves a picture, `outputs/scaling.png`. Runtime: 20 minutes on one CPU core; the
second command takes a minute.

    python examples/scaling.py
    python examples/scaling.py --seeds 2 --train-steps 200 --widths 48 96 192
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from bits_per_dim import Images, patches
from helpers import (
    argument_parser,
    energy_distance,
    mean_and_error,
    picture_path,
    positive_int,
    save,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusionkit import (
    EMA,
    Ancestral,
    ChainNELBO,
    Clip,
    DDPMChain,
    DenoisedModel,
    DiscreteTimes,
    EpsModel,
    GaussianDecoder,
    HybridLoss,
    PCSampler,
    ScoreMatching,
    clipped_step,
    evaluate_bits_per_dim,
)
from diffusionkit.networks import MLP

CHAIN = DDPMChain.cosine(250)
SAMPLER_STEPS = "50"
BATCH, LEARNING_RATE, EMA_DECAY = 128, 0.05, 0.998  # the rate is divided by sqrt(width)
EVALUATIONS, FIRST = 6, 32  # evaluations per training; the first after 1/32 of the steps
TESTED = 250  # images for bits per dimension
MEASURES = {  # fields of a Measurement
    "loss": "held-out noise error",
    "bits": "held-out bits/dim",
    "energy": "energy distance",
}
EXPONENTS = np.geomspace(0.01, 4.0, 300)  # the candidates of a fit
RESAMPLES = 400
GRID, START = 60, 10  # points of the frontier, and the first point of a fit

Floats = NDArray[np.float64]


class Measurement(NamedTuple):
    """The results of a model after training with a given compute (FLOPs)."""

    compute: float
    loss: float
    bits: float
    energy: float


class Runs(NamedTuple):
    """A width: its parameters, FLOPs per step, and measurements for each seed."""

    parameters: int
    flops: int
    seeds: list[list[Measurement]]


class PowerLaw(NamedTuple):
    """The power law L(C) = floor + (scale / C)^exponent."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, compute: Floats) -> Floats:
        """Return L at compute C."""
        return self.floor + (self.scale / compute) ** self.exponent


def build(images: Images, width: int) -> EpsModel:
    """Return a model of images (n, d) with a learned variance."""
    d = images.train.shape[1]
    network = MLP(d, out_features=2 * d, width=width, depth=4)
    return EpsModel(network, CHAIN, variance="learned_range", data_range=(-1.0, 1.0))


def objective(images: Images) -> HybridLoss:
    """Return the training objective."""
    return HybridLoss(decoder=GaussianDecoder(images.levels))


def flops_per_step(images: Images, width: int) -> int:
    """Count the matrix-product FLOPs of a step's forward and backward pass."""
    loss_of = objective(images)
    x0 = loss_of.decoder.encode(images.train[:BATCH])
    with FlopCounterMode(display=False) as counter:
        loss_of(build(images, width), x0).mean().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def train(images: Images, width: int, steps: int, seed: int) -> Iterator[tuple[int, EpsModel]]:
    """Train a width, yielding steps and averaged models during training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, loss_of = build(images, width), objective(images)
    data = loss_of.decoder.encode(images.train)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE / width**0.5)
    ema = EMA(model, decay=EMA_DECAY)
    stops = {round(x) for x in np.geomspace(steps / FIRST, steps, EVALUATIONS)}
    for step in range(1, steps + 1):
        rows = torch.randint(len(data), (BATCH,), generator=generator)
        loss_of(model, data[rows], generator=generator).mean().backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        ema.update(model)
        if step in stops:
            averaged = copy.deepcopy(model)
            averaged.load_state_dict(ema.model.state_dict())
            yield step, averaged


@torch.no_grad()
def measure(images: Images, model: EpsModel, compute: float, n: int, seed: int) -> Measurement:
    """Evaluate a model on the test images, with the same times and noise for all models."""
    decoder = GaussianDecoder(images.levels)
    real = decoder.encode(images.test)
    generator = torch.Generator().manual_seed(0)
    loss = ScoreMatching(times=DiscreteTimes())(model, real.repeat(20, 1), generator=generator)
    bits = evaluate_bits_per_dim(
        ChainNELBO(model, decoder), images.test[:TESTED], batch_size=TESTED, progress=False
    )
    clipped = DenoisedModel(model, Clip())
    sampler = PCSampler(clipped, Ancestral(variance="model"), grid=CHAIN.respaced(SAMPLER_STEPS))
    generator = torch.Generator().manual_seed(seed)
    samples = sampler((n, images.test.shape[1]), generator=generator)
    energy = energy_distance(samples, real)
    return Measurement(compute, float(loss.mean()), bits.mean, energy)


def study(images: Images, args: argparse.Namespace) -> dict[int, Runs]:
    """Train and evaluate every width with every seed.

    Narrow networks take more steps, by the square root of the ratio of FLOPs per step: otherwise
    their curves would end early and leave a gap in the frontier.
    """
    found = {}
    for width in args.widths:
        parameters = sum(p.numel() for p in build(images, width).parameters())
        found[width] = Runs(parameters, flops_per_step(images, width), [])
    most = max(runs.flops for runs in found.values())
    pairs = list(itertools.product(range(args.seeds), args.widths))
    for seed, width in tqdm(pairs, desc="training runs", leave=False):
        runs = found[width]
        steps = round(args.train_steps * (most / runs.flops) ** 0.5)
        trained = train(images, width, steps, seed)
        runs.seeds.append(
            [measure(images, m, float(runs.flops * k), args.samples, seed) for k, m in trained]
        )
    return found


def curves(study: dict[int, Runs], measure: str) -> tuple[Floats, Floats]:
    """Return compute (widths, k) and a measure (widths, seeds, k)."""
    compute = [[m.compute for m in runs.seeds[0]] for runs in study.values()]
    values = [[[getattr(m, measure) for m in run] for run in w.seeds] for w in study.values()]
    return np.array(compute), np.array(values)


def frontier(compute: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return compute and the lower envelope of curves (widths, k) up to it, both (GRID,).

    Curves are interpolated linearly in log-log coordinates.
    """
    x = np.geomspace(compute.min(), compute.max(), GRID)
    lines = [
        np.interp(np.log(x), np.log(c), np.log(v), left=np.inf, right=np.inf)
        for c, v in zip(compute, values, strict=True)
    ]
    return x, np.exp(np.minimum.accumulate(np.min(lines, axis=0)))


def fit(compute: Floats, values: Floats) -> PowerLaw:
    """Fit a power law with nonnegative floor by least squares of the relative error.

    For each candidate exponent, floor and factor solve a linear least-squares problem.
    """
    size = np.sqrt(compute[0] * compute[-1])  # keeps powers near 1
    powers = (compute / size) ** -EXPONENTS[:, None]
    one, power = np.broadcast_to(1 / values, powers.shape), powers / values
    a, b, c = (one**2).sum(1), (one * power).sum(1), (power**2).sum(1)
    p, q = one.sum(1), power.sum(1)
    floor = np.maximum((c * p - b * q) / (a * c - b**2), 0.0)
    factor = np.maximum((q - b * floor) / c, 0.0)
    error = ((floor[:, None] * one + factor[:, None] * power - 1) ** 2).sum(1)
    best = int(error.argmin())
    exponent = float(EXPONENTS[best])
    return PowerLaw(float(floor[best]), float(size * factor[best] ** (1 / exponent)), exponent)


def fit_frontier(compute: Floats, values: Floats, start: int = START) -> PowerLaw:
    """Fit a power law to the frontier of curves (widths, k) from a point on."""
    x, y = frontier(compute, values)
    return fit(x[start:], y[start:])


def refits(compute: Floats, values: Floats, rng: np.random.Generator) -> list[PowerLaw]:
    """Return power laws fitted to resampled seeds (bootstrap), from resampled starting points.

    The compute from which the law holds is unknown: fits start anywhere in the lowest third of the
    log compute.
    """
    widths, seeds, _ = values.shape
    center = values.mean(1)
    found = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(seeds, size=(widths, seeds))
        mean = np.take_along_axis(values, chosen[:, :, None], 1).mean(1)
        # The variance of a bootstrap mean of n seeds is too small by (n - 1) / n.
        mean = center * (mean / center) ** np.sqrt(seeds / (seeds - 1))
        found.append(fit_frontier(compute, mean, int(rng.integers(2 * START))))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the central 95% interval."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def verdict(exponents: tuple[float, float]) -> str:
    """State whether an interval determines the exponent."""
    low, high = exponents
    if low <= EXPONENTS[0] or high >= EXPONENTS[-1]:
        return "not determined: the interval is unbounded"
    if high > 2 * low:
        return f"not determined: the interval spans a factor of {high / low:.1f}"
    return "determined within a factor of two"


def final_table(study: dict[int, Runs]) -> str:
    """Return a table of the final measurements of every width."""
    heads = ("width", "parameters", "GFLOP/step", *MEASURES.values())
    lines = ["".join(f"{head:>22}" for head in heads)]
    for width, runs in study.items():
        last = np.array([run[-1] for run in runs.seeds])[:, 1:].T
        cells = [str(width), f"{runs.parameters:,}", f"{runs.flops / 1e9:.4f}"]
        cells += [mean_and_error(x, ".4f") for x in last]
        lines.append("".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def law_row(name: str, law: PowerLaw, others: Sequence[PowerLaw]) -> str:
    """Return the row of a fitted power law with its intervals."""
    row = f"{name:<22}"
    if not others:
        return row + f"{law.floor:>10.4f}{law.exponent:>10.3f}   one seed: no intervals"
    floors, exponents = (
        interval([getattr(other, part) for other in others]) for part in ("floor", "exponent")
    )
    for value, (low, high), digits in ((law.floor, floors, 4), (law.exponent, exponents, 3)):
        row += f"{value:>10.{digits}f}{f'[{low:.{digits}f}, {high:.{digits}f}]':>20}"
    return row + "   " + verdict(exponents)


def show(
    ax: Axes, study: dict[int, Runs], compute: Floats, values: Floats, laws: list[PowerLaw]
) -> None:
    """Plot the mean and seeds of every width, the frontier, and its power law with intervals."""
    for k, (width, c, v) in enumerate(zip(study, compute, values, strict=True)):
        color = f"C{k}"
        ax.plot(c, v.mean(0), color=color, label=f"width {width}")
        ax.plot(np.tile(c, len(v)), v.flatten(), ".", color=color, alpha=0.4, markersize=4)
    x, y = frontier(compute, values.mean(1))
    ax.plot(x, y, color="black", linewidth=3, alpha=0.25, label="frontier")
    ahead = np.geomspace(x[0], 10 * x[-1], 200)
    law, *others = laws
    ax.plot(ahead, law(ahead), "k--", label=f"floor {law.floor:.3g}, exponent {law.exponent:.2f}")
    if others:
        band = np.quantile([other(ahead) for other in others], [0.025, 0.975], axis=0)
        ax.fill_between(ahead, *band, color="black", alpha=0.1, linewidth=0)
    ax.set(xscale="log", yscale="log", xlabel="training compute (FLOP)")
    ax.set_ylim(0.95 * min(values.min(), law(ahead).min()), 1.05 * values.max())
    ax.legend(frameon=False, fontsize="small")


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    widths = [48, 64, 96, 128, 192, 256]
    add("--widths", nargs="+", type=positive_int, default=widths, help="network widths")
    add("--seeds", type=positive_int, default=3, help="seeds per width")
    add("--train-steps", type=positive_int, default=1200, help="training steps of the widest")
    add("--samples", type=positive_int, default=1000, help="samples per evaluation")
    add("--output", type=picture_path, default="outputs/scaling.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.train_steps < FIRST:
        parser.error(f"--train-steps: expected at least {FIRST}, got {args.train_steps}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate all widths, fit the power laws, and save the picture."""
    args = options(argv)
    images = patches()
    found = study(images, args)
    print(final_table(found))
    decoder = GaussianDecoder(images.levels)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
    real = decoder.encode(images.train[order[: args.samples]])
    floor = energy_distance(real, decoder.encode(images.test))
    print(f"\nenergy distance of {args.samples} real patches: {floor:.4f}\n")
    print(f"{'':<22}{'floor':>10}{'95%':>20}{'exponent':>10}{'95%':>20}")
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    for ax, (measure, name) in zip(axes, MEASURES.items(), strict=True):
        compute, values = curves(found, measure)
        law = fit_frontier(compute, values.mean(1))
        others = refits(compute, values, np.random.default_rng(0)) if args.seeds > 1 else []
        print(law_row(name, law, others))
        show(ax, found, compute, values, [law, *others])
        ax.set_title(name)
    save(figure, args.output)
    print(f"picture {args.output}")


if __name__ == "__main__":
    main()
