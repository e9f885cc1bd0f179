"""One model of photographs' patches, trained without any condition, and four things to ask of it.

A hole is filled in, colours are given to a gray patch, four times the resolution to a small one:
constraints put what is known into every state of the sampler, and time travel lets the rest agree
with it. Last, a classifier of noisy patches asks for one photograph or the other. The model is
trained first, in about eight minutes on one CPU core, and kept; the rest takes as long. It prints
tables and leaves four pictures, `outputs/conditional_*.png`; a look at it takes a minute:

    python examples/conditional.py
    python examples/conditional.py --train-steps 20 --patches 16 --steps 10 --folder outputs/look
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from helpers import count, energy_distance, save
from matplotlib.figure import Figure
from photographs import CLASSES, SHAPE, SIGMA_DATA, SIZE, Patches, load, trained
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import tqdm

from diffusionkit import (
    DDIM,
    ClassifierGuidance,
    Colorization,
    Constraint,
    Inpainting,
    KarrasGrid,
    LinearMeasurement,
    LogNormalTimes,
    NoiseClassifier,
    PCSampler,
    ScoreModel,
    TimeTravel,
    train_noise_classifier,
)
from diffusionkit.control import AveragePool
from diffusionkit.metrics import precision_recall
from diffusionkit.networks import MLP

FACTOR = 4  # of the resolution
SHOWN = 10  # patches in a picture
SCALES = (0.0, 1.0, 2.0, 4.0)
HOLE = slice(SIZE // 4, 3 * SIZE // 4)


class Task(NamedTuple):
    """What is known of patches, the constraint that says so, and what one would do without."""

    constraint: Callable[[Tensor], Constraint]
    given: Callable[[Tensor], Tensor]  # what is known, as a patch to look at
    simple: Callable[[Tensor], Tensor]  # the simplest way to make up the rest
    known: Callable[[Tensor], Tensor]  # what is known, as numbers


def mask() -> Tensor:
    """Return the mask of a patch with a hole, (1, 16, 16)."""
    known = torch.ones(1, SIZE, SIZE)
    known[:, HOLE, HOLE] = 0
    return known


def holed(x: Tensor, fill: float | Tensor) -> Tensor:
    """Return patches with something else in the hole."""
    return torch.where(mask().bool(), x, fill)


def around(x: Tensor) -> Tensor:
    """Return the mean of each colour around the hole (n, 3, 1, 1)."""
    return (x * mask()).sum((2, 3), keepdim=True) / mask().sum()


def small(x: Tensor) -> Tensor:
    """Return patches shrunk to (n, 3, 4, 4)."""
    return avg_pool2d(x, FACTOR)


def gray(x: Tensor) -> Tensor:
    """Return the mean over the colours (n, 1, 16, 16)."""
    return x.mean(1, keepdim=True)


TASKS = {
    "inpainting": Task(
        lambda x: Inpainting(x, mask()),
        lambda x: holed(x, 1.0),
        lambda x: holed(x, around(x)),
        lambda x: holed(x, 0.0),
    ),
    "colorization": Task(
        lambda x: Colorization(gray(x)),
        lambda x: gray(x).expand_as(x),
        lambda x: gray(x).expand_as(x),
        gray,
    ),
    "super_resolution": Task(
        lambda x: LinearMeasurement(AveragePool(FACTOR), small(x)),
        lambda x: interpolate(small(x), scale_factor=FACTOR),
        lambda x: interpolate(small(x), scale_factor=FACTOR, mode="bicubic").clamp(-1, 1),
        small,
    ),
}


def draw(
    model: ScoreModel, constraint: Constraint, n: int, args: argparse.Namespace, seed: int
) -> Tensor:
    """Draw patches (n, 3, 16, 16) that agree with a constraint."""
    sampler = PCSampler(
        model,
        DDIM(eta=1.0),
        grid=KarrasGrid(to_zero=True),
        steps=args.steps,
        constraint=constraint,
        time_travel=TimeTravel(jump=min(5, args.steps), repeats=args.repeats),
        progress=lambda moves: tqdm(moves, desc="sampling", leave=False),
    )
    return sampler((n, *SHAPE), generator=torch.Generator().manual_seed(seed))


def rmse(x: Tensor, y: Tensor) -> float:
    """Return the root of the mean squared difference."""
    return float((x - y).square().mean().sqrt())


def task_table(task: Task, truth: Tensor, samples: Sequence[Tensor]) -> str:
    """Return what is measured of patches that were made from a part of the true ones."""
    rows = {"sample": samples[0], "mean of samples": torch.stack(list(samples)).mean(0)}
    rows["without the model"] = task.simple(truth)
    lines = [f"{'':<20}{'known part off by':>20}{'RMSE':>10}{'energy distance':>18}"]
    for name, x in rows.items():
        off = float((task.known(x) - task.known(truth)).abs().max())
        energy = energy_distance(x.flatten(1), truth.flatten(1))
        lines.append(f"{name:<20}{off:>20.1e}{rmse(x, truth):>10.3f}{energy:>18.3f}")
    return "\n".join(lines)


def tiles(rows: dict[str, Tensor]) -> Figure:
    """Draw patches (n, 3, 16, 16), one row under the other."""
    figure = Figure(figsize=(SHOWN, 1.05 * len(rows)), layout="constrained")
    for ax, (name, x) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        framed = nn.functional.pad(0.5 * (x[:SHOWN].clamp(-1, 1) + 1), (0, 1, 0, 1), value=1.0)
        ax.imshow(np.asarray(framed.permute(2, 0, 3, 1).reshape(SIZE + 1, -1, 3)))
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


class Flat(nn.Module):
    """A network of vectors, given patches."""

    def __init__(self, network: nn.Module) -> None:
        """Keep the network."""
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Return what the network makes of patches (n, 3, 16, 16)."""
        out: Tensor = self.network(x.flatten(1), label)
        return out


