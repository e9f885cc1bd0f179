"""Draw samples of posteriors in the plane by several methods, and compare them with exact ones.

The data are a spiral of Gaussians with its exact score, so no training error affects the
comparison. In the first row the first coordinate is measured, in the second the distance from a
point, both with noise. The exact posterior is drawn by resampling data with their likelihood. It
prints the energy distance of each method to it, and saves a picture, `outputs/posteriors.png`.
Runtime: half a minute on one CPU core; the second command takes two seconds.

    python examples/posteriors.py
    python examples/posteriors.py --steps 10 --samples 100
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from helpers import argument_parser, energy_distance, picture_path, positive_int, save
from matplotlib.figure import Figure
from torch import Tensor

from diffusionkit import (
    VPSDE,
    Ancestral,
    GaussianMixtureModel,
    GradientGuidance,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    LogSNRGrid,
    PCSampler,
    PseudoinverseGuidance,
    ScoreModel,
)

NOISE = 0.1
CENTER = torch.tensor([0.9, 0.6])


class Problem(NamedTuple):
    """A measurement, and models guided by it."""

    measure: Callable[[Tensor], Tensor]
    y: Tensor
    methods: dict[str, ScoreModel]


def spiral() -> GaussianMixtureModel:
    """Return the exact model of 24 Gaussians along a spiral."""
    turn = torch.linspace(1.0, 4.4, 24) * torch.pi / 1.6
    means = 0.14 * turn.unsqueeze(1) * torch.stack([turn.cos(), turn.sin()], 1)
    return GaussianMixtureModel(VPSDE(), means, torch.full((24,), 0.06))


def first(x0: Tensor) -> Tensor:
    """Return the first coordinate (B, 1)."""
    return x0[:, :1]


def distance(x0: Tensor) -> Tensor:
    """Return the distance from a point (B, 1)."""
    return (x0 - CENTER.to(x0)).square().sum(1, keepdim=True).sqrt()


def problems(model: GaussianMixtureModel) -> list[Problem]:
    """Return the two measurements with their methods."""

    def likelihood(measure: Callable[[Tensor], Tensor], y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x0: -0.5 * ((y - measure(x0)) / NOISE).square().sum(1)

    y, far = torch.tensor([[0.35]]), torch.tensor([[1.1]])
    std = float(model.sample(4000, generator=torch.Generator().manual_seed(3)).std())
    linear: dict[str, ScoreModel] = {
        "LinearGaussianGuidance (MMPS)": LinearGaussianGuidance(model, first, y, NOISE),
        "PseudoinverseGuidance (PiGDM)": PseudoinverseGuidance(model, first, y, NOISE, std),
        "GradientGuidance (DPS)": GradientGuidance(model, likelihood(first, y)),
    }
    nonlinear: dict[str, ScoreModel] = {
        "LinearizedGaussianGuidance": LinearizedGaussianGuidance(model, distance, far, NOISE),
        "GradientGuidance (DPS)": GradientGuidance(model, likelihood(distance, far)),
    }
    return [Problem(first, y, linear), Problem(distance, far, nonlinear)]


def exact(model: GaussianMixtureModel, problem: Problem, n: int) -> Tensor:
    """Return samples (n, 2) of the posterior: data, resampled with their likelihood."""
    generator = torch.Generator().manual_seed(1)
    x = model.sample(100_000, generator=generator)
    logs = -0.5 * ((problem.y - problem.measure(x)) / NOISE).square().sum(1)
    return x[torch.multinomial(logs.softmax(0), n, replacement=True, generator=generator)]


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, print the table and draw."""
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=positive_int, default=1000)
    parser.add_argument("--steps", type=positive_int, default=200)
    parser.add_argument("--output", type=picture_path, default="outputs/posteriors.png")
    args = parser.parse_args(argv)
    model = spiral()
    data = model.sample(3000, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    for row, problem in zip(axes, problems(model), strict=True):
        right = exact(model, problem, args.samples)
        found = {"exact": right}
        for name, guided in problem.methods.items():
            sampler = PCSampler(guided, Ancestral(), steps=args.steps, grid=LogSNRGrid())
            x = sampler((args.samples, 2), generator=torch.Generator().manual_seed(2))
            found[name] = x
            print(f"{name:32}{energy_distance(x, right):8.4f}", flush=True)
        for ax, (name, x) in zip(row, found.items(), strict=False):
            ax.plot(*data.T, ".", color="0.85", markersize=1, rasterized=True)
            ax.plot(*x.T, ".", color="C3" if name == "exact" else "C0", markersize=1.5)
            ax.set(
                title=name,
                aspect="equal",
                xlim=(-1.25, 1.25),
                ylim=(-1.1, 1.4),
                xticks=[],
                yticks=[],
            )
            ax.title.set_fontsize(9)
        for ax in row[len(found) :]:
            ax.axis("off")
    save(figure, args.output)


if __name__ == "__main__":
    main()
