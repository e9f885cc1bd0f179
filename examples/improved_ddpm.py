"""Compare DDPM schedules, objectives and variances on real images, with few and many steps.

One network is trained with the same budget on the linear and the cosine chain with the simple, the
hybrid and the variational objective. The data are scikit-learn's digits (17 levels) or gray patches
of its two photographs (256 levels). Bits per dimension are the variational bound summed over all
steps; sample quality is the energy distance to the test images. It prints a table, and saves it and
a picture. Runtime: 25 minutes per data set on one CPU core; the last command takes a minute.

    python examples/improved_ddpm.py
    python examples/improved_ddpm.py --data patches
    python examples/improved_ddpm.py --seeds 1 --train-steps 100 --samples 100
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bits_per_dim import DATA, SIZE, Images, cell
from helpers import (
    argument_parser,
    energy_distance,
    fit,
    mean_and_error,
    positive_int,
    report,
    save,
)
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
FEW = (10, 25, 50, 100)  # sampler steps, besides the full chain

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
    """The results of one seed: bits per dimension, and energy distance by number of steps."""

    bits: BitsPerDim
    energy: list[float]


def objective(name: str, decoder: GaussianDecoder) -> ScoreMatching | VLB | HybridLoss:
    """Return the objective of a given name."""
    if name == "simple":
        return ScoreMatching(times=DiscreteTimes())
    if name == "hybrid":
        return HybridLoss(decoder=decoder)
    return VLB(decoder=decoder, times=LossSecondMomentTimes() if "," in name else None)


def train(images: Images, schedule: str, name: str, args: argparse.Namespace, seed: int) -> MLP:
    """Train a network with an objective and return it with averaged weights."""
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
    """Return the numbers of sampler steps, the full chain last."""
    return [*(few for few in FEW if few < chain_steps), chain_steps]


def energies(
    model: ScoreModel, chain: DDPMChain, predictor: Predictor, images: Images, n: int, seed: int
) -> list[float]:
    """Return the energy distance of samples for each number of steps."""
    decoder = GaussianDecoder(levels=images.levels)
    found: list[float] = []
    real = decoder.encode(images.test)
    for steps in numbers_of_steps(chain.steps):
        if predictor == DDIM() and found and steps == chain.steps:
            break  # it has converged
        sampler = PCSampler(
            DenoisedModel(model, Clip()), predictor, grid=chain.respaced(str(steps)),
            progress=partial(tqdm, desc="sampling", leave=False),
        )  # fmt: skip
        samples = sampler((n, FEATURES), generator=torch.Generator().manual_seed(seed))
        levels = ((samples + 1) * (0.5 * (images.levels - 1))).round()
        found.append(energy_distance(decoder.encode(levels.long()), real))
    return found


def evaluate(
    network: MLP, schedule: str, name: str, images: Images, args: argparse.Namespace, seed: int
) -> Iterator[tuple[str, Row]]:
    """Yield the results of a trained network for each variance and sampler."""
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


def rows(
    images: Images, args: argparse.Namespace, found: dict[tuple[str, str, str], list[Row]]
) -> Iterator[str]:
    """Train and evaluate every combination, and yield the lines of the table."""
    columns = [f"{steps} steps" for steps in numbers_of_steps(args.chain_steps)]
    yield f"| schedule | objective | variance | bits/dim | {' | '.join(columns)} |"
    yield "|---" * (4 + len(columns)) + "|"
    for schedule in CHAINS:
        for name in args.objectives:
            for seed in range(args.seeds):
                network = train(images, schedule, name, args, seed)
                for variance, row in evaluate(network, schedule, name, images, args, seed):
                    found.setdefault((schedule, name, variance), []).append(row)
            for key in [key for key in found if key[:2] == (schedule, name)]:
                bits = "" if key[2] == "DDIM" else cell([row.bits for row in found[key]])
                energy = zip(*(row.energy for row in found[key]), strict=True)
                cells = [bits, *(mean_and_error([1e3 * e for e in es], ".0f") for es in energy)]
                cells += [""] * (1 + len(columns) - len(cells))
                yield f"| {' | '.join([*key, *cells])} |"
    yield (
        f"\nBits per dimension of {len(images.test)} test images, and energy distance (in "
        f"thousandths) of {args.samples} samples to them: mean ± standard error over {args.seeds} "
        f"seeds. As many training images have {1000 * attainable(images, args):.0f}."
    )


def attainable(images: Images, args: argparse.Namespace) -> float:
    """Return the mean energy distance of random training images to the test images."""
    decoder = GaussianDecoder(levels=images.levels)
    train, real = decoder.encode(images.train), decoder.encode(images.test)
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.randperm(len(train), generator=generator)[: args.samples] for _ in range(10))
    return float(torch.tensor([energy_distance(train[r], real) for r in chosen]).mean())


def draw_figure(
    found: dict[tuple[str, str, str], list[Row]], args: argparse.Namespace, attainable: float
) -> Figure:
    """Plot bits per dimension, and energy distance against the number of steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = {key: rows for key, rows in found.items() if key[2] != "DDIM"}
    for place, (key, results) in enumerate(bounds.items()):
        bits = torch.tensor([row.bits.mean for row in results], dtype=torch.float64)
        bar = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else 0.0
        color = "tab:orange" if key[0] == "linear" else "tab:blue"
        left.barh(place, float(bits.mean()), xerr=bar, color=color)
    left.set_yticks(range(len(bounds)), [" ".join(key) for key in bounds], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("bits per dimension")
    for key, results in found.items():
        if key[0] == "cosine":
            y = torch.tensor([row.energy for row in results], dtype=torch.float64)
            error = y.std(0) / math.sqrt(len(y)) if len(y) > 1 else torch.zeros_like(y[0])
            style = "--" if key[2] == "DDIM" else "-"
            steps = numbers_of_steps(args.chain_steps)[: y.shape[1]]
            right.errorbar(steps, y.mean(0), error, label=", ".join(key[1:]), linestyle=style)
    right.axhline(attainable, color="gray", linestyle=":", label="training images")
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="energy distance, cosine chain")
    right.legend(fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and save it and the picture."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", choices=DATA, default="digits", help="the data set")
    add("--objectives", choices=OBJECTIVES, nargs="+", default=OBJECTIVES, help="the objectives")
    add("--chain-steps", type=positive_int, default=1000, help="steps of the chains")
    add("--train-steps", type=positive_int, default=3000, help="training steps of a model")
    add("--samples", type=positive_int, default=500, help="samples per sampler")
    add("--seeds", type=positive_int, default=3, help="seeds per model")
    add("--output", default="outputs/improved_ddpm_{data}.md", help="path of the table (and .png)")
    args = parser.parse_args(argv)
    path = Path(args.output.format(data=args.data))
    images: Images = DATA[args.data]()
    found: dict[tuple[str, str, str], list[Row]] = {}
    start = time.perf_counter()
    report(rows(images, args, found), path)
    save(draw_figure(found, args, attainable(images, args)), path.with_suffix(".png"))
    print(f"\n{time.perf_counter() - start:.0f} s, {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
