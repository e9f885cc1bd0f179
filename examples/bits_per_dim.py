"""Compare bits per dimension on real images: three processes, three objectives, two baselines.

The data are scikit-learn's digits (17 levels) or gray patches of its two photographs (256 levels).
All models use the same network and training budget. It prints a table and saves it to a file.
Runtime: half an hour per data set on one CPU core; the last command takes a minute.

    python examples/bits_per_dim.py
    python examples/bits_per_dim.py --data patches
    python examples/bits_per_dim.py --seeds 1 --train-steps 100
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from helpers import argument_parser, fit, mean_and_error, positive_int, report
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.distributions import MultivariateNormal
from tqdm import tqdm

from diffusionkit import (
    NELBO,
    VESDE,
    VPSDE,
    EDMModel,
    ForwardSDE,
    ImportanceTimes,
    LikelihoodWeighting,
    ODELikelihood,
    ScoreMatching,
    ScoreModel,
    StratifiedTimes,
    SubVPSDE,
    UniformDequantizer,
    VariationalDequantizer,
    bits_per_dim,
    clipped_step,
    evaluate_bits_per_dim,
)
from diffusionkit.likelihood import BitsPerDim, Dequantizer
from diffusionkit.networks import MLP

SIZE = 8  # side of an image in pixels
BATCH, LEARNING_RATE, EMA_DECAY = 128, 1e-3, 0.998

PROCESSES: dict[str, ForwardSDE] = {
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(t_min=1e-2),  # as published: there is hardly any noise below
    "VE": VESDE(sigma_min=0.001, sigma_max=20.0),
}
OBJECTIVES = {
    "simple": ScoreMatching(times=StratifiedTimes()),
    "LW": ScoreMatching(LikelihoodWeighting(), times=StratifiedTimes()),
    "LW + IS": ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes()),
}
# For VE the three agree: its likelihood weighting is constant, and uniform times are uniform in
# the log-SNR.
TRAININGS = {
    "VP": OBJECTIVES,
    "sub-VP": OBJECTIVES,
    "VE": {"any": OBJECTIVES["LW + IS"]},
}


class Images(NamedTuple):
    """Integer images (n, 64) for training and testing, and their number of levels."""

    train: Tensor
    test: Tensor
    levels: int


def digits() -> Images:
    """Return scikit-learn's digits, split 80:20 with a fixed seed."""
    pixels, class_labels = load_digits(return_X_y=True)
    train, test = train_test_split(pixels, test_size=0.2, random_state=0, stratify=class_labels)
    return Images(torch.tensor(train).long(), torch.tensor(test).long(), levels=17)


