"""Train a class-conditional model of digits and sample it with classifier-free guidance.

The network is trained with the objective of improved DDPM, and a tenth of the class labels dropped.
Guidance extrapolates from the unconditional to the conditional prediction: a larger scale raises
class accuracy and lowers diversity. It prints a table and saves a picture,
`outputs/conditional_digits.png`. Runtime: five minutes on one CPU core; the second command takes
half a minute.

    python examples/conditional_digits.py
    python examples/conditional_digits.py --train-steps 100 --samples 100
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from digits import Digits, Pixels, Quality, load, pixels
from einops import rearrange
from helpers import argument_parser, fit, picture_path, positive_int, save
from matplotlib.figure import Figure
from torch import Tensor

from diffusionkit import (
    Ancestral,
    ClassifierFreeGuidance,
    Clip,
    DDPMChain,
    DenoisedModel,
    EpsModel,
    GaussianDecoder,
    HybridLoss,
    PCSampler,
    ScoreModel,
    drop_conditions,
)
from diffusionkit.metrics import precision_recall
from diffusionkit.networks import ADMUNet

CLASSES, NULL, DROPPED = 10, 10, 0.1  # NULL is the label of the unconditional model
LEVELS = 17
SCALES = (0.0, 1.0, 2.0, 3.0, 4.0)
BATCH, LEARNING_RATE, EMA_DECAY = 64, 1e-3, 0.998
SHOWN = 6  # samples per class and scale in the picture


def train(data: Digits, steps: int, seed: int) -> ScoreModel:
    """Train a class-conditional model with a learned variance."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = ADMUNet(
        channels=1,
        width=32,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(1,),
        heads=2,
        dropout=0.1,
        num_classes=CLASSES + 1,
    )
    model = EpsModel(network, DDPMChain.cosine(1000), variance="learned_range")
    objective = HybridLoss(decoder=GaussianDecoder(LEVELS))

    def loss() -> Tensor:
        rows = torch.randint(len(data.train), (BATCH,), generator=generator)
        class_labels = drop_conditions(data.class_labels[rows], NULL, DROPPED, generator=generator)
        return objective(model, data.train[rows], class_labels=class_labels, generator=generator)

    fit(model, loss, steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY, optimizer=torch.optim.AdamW)
    return model


def sample(model: ScoreModel, scale: float, class_labels: Tensor, steps: int, seed: int) -> Pixels:
    """Generate one digit (n, 64) for each class label, with pixels from 0 to 16."""
    guided = ClassifierFreeGuidance(model, scale, null={"class_labels": NULL})
    sampler = PCSampler(
        DenoisedModel(guided, Clip()),
        Ancestral(variance="model"),
        grid=DDPMChain.cosine(1000).respaced(str(steps)),
    )
    generator = torch.Generator().manual_seed(seed)  # the same noise at every scale
    return pixels(
        sampler((len(class_labels), 1, 8, 8), class_labels=class_labels, generator=generator)
    )


def accuracy(quality: Quality, samples: Pixels, class_labels: Tensor) -> float:
    """Return the share of samples that a logistic regression assigns to their class."""
    shares = [quality.shares(samples[class_labels.numpy() == k])[k] for k in range(CLASSES)]
    return float(np.mean(shares))


def table_row(name: str, quality: Quality, samples: Pixels, class_labels: Tensor) -> str:
    """Return the row of the table for samples with class labels."""
    near = precision_recall(torch.tensor(quality.test), torch.tensor(samples))
    cells = [
        f"{accuracy(quality, samples, class_labels):.1%}",
        f"{quality.energy_distance(samples):.4f}",
        f"{near.precision:.1%}",
        f"{near.recall:.1%}",
        f"{quality.near_training(samples):.1%}",
    ]
    return f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells)


def draw_figure(samples: dict[float, Pixels], class_labels: Tensor) -> Figure:
    """Plot samples of every class, one row each, at every scale."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    axes = figure.subplots(1, len(samples))
    for ax, (scale, images) in zip(np.atleast_1d(axes), samples.items(), strict=True):
        rows = [images[class_labels.numpy() == digit][:SHOWN] for digit in range(CLASSES)]
        tiles = rearrange(rows, "row column (h w) -> row column h w", h=8)
        framed = np.pad(tiles, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=8)
        ax.imshow(rearrange(framed, "row column h w -> (row h) (column w)"), cmap="gray_r")
        ax.set(xticks=[], yticks=9 * np.arange(CLASSES) + 4, yticklabels=range(CLASSES))
        ax.set_title(f"scale {scale:g}")
    return figure


def options(
    argv: Sequence[str] | None,
    doc: str | None,
    *,
    name: str = "conditional_digits",
    train_steps: int = 2000,
    scales: Sequence[float] = SCALES,
) -> argparse.Namespace:
    """Parse the command line of an example that samples digits by class."""
    parser = argument_parser(doc)
    add = parser.add_argument
    add("--train-steps", type=positive_int, default=train_steps, help="training steps")
    add("--samples", type=positive_int, default=500, help="samples per scale")
    add("--steps", type=positive_int, default=50, help="sampler steps")
    add("--scales", type=float, nargs="+", default=scales, help="guidance scales")
    add("--seed", type=int, default=0, help="the random seed")
    add("--output", type=picture_path, default=f"outputs/{name}.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.samples < SHOWN * CLASSES:
        parser.error(f"--samples: expected at least {SHOWN * CLASSES}, got {args.samples}")
    return args


def compare(
    sample: Callable[[float, Tensor], Pixels],
    data: Digits,
    scales: Sequence[float],
    samples: int,
    output: Path,
) -> None:
    """Sample every class at every scale, print the measures, and save the picture."""
    quality, class_labels, found = Quality(data), torch.arange(samples) % CLASSES, {}
    heads = ("class accuracy", "energy distance", "precision", "recall", "near training")
    print(f"{'scale':<10}" + "".join(f"{head:>18}" for head in heads))
    for scale in scales:
        found[scale] = sample(scale, class_labels)
        print(table_row(f"{scale:g}", quality, found[scale], class_labels), flush=True)
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:samples]
    print(table_row("training", quality, pixels(data.train[rows]), data.class_labels[rows]))
    save(draw_figure(found, class_labels), output)
    print(f"\npicture {output}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample every class at every scale, and save the picture."""
    args = options(argv, __doc__)
    data, start = load(), time.perf_counter()
    model = train(data, args.train_steps, args.seed)
    print(f"training {time.perf_counter() - start:.0f} s\n")
    compare(
        lambda scale, labels: sample(model, scale, labels, args.steps, args.seed),
        data, args.scales, args.samples, args.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
