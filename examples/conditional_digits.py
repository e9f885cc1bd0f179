"""Train one network with and without the class of digits, and sample every class with guidance.

The network learns improved DDPM's objective, and one label in ten is left out. Guidance without a
classifier then goes away from what the network says without the label: the larger the scale, the
surer the class and the less alike the samples are to all that digits can be. That takes about five
minutes on one CPU core. It prints a table and leaves one picture, `outputs/conditional_digits.png`;
a look at it takes half a minute:

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
from helpers import count, fit, picture_path, save
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

CLASSES, NULL, DROPPED = 10, 10, 0.1  # the label that stands for none, and how often it is given
LEVELS = 17
SCALES = (0.0, 1.0, 2.0, 3.0, 4.0)
BATCH, LEARNING_RATE, EMA_DECAY = 64, 1e-3, 0.998
SHOWN = 6  # samples of each class and scale in the picture


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

    fit(model, loss, steps, rate=LEARNING_RATE, decay=EMA_DECAY, optimizer=torch.optim.AdamW)
    return model


def draw(model: ScoreModel, scale: float, class_labels: Tensor, steps: int, seed: int) -> Pixels:
    """Draw one digit (n, 64) for each label, in pixels."""
    guided = ClassifierFreeGuidance(model, scale, null={"class_labels": NULL})
    sampler = PCSampler(
        DenoisedModel(guided, Clip()),
        Ancestral(variance="model"),
        grid=DDPMChain.cosine(1000).respaced(str(steps)),
    )
    generator = torch.Generator().manual_seed(seed)  # the same for every scale
    return pixels(
        sampler((len(class_labels), 1, 8, 8), class_labels=class_labels, generator=generator)
    )


def as_asked(quality: Quality, samples: Pixels, class_labels: Tensor) -> float:
    """Return the share of samples that a logistic regression takes for the digit asked for."""
    found = [quality.shares(samples[class_labels.numpy() == k])[k] for k in range(CLASSES)]
    return float(np.mean(found))


def table_row(name: str, quality: Quality, samples: Pixels, class_labels: Tensor) -> str:
    """Return what is measured of samples of classes."""
    near = precision_recall(torch.tensor(quality.test), torch.tensor(samples))
    cells = [
        f"{as_asked(quality, samples, class_labels):.1%}",
        f"{quality.energy_distance(samples):.4f}",
        f"{near.precision:.1%}",
        f"{near.recall:.1%}",
        f"{quality.near_training(samples):.1%}",
    ]
    return f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells)


def draw_figure(drawn: dict[float, Pixels], class_labels: Tensor) -> Figure:
    """Return the picture: a row for each class, samples at every scale side by side."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    axes = figure.subplots(1, len(drawn))
    for ax, (scale, samples) in zip(np.atleast_1d(axes), drawn.items(), strict=True):
        rows = [samples[class_labels.numpy() == digit][:SHOWN] for digit in range(CLASSES)]
        tiles = np.stack(rows).reshape(CLASSES, -1, 8, 8)
        framed = np.pad(tiles, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=8)
        ax.imshow(framed.transpose(0, 2, 1, 3).reshape(9 * CLASSES, -1), cmap="gray_r")
        ax.set(xticks=[], yticks=9 * np.arange(CLASSES) + 4, yticklabels=range(CLASSES))
        ax.set_title(f"scale {scale:g}")
    return figure


def options(
    argv: Sequence[str] | None,
    about: str | None,
    *,
    name: str = "conditional_digits",
    train_steps: int = 2000,
    scales: Sequence[float] = SCALES,
) -> argparse.Namespace:
    """Read the command line of an example that draws classes of digits."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    add = parser.add_argument
    add("--train-steps", type=count, default=train_steps, help="(%(default)s)")
    add("--samples", type=count, default=500, help="of each scale (%(default)s)")
    add("--steps", type=count, default=50, help="of the sampler (%(default)s)")
    add("--scales", type=float, nargs="+", default=scales, help="of guidance (%(default)s)")
    add("--seed", type=int, default=0, help="of everything that is random (%(default)s)")
    add("--output", type=picture_path, default=f"outputs/{name}.png", help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.samples < SHOWN * CLASSES:
        parser.error(f"--samples: expected at least {SHOWN * CLASSES}, got {args.samples}")
    return args


def compare(
    draw: Callable[[float, Tensor], Pixels],
    data: Digits,
    scales: Sequence[float],
    samples: int,
    output: Path,
) -> None:
    """Draw digits of every class at every scale, measure them, and leave a picture."""
    quality, class_labels, drawn = Quality(data), torch.arange(samples) % CLASSES, {}
    heads = ("classed as asked", "energy distance", "precision", "recall", "near training")
    print(f"{'scale':<10}" + "".join(f"{head:>18}" for head in heads))
    for scale in scales:
        drawn[scale] = draw(scale, class_labels)
        print(table_row(f"{scale:g}", quality, drawn[scale], class_labels), flush=True)
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:samples]
    print(table_row("training", quality, pixels(data.train[rows]), data.class_labels[rows]))
    save(draw_figure(drawn, class_labels), output)
    print(f"\npicture {output}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample every class at every scale, and leave a picture."""
    args = options(argv, __doc__)
    data, start = load(), time.perf_counter()
    model = train(data, args.train_steps, args.seed)
    print(f"training {time.perf_counter() - start:.0f} s\n")
    compare(
        lambda scale, class_labels: draw(model, scale, class_labels, args.steps, args.seed),
        data, args.scales, args.samples, args.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
