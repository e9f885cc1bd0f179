"""Measure seams of multi-diffusion on a Gaussian field, without sampling error.

The exact model of 64-point patches of a stationary Gaussian series is turned into a model of 256
periodic points. Model and sampler are linear, so their samples are M z with noise z, and all their
statistics follow from M: the variance of the difference of neighbors at every point, which peaks
where windows end, and the power at every wavelength. Both are divided by the true ones. It prints a
table and saves a picture, `outputs/seams.png`. Runtime: a minute on one CPU core.

    python examples/seams.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import argument_parser, picture_path, positive_int, report, save
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from diffusionkit import (
    VPSDE,
    DPMSolver3M,
    ForwardSDE,
    LogSNRGrid,
    PatchedModel,
    PCSampler,
    Prediction,
    ScoreModel,
    expand,
)

FIELD, PATCH = 256, 64
LENGTH = 8.0  # of correlations, in points
STEPS = 40
OVERLAPS = (0, 8, 16, 32)
WAVELENGTHS = (16, 32, 64, 128)


def covariance(lag: Tensor) -> Tensor:
    """Return the Matern covariance of smoothness 3/2 and variance 1 at lags in points."""
    far = lag.abs() / LENGTH
    return (1 + far) * torch.exp(-far)


class GaussianSeries(ScoreModel):
    """The exact model of Gaussian series (B, 1, n): x0 = alpha K (alpha^2 K + sigma^2)^-1 x.

    Args:
        sde: the process.
        matrix: the covariance K (n, n).
    """

    def __init__(self, sde: ForwardSDE, matrix: Tensor) -> None:
        super().__init__()
        self.sde = sde
        self.values, self.vectors = torch.linalg.eigh(matrix)

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        alpha, sigma = self.sde.perturbation_kernel(x, t)
        a, s = expand(alpha, x), expand(sigma, x)
        modes = a * self.values / (a**2 * self.values + s**2) * (x @ self.vectors)
        return Prediction.from_x0(x, modes @ self.vectors.T, alpha, sigma)


class Statistics(NamedTuple):
    """Statistics of a sampler's fields, over that of the data.

    Args:
        differences: the variance (n,) of the difference of each point and the next.
        power: the variance (n,) of the field's Fourier coefficients.
        cost: the points that are evaluated, over those of the field.
    """

    differences: Tensor
    power: Tensor
    cost: float


def statistics(model: ScoreModel, matrix: Tensor, cost: float) -> Statistics:
    """Return the statistics of the fields that a linear model's sampler draws.

    Args:
        model: the model.
        matrix: the covariance (n, n) of the data, which are periodic.
        cost: the cost of the model.
    """
    start = torch.eye(FIELD, dtype=torch.float64)[:, None] * model.sde.prior_std
    sampler = PCSampler(model, DPMSolver3M(), grid=LogSNRGrid(), steps=STEPS)
    x = sampler(start)[:, 0]  # a row for each number of the noise
    differences = (x.roll(-1, 1) - x).square().sum(0) / (2 * (matrix[0, 0] - matrix[0, 1]))
    power = torch.fft.fft(x, dim=1, norm="ortho").abs().square().sum(0)
    return Statistics(differences, power / torch.fft.fft(matrix[0]).real, cost)


def compared(overlaps: Sequence[int]) -> dict[str, Statistics]:
    """Return the statistics of the whole field and of models of patches, by name."""
    sde, at = VPSDE(), torch.arange(FIELD, dtype=torch.float64)
    lag = at[:, None] - at
    matrix = covariance(torch.minimum(lag.abs(), FIELD - lag.abs()))
    patches = GaussianSeries(sde, covariance(lag[:PATCH, :PATCH]))
    found = {"the whole field": statistics(GaussianSeries(sde, matrix), matrix, 1.0)}
    for overlap in overlaps:
        kinds: dict[str, dict[str, Any]] = {
            "uniform": {"blend": "uniform", "margin": 0},
            "cosine": {"margin": 0},
            "cosine, margin": {},
            "cosine, margin, shift": {"shift": True},
        }
        if not overlap:
            kinds = {"side by side": {}, "side by side, shift": {"shift": True}}
        for name, kind in kinds.items():
            model = PatchedModel(patches, PATCH, overlap, periodic=True, batch=512, **kind)
            windows = -(-FIELD // (PATCH - overlap))
            found[f"{overlap}, {name}"] = statistics(model, matrix, windows * PATCH / FIELD)
    return found


def table(found: dict[str, Statistics]) -> list[str]:
    """Return a table of seams and powers."""
    powers = " | ".join(f"power at {w}" for w in WAVELENGTHS)
    lines = [
        f"| overlap, blending | cost | worst difference | median | {powers} |",
        "|---|---|---|---|" + "---|" * len(WAVELENGTHS),
    ]
    for name, one in found.items():
        values = [one.differences.max(), one.differences.median()]
        values += [one.power[FIELD // w] for w in WAVELENGTHS]
        cells = [f"{one.cost:.2f}", *(f"{float(value):.3f}" for value in values)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw_figure(found: dict[str, Statistics]) -> Figure:
    """Draw the variance of differences along the field, and the power against the wavelength."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, one in found.items():
        if name.startswith("0") or name in ("16, uniform", "16, cosine", "16, cosine, margin"):
            k = torch.arange(1, FIELD // 4)
            left.plot(one.differences.numpy(), label=name, linewidth=1)
            right.plot((FIELD / k).numpy(), one.power[k].numpy(), label=name)
    left.set(xlabel="point", yscale="log", title="variance of the difference of neighbors")
    right.set(xlabel="wavelength in points", xscale="log", ylim=(0.8, 1.5), title="power")
    right.axvline(PATCH, color="0.7", linewidth=1)
    for ax in (left, right):
        ax.axhline(1, color="0.7", linewidth=1, zorder=0)
        ax.set_ylabel("over that of the data")
        ax.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize="small")
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--overlaps", type=positive_int, nargs="*", default=OVERLAPS[1:], help="overlaps in points")
    add("--output", type=picture_path, default="outputs/seams.png", help="path of the figure")
    add("--table", type=Path, default="outputs/seams.md", help="path of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and save it and the picture."""
    args = options(argv)
    found = compared([0, *args.overlaps])
    report(table(found), args.table)
    save(draw_figure(found), args.output)
    print(f"picture {args.output}")


if __name__ == "__main__":
    main()
