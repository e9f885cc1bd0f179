"""Compare schedules, objectives and variances of DDPM on real images, with few steps and many.

The same network, with the same budget, is trained on the linear and the cosine chain with the
simple, the hybrid and the variational objective, on the digits of scikit-learn (17 levels) or on
gray patches of its two photographs (256 levels). Bits per dimension are the whole bound, summed
over all steps; the quality of samples is their energy distance to the test images. It prints a
table as it goes, and leaves it and a picture in files. One data set takes about 25 minutes on one
CPU core; a look at it takes a minute:

    python examples/improved_ddpm.py
    python examples/improved_ddpm.py --data patches
    python examples/improved_ddpm.py --seeds 1 --train-steps 100 --samples 100
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from bits_per_dim import DATA, SIZE, Images, cell
from helpers import count, energy_distance, fit, save, write
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from diffusionkit import (
    DDIM,
    VLB,
    Ancestral,
    ChainNELBO,
    Clip,
    DDPMChain,
    DenoisedModel,
    DiscreteTimes,
    EpsModel,
    GaussianDecoder,
    HybridLoss,
    LossSecondMomentTimes,
    PCSampler,
    Predictor,
    ScoreMatching,
    ScoreModel,
    evaluate_bits_per_dim,
)
from diffusionkit.likelihood import BitsPerDim
from diffusionkit.networks import MLP

FEATURES = SIZE * SIZE
BATCH, LEARNING_RATE, EMA_DECAY = 128, 1e-3, 0.998
FEW = (10, 25, 50, 100)  # steps of samplers, beside all of the chain's

CHAINS: dict[str, Callable[[int], DDPMChain]] = {
    "linear": DDPMChain.linear,
    "cosine": DDPMChain.cosine,
}
OBJECTIVES = ("simple", "hybrid", "VLB", "VLB, importance sampled")
FIXED: dict[str, Predictor] = {
    "fixed_large": Ancestral("forward"),
    "fixed_small": Ancestral("posterior"),
}


class Row(NamedTuple):
    """What one seed came to: bits per dimension, and the energy distance by number of steps."""

    bits: BitsPerDim
    energy: list[float]


def objective(name: str, decoder: GaussianDecoder) -> ScoreMatching | VLB | HybridLoss:
    """Return an objective by its name."""
    if name == "simple":
        return ScoreMatching(times=DiscreteTimes())
    if name == "hybrid":
        return HybridLoss(decoder=decoder)
    return VLB(decoder=decoder, times=LossSecondMomentTimes() if "," in name else None)


def train(images: Images, schedule: str, name: str, args: argparse.Namespace, seed: int) -> MLP:
    """Train a network with an objective, and return its average."""
    torch.manual_seed(seed)
    decoder = GaussianDecoder(levels=images.levels)
    learned = name != "simple"
    network = MLP(FEATURES, out_features=FEATURES * (2 if learned else 1), width=192, depth=4)
    chain = CHAINS[schedule](args.chain_steps)
    model = EpsModel(network, chain, variance="learned_range" if learned else None)
    loss_of = objective(name, decoder)
    data = decoder.encode(images.train)

    def loss() -> Tensor:
        return loss_of(model, data[torch.randint(len(data), (BATCH,))])

    fit(
        model, loss, args.train_steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY,
        name=f"{schedule}, {name}, seed {seed}",
    )  # fmt: skip
    return network


def numbers_of_steps(chain_steps: int) -> list[int]:
    """Return the numbers of steps that samplers take, all of the chain's last."""
    return [*(few for few in FEW if few < chain_steps), chain_steps]


def energies(
    model: ScoreModel, chain: DDPMChain, predictor: Predictor, images: Images, n: int, seed: int
) -> list[float]:
    """Return the energy distance of samples by the number of steps."""
    decoder = GaussianDecoder(levels=images.levels)
    found: list[float] = []
    real = decoder.encode(images.test)
    for steps in numbers_of_steps(chain.steps):
        if predictor == DDIM() and found and steps == chain.steps:
            break  # it has long converged
        sampler = PCSampler(
            DenoisedModel(model, Clip()), predictor, grid=chain.respaced(str(steps)),
            progress=lambda items: tqdm(items, desc="sampling", leave=False),
        )  # fmt: skip
        samples = sampler((n, FEATURES), generator=torch.Generator().manual_seed(seed))
        levels = ((samples + 1) * (0.5 * (images.levels - 1))).round()
        found.append(energy_distance(decoder.encode(levels.long()), real))
    return found