def traits(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return what a patch is judged by: its colours, roughly where, and how they vary (n, d)."""
    spread = x.std((2, 3))
    return np.asarray(torch.cat([small(x).flatten(1), spread], 1).double())


def guided(model: ScoreModel, data: Patches, args: argparse.Namespace) -> Figure:
    """Ask for each photograph at several scales, print how often it came, and draw it."""
    torch.manual_seed(0)
    classifier = NoiseClassifier(
        Flat(MLP(3 * SIZE**2, out_features=len(CLASSES), width=128, depth=2)), model.sde, SIGMA_DATA
    )
    train_noise_classifier(
        classifier, model.sde, data.train, data.train_labels, steps=args.train_steps,
        times=LogNormalTimes(), progress=lambda items: tqdm(items, desc="classifier", leave=False),
    )  # fmt: skip
    judge = RandomForestClassifier(200, random_state=0)
    judge.fit(traits(data.train), data.train_labels.numpy())
    right = judge.score(traits(data.test), data.test_labels.numpy())
    print(f"\nclasses: a random forest is right about {right:.1%} of the patches held out")
    print(f"{'scale':<8}{'as asked':>12}{'precision':>12}{'recall':>12}")
    class_labels, rows = torch.arange(args.patches) % len(CLASSES), {}
    for scale in SCALES:
        sampler = PCSampler(
            ClassifierGuidance(model, classifier, scale), DDIM(eta=0.5), grid=KarrasGrid(),
            steps=args.steps, progress=lambda steps: tqdm(steps, desc="sampling", leave=False),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        x = sampler((len(class_labels), *SHAPE), y=class_labels, generator=generator)
        asked = float((judge.predict(traits(x)) == class_labels.numpy()).mean())
        near = precision_recall(data.test.flatten(1), x.flatten(1))
        print(f"{scale:<8g}{asked:>12.1%}{near.precision:>12.1%}{near.recall:>12.1%}", flush=True)
        for k, name in enumerate(CLASSES):
            rows[f"{name}, {scale:g}"] = x[class_labels == k]
    return tiles(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the model if there is none, ask it for four things, and leave four pictures."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--train-steps", type=positive_int, default=1500, help="of both trainings (%(default)s)")
    add("--patches", type=positive_int, default=100, help="of each task (%(default)s)")
    add("--samples", type=positive_int, default=3, help="of each patch (%(default)s)")
    add("--steps", type=positive_int, default=40, help="sampler steps (%(default)s)")
    add("--repeats", type=positive_int, default=4, help="of time travel (%(default)s)")
    add("--folder", type=Path, default=Path("outputs"), help="of the pictures (%(default)s)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    data = load()
    model = trained(data.train, args.folder / "photographs.pt", args.train_steps)
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    truth = data.test[rows[: args.patches]]
    for name, task in TASKS.items():
        constraint = task.constraint(truth)
        samples = [draw(model, constraint, len(truth), args, k) for k in range(args.samples)]
        print(f"\n{name.replace('_', '-')}\n{task_table(task, truth, samples)}", flush=True)
        shown = {f"sample {k + 1}": x for k, x in enumerate(samples)}
        picture = tiles({"given": task.given(truth), **shown, "truth": truth})
        save(picture, args.folder / f"conditional_{name}.png")
    save(guided(model, data, args), args.folder / "conditional_classes.png")
    print(f"\n{time.perf_counter() - start:.0f} s, pictures {args.folder}/conditional_*.png")


if __name__ == "__main__":
    main()
