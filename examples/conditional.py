"""Four kinds of conditional generation from one unconditional model of photograph patches.

Inpainting, colorization and 4x super-resolution impose a measurement on every state of the sampler
and harmonize the rest by time travel. Classifier guidance generates patches of either photograph.
It prints tables and saves four pictures, `outputs/conditional_*.png`. Runtime on one core: eight
minutes to train the model, which is cached, and as long for the rest; a minute for the second
command.

    python examples/conditional.py
    python examples/conditional.py --train-steps 20 --patches 16 --steps 10 --folder outputs/look
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from helpers import argument_parser, energy_distance, positive_int, save
from matplotlib.figure import Figure
from photographs import (
    CLASSES,
    FACTOR,
    SHAPE,
    SIGMA_DATA,
    SIZE,
    Patches,
    enlarge,
    load,
    shrink,
    trained,
)
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import override

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

SHOWN = 10  # patches per row of a picture
SCALES = (0.0, 1.0, 2.0, 4.0)
HOLE = slice(SIZE // 4, 3 * SIZE // 4)


class Task(NamedTuple):
    """A measurement of patches, its constraint, and a baseline that needs no model."""

    constraint: Callable[[Tensor], Constraint]
    given: Callable[[Tensor], Tensor]  # the measurement as a patch, for the picture
    baseline: Callable[[Tensor], Tensor]
    measure: Callable[[Tensor], Tensor]


def mask() -> Tensor:
    """Return the mask of a patch with a hole, (1, 16, 16)."""
    known = torch.ones(1, SIZE, SIZE)
    known[:, HOLE, HOLE] = 0
    return known


def fill(x: Tensor, value: float | Tensor) -> Tensor:
    """Return patches with the hole filled by a value."""
    return torch.where(mask().bool(), x, value)


def mean_outside(x: Tensor) -> Tensor:
    """Return the mean color outside the hole (n, 3, 1, 1)."""
    return (x * mask()).sum((2, 3), keepdim=True) / mask().sum()


def gray(x: Tensor) -> Tensor:
    """Return the mean over the color channels (n, 1, 16, 16)."""
    return x.mean(1, keepdim=True)


TASKS = {
    "inpainting": Task(
        lambda x: Inpainting(x, mask()),
        lambda x: fill(x, 1.0),
        lambda x: fill(x, mean_outside(x)),
        lambda x: fill(x, 0.0),
    ),
    "colorization": Task(
        lambda x: Colorization(gray(x)),
        lambda x: gray(x).expand_as(x),
        lambda x: gray(x).expand_as(x),
        gray,
    ),
    "super_resolution": Task(
        lambda x: LinearMeasurement(AveragePool(FACTOR), shrink(x)),
        lambda x: enlarge(shrink(x), "nearest"),
        lambda x: enlarge(shrink(x), "bicubic"),
        shrink,
    ),
}


def sample(
    model: ScoreModel, constraint: Constraint, n: int, args: argparse.Namespace, seed: int
) -> Tensor:
    """Sample patches (n, 3, 16, 16) under a constraint."""
    sampler = PCSampler(
        model,
        DDIM(eta=1.0),
        grid=KarrasGrid(to_zero=True),
        steps=args.steps,
        constraint=constraint,
        time_travel=TimeTravel(jump=min(5, args.steps), repeats=args.repeats),
        progress=partial(tqdm, desc="sampling", leave=False),
    )
    return sampler((n, *SHAPE), generator=torch.Generator().manual_seed(seed))


def rmse(x: Tensor, y: Tensor) -> float:
    """Return the root mean squared difference."""
    return float((x - y).square().mean().sqrt())


def task_table(task: Task, truth: Tensor, samples: Sequence[Tensor]) -> str:
    """Return a table of samples and the baseline against the true patches."""
    rows = {"sample": samples[0], "mean of samples": torch.stack(list(samples)).mean(0)}
    rows["baseline, no model"] = task.baseline(truth)
    lines = [f"{'':<20}{'measurement error':>20}{'RMSE':>10}{'energy distance':>18}"]
    for name, x in rows.items():
        error = float((task.measure(x) - task.measure(truth)).abs().max())
        energy = energy_distance(x.flatten(1), truth.flatten(1))
        lines.append(f"{name:<20}{error:>20.1e}{rmse(x, truth):>10.3f}{energy:>18.3f}")
    return "\n".join(lines)


def draw_figure(rows: dict[str, Tensor]) -> Figure:
    """Plot named rows of patches (n, 3, 16, 16)."""
    figure = Figure(figsize=(SHOWN, 1.05 * len(rows)), layout="constrained")
    for ax, (name, x) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        framed = nn.functional.pad(0.5 * (x[:SHOWN].clamp(-1, 1) + 1), (0, 1, 0, 1), value=1.0)
        ax.imshow(rearrange(framed, "n c h w -> h (n w) c").numpy())
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


class Flattened(nn.Module):
    """A network of vectors, applied to flattened patches."""

    def __init__(self, network: nn.Module) -> None:
        """Keep the network."""
        super().__init__()
        self.network = network

    @override
    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        out: Tensor = self.network(x.flatten(1), noise_label)
        return out


def features(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return features for a random forest (n, d): coarse colors and their standard deviations."""
    return np.asarray(torch.cat([shrink(x).flatten(1), x.std((2, 3))], 1).double())