def measured(
    network: MLP, schedule: str, name: str, images: Images, args: argparse.Namespace, seed: int
) -> Iterator[tuple[str, Row]]:
    """Yield what a trained network comes to by variance and sampler."""
    chain, learned = CHAINS[schedule](args.chain_steps), name != "simple"
    decoder = GaussianDecoder(levels=images.levels)
    variances = {"learned_range": Ancestral("model")} if learned else FIXED
    for variance, predictor in variances.items():
        model = EpsModel(network, chain, variance=variance)
        bound = ChainNELBO(model, decoder, steps_at_once=max(1, 1000 // len(images.test)))
        bits = evaluate_bits_per_dim(
            bound, images.test, batch_size=len(images.test), seed=seed, progress=False
        )
        energy = energies(model, chain, predictor, images, args.samples, seed)
        yield variance, Row(bits, energy)
    yield "DDIM", Row(bits, energies(model, chain, DDIM(), images, args.samples, seed))


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean over seeds, in thousandths, and its standard error of two seeds or more."""
    y = 1000 * torch.tensor(values, dtype=torch.float64)
    return f"{y.mean():.0f}" + (f" ± {y.std() / math.sqrt(len(y)):.0f}" if len(y) > 1 else "")


def rows(
    images: Images, args: argparse.Namespace, found: dict[tuple[str, str, str], list[Row]]
) -> Iterator[str]:
    """Train and measure everything, and yield the lines of the table as they come."""
    columns = [f"{steps} steps" for steps in numbers_of_steps(args.chain_steps)]
    yield f"| schedule | objective | variance | bits/dim | {' | '.join(columns)} |"
    yield "|---" * (4 + len(columns)) + "|"
    for schedule in CHAINS:
        for name in args.objectives:
            for seed in range(args.seeds):
                network = train(images, schedule, name, args, seed)
                for variance, row in measured(network, schedule, name, images, args, seed):
                    found.setdefault((schedule, name, variance), []).append(row)
            for key in [key for key in found if key[:2] == (schedule, name)]:
                bits = "" if key[2] == "DDIM" else cell([row.bits for row in found[key]])
                energy = zip(*(row.energy for row in found[key]), strict=True)
                cells = [bits, *(mean_and_error(column) for column in energy)]
                cells += [""] * (1 + len(columns) - len(cells))
                yield f"| {' | '.join([*key, *cells])} |"
    yield (
        f"\nBits per dimension of {len(images.test)} test images and energy distances, in "
        f"thousandths, of {args.samples} samples to them: mean over {args.seeds} seeds and its "
        f"standard error. As many training images are at {1000 * attainable(images, args):.0f}."
    )


def attainable(images: Images, args: argparse.Namespace) -> float:
    """Return the mean energy distance of draws of training images to the test images."""
    decoder = GaussianDecoder(levels=images.levels)
    train, real = decoder.encode(images.train), decoder.encode(images.test)
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.randperm(len(train), generator=generator)[: args.samples] for _ in range(10))
    return float(torch.tensor([energy_distance(train[r], real) for r in chosen]).mean())


def draw(
    found: dict[tuple[str, str, str], list[Row]], args: argparse.Namespace, least: float
) -> Figure:
    """Draw bits per dimension, and energy distance against the number of steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = {key: rows for key, rows in found.items() if key[2] != "DDIM"}
    for place, (key, some) in enumerate(bounds.items()):
        bits = torch.tensor([row.bits.mean for row in some], dtype=torch.float64)
        bar = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else 0.0
        color = "tab:orange" if key[0] == "linear" else "tab:blue"
        left.barh(place, float(bits.mean()), xerr=bar, color=color)
    left.set_yticks(range(len(bounds)), [" ".join(key) for key in bounds], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("bits per dimension")
    for key, some in found.items():
        if key[0] == "cosine":
            y = torch.tensor([row.energy for row in some], dtype=torch.float64)
            error = y.std(0) / math.sqrt(len(y)) if len(y) > 1 else torch.zeros_like(y[0])
            style = "--" if key[2] == "DDIM" else "-"
            steps = numbers_of_steps(args.chain_steps)[: y.shape[1]]
            right.errorbar(steps, y.mean(0), error, label=", ".join(key[1:]), linestyle=style)
    right.axhline(least, color="gray", linestyle=":", label="training images")
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="energy distance, cosine chain")
    right.legend(fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and leave it and a picture in files."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", choices=DATA, default="digits", help="(%(default)s)")
    add("--objectives", choices=OBJECTIVES, nargs="+", default=OBJECTIVES, help="(all)")
    add("--chain-steps", type=positive_int, default=1000, help="of the chains (%(default)s)")
    add("--train-steps", type=positive_int, default=3000, help="of each training (%(default)s)")
    add("--samples", type=positive_int, default=500, help="of each sampler (%(default)s)")
    add("--seeds", type=positive_int, default=3, help="how many of each (%(default)s)")
    add("--output", type=Path, help="(outputs/improved_ddpm_DATA.md, and a .png beside it)")
    args = parser.parse_args(argv)
    path = args.output or Path(f"outputs/improved_ddpm_{args.data}.md")
    images: Images = DATA[args.data]()
    found: dict[tuple[str, str, str], list[Row]] = {}
    start, lines = time.perf_counter(), []
    for line in rows(images, args, found):
        print(line, flush=True)
        lines.append(line)
    write("\n".join(lines) + "\n", path)
    save(draw(found, args, attainable(images, args)), path.with_suffix(".png"))
    print(f"\n{time.perf_counter() - start:.0f} s, {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