def patches() -> Images:
    """Return gray patches of two photographs; training and test patches share no pixels."""
    train: list[Tensor] = []
    test: list[Tensor] = []
    for photograph in load_sample_images().images:
        gray = torch.tensor(photograph).double().mean(-1).round().long()
        for i, stripe in enumerate(torch.split(gray, 4 * SIZE, dim=1)):
            cut = stripe.unfold(0, SIZE, SIZE // 2).unfold(1, SIZE, SIZE // 2).flatten(0, 1)
            (test if i % 5 == 4 else train).append(cut.flatten(1))
    chosen = torch.randperm(len(torch.cat(test)), generator=torch.Generator().manual_seed(0))[:500]
    return Images(torch.cat(train), torch.cat(test)[chosen], levels=256)


DATA: dict[str, Callable[[], Images]] = {"digits": digits, "patches": patches}


def train(
    images: Images, sde: ForwardSDE, objective: ScoreMatching, steps: int, seed: int
) -> ScoreModel:
    """Train a model on uniformly dequantized images."""
    torch.manual_seed(seed)
    dequantizer = UniformDequantizer(images.levels)
    sigma_data = float(dequantizer(images.train).x.std())
    model = EDMModel(MLP(SIZE * SIZE, width=192, depth=4), sde, sigma_data=sigma_data)

    def loss() -> Tensor:
        rows = torch.randint(len(images.train), (BATCH,))
        return objective(model, dequantizer(images.train[rows]).x)

    fit(model, loss, steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY)
    return model


def fit_dequantizer(images: Images, model: ScoreModel, steps: int) -> Dequantizer:
    """Train a variational dequantizer against a fixed model."""
    dequantizer = VariationalDequantizer(
        SIZE * SIZE,
        dims=0,
        levels=images.levels,
        steps=2,
        components=4,
        heads=0,
        squash="normal",  # initially the uniform dequantizer
    )
    optimizer = torch.optim.Adam(dequantizer.parameters(), 1e-3)
    bound = NELBO(model, samples=2)
    for _ in tqdm(range(steps), desc="dequantizer", unit="step", leave=False):
        rows = torch.randint(len(images.train), (BATCH,))
        dequantized = dequantizer(images.train[rows])
        (bound(dequantized.x).nats + dequantized.log_prob).mean().backward()
        clipped_step(optimizer)
    return dequantizer


def measure(images: Images, model: ScoreModel, dequantizer: Dequantizer) -> list[BitsPerDim]:
    """Return the bound and the ODE likelihood of the test images."""
    return [
        evaluate_bits_per_dim(
            likelihood, images.test, dequantizer=dequantizer, draws=2, batch_size=500
        )
        for likelihood in (NELBO(model, samples=64), ODELikelihood(model))
    ]


def baselines(images: Images) -> Iterator[tuple[str, float]]:
    """Fit a Gaussian and a kernel density to the dequantized training images."""
    torch.manual_seed(0)
    dequantizer = UniformDequantizer(images.levels, dtype=torch.float64)
    data, test = dequantizer(images.train).x, dequantizer(images.test)
    fitted, held_out = data[: len(data) * 4 // 5], data[len(data) * 4 // 5 :]

    def bits(log_prob: Callable[[Tensor], Tensor]) -> float:
        return float(bits_per_dim(test.log_prob - log_prob(test.x), test.x.shape[1]).mean())

    gaussian = MultivariateNormal(data.mean(0), torch.cov(data.T))
    yield "Gaussian, full covariance", bits(gaussian.log_prob)

    def kernels(points: Tensor, x: Tensor, width: float) -> Tensor:
        d = x.shape[1]
        log = torch.logsumexp(-0.5 * (torch.cdist(x, points) / width).square(), 1)
        return log - math.log(len(points)) - 0.5 * d * math.log(2 * math.pi * width**2)

    widths = [0.02 * 1.2**i for i in range(20)]
    best = max(widths, key=lambda width: float(kernels(fitted, held_out, width).mean()))
    yield f"kernel density, width {best:.2f}", bits(lambda x: kernels(data, x, best))


def cell(results: Sequence[BitsPerDim]) -> str:
    """Format the mean over seeds and its standard error."""
    return mean_and_error([result.mean for result in results], ".3f")


def rows(images: Images, args: argparse.Namespace) -> Iterator[str]:
    """Train and evaluate every combination, and yield the lines of the table."""
    yield "| process | training | dequantization | bound | ODE |\n|---|---|---|---|---|"
    uniform = UniformDequantizer(images.levels)
    for process, sde in PROCESSES.items():
        for name, objective in TRAININGS[process].items():
            models = [train(images, sde, objective, args.train_steps, s) for s in range(args.seeds)]
            kinds: dict[str, list[Dequantizer]] = {"uniform": [uniform] * len(models)}
            if objective is OBJECTIVES["LW + IS"]:
                learned = [fit_dequantizer(images, m, args.train_steps // 3) for m in models]
                kinds["variational"] = learned
            for kind, dequantizers in kinds.items():
                pairs = zip(models, dequantizers, strict=True)
                found = [measure(images, model, dequantizer) for model, dequantizer in pairs]
                bound, ode = (cell(column) for column in zip(*found, strict=True))
                yield f"| {process} | {name} | {kind} | {bound} | {ode} |"
    for name, bits in baselines(images):
        yield f"| {name} | | uniform | | {bits:.3f} |"
    error = float(found[0][0].bits.mean(1).std() / math.sqrt(len(images.test)))
    yield (
        f"\nBits per dimension of {len(images.test)} test images: mean ± standard error over "
        f"{args.seeds} seeds. The choice of test images adds a common error of about {error:.3f}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and save it."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", choices=DATA, default="digits", help="the data set")
    add("--train-steps", type=positive_int, default=3000, help="training steps of a model")
    add("--seeds", type=positive_int, default=3, help="seeds per model")
    add("--output", default="outputs/bits_per_dim_{data}.md", help="path of the table")
    args = parser.parse_args(argv)
    path = Path(args.output.format(data=args.data))
    start = time.perf_counter()
    report(rows(DATA[args.data](), args), path)
    print(f"\n{time.perf_counter() - start:.0f} s, table {path}")


if __name__ == "__main__":
    main()