def guided(model: ScoreModel, data: Patches, args: argparse.Namespace) -> Figure:
    """Sample patches of each photograph at several scales; print and plot the results."""
    torch.manual_seed(0)
    classifier = NoiseClassifier(
        Flattened(MLP(3 * SIZE**2, out_features=len(CLASSES), width=128, depth=2)),
        model.sde,
        SIGMA_DATA,
    )
    train_noise_classifier(
        classifier, model.sde, data.train, data.train_labels, steps=args.train_steps,
        times=LogNormalTimes(), progress=partial(tqdm, desc="classifier", leave=False),
    )  # fmt: skip
    forest = RandomForestClassifier(200, random_state=0)
    forest.fit(features(data.train), data.train_labels.numpy())
    accuracy = forest.score(features(data.test), data.test_labels.numpy())
    print(f"\nclasses: a random forest classifies {accuracy:.1%} of the held-out patches correctly")
    print(f"{'scale':<8}{'accuracy':>12}{'precision':>12}{'recall':>12}")
    class_labels, rows = torch.arange(args.patches) % len(CLASSES), {}
    for scale in SCALES:
        sampler = PCSampler(
            ClassifierGuidance(model, classifier, scale), DDIM(eta=0.5), grid=KarrasGrid(),
            steps=args.steps, progress=partial(tqdm, desc="sampling", leave=False),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        x = sampler((len(class_labels), *SHAPE), class_labels=class_labels, generator=generator)
        accuracy = float((forest.predict(features(x)) == class_labels.numpy()).mean())
        near = precision_recall(data.test.flatten(1), x.flatten(1))
        print(
            f"{scale:<8g}{accuracy:>12.1%}{near.precision:>12.1%}{near.recall:>12.1%}", flush=True
        )
        for k, name in enumerate(CLASSES):
            rows[f"{name}, {scale:g}"] = x[class_labels == k]
    return draw_figure(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Train or load the model, and print a table and save a picture of each task."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--train-steps",
        type=positive_int,
        default=1500,
        help="training steps of model and classifier",
    )
    add("--patches", type=positive_int, default=100, help="patches per task")
    add("--samples", type=positive_int, default=3, help="samples per patch")
    add("--steps", type=positive_int, default=40, help="sampler steps")
    add("--repeats", type=positive_int, default=4, help="repeats of time travel")
    add("--folder", type=Path, default=Path("outputs"), help="the output folder")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    data = load()
    model = trained(data.train, args.folder / "photographs.pt", args.train_steps)
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    truth = data.test[rows[: args.patches]]
    for name, task in TASKS.items():
        constraint = task.constraint(truth)
        samples = [sample(model, constraint, len(truth), args, k) for k in range(args.samples)]
        print(f"\n{name.replace('_', '-')}\n{task_table(task, truth, samples)}", flush=True)
        shown = {f"sample {k + 1}": x for k, x in enumerate(samples)}
        picture = draw_figure({"given": task.given(truth), **shown, "truth": truth})
        save(picture, args.folder / f"conditional_{name}.png")
    save(guided(model, data, args), args.folder / "conditional_classes.png")
    print(f"\n{time.perf_counter() - start:.0f} s, pictures {args.folder}/conditional_*.png")


if __name__ == "__main__":
    main()
