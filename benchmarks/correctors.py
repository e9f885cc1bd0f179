"""Compare step sizes of the Langevin corrector in 1 to 3,072 dimensions, with an exact score.

Samples a mixture of two Gaussians with reverse diffusion and one Langevin step at each time, for
VP, sub-VP and VE. Each step size is 2 (snr sigma)^2 times a ratio. Prints the largest relative
error of the standard deviation within a mode, and of the modes' weights.

    python benchmarks/correctors.py [--steps 200] [--snr 0.16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffusionkit import (
    VESDE,
    VPSDE,
    Corrector,
    ForwardSDE,
    GaussianMixtureModel,
    Langevin,
    PCSampler,
    ReverseDiffusion,
    ScoreModel,
    Step,
    SubVPSDE,
)
from diffusionkit.random import Generators, randn_like

SAMPLES = {1: 20_000, 2: 10_000, 8: 5_000, 64: 1_500, 3072: 60}
STDS, WEIGHTS = (0.3, 0.6), (0.35, 0.65)
PROCESSES = (VPSDE(), SubVPSDE(), VESDE(sigma_min=0.01, sigma_max=50.0))

# The ratio for the mean squares e and z, each (B,), of sigma times the score and of the noise.
Ratio = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RatioLangevin(Corrector):
    """Langevin dynamics with a step size of 2 (snr sigma)^2 times a ratio."""

    ratio: Ratio
    snr: float

    @override
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        /,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        _, sigma = model.sde.perturbation_kernel(x, t)
        eps, noise = model.predict(x, t, **cond).eps, randn_like(x, generator)
        ratio = self.ratio(eps.square().mean(1), noise.square().mean(1)).nan_to_num(posinf=0.0)
        step = (self.snr * sigma * ratio.sqrt()).unsqueeze(1)
        mean = x - 2 * step.square() / sigma.unsqueeze(1) * eps
        return Step(mean + 2 * step * noise, mean)


RATIOS: dict[str, Ratio] = {
    "the paper's rule": lambda e, z: z / e,
    "means over the batch": lambda e, z: z.sqrt().mean().div(e.sqrt().mean()).square().expand_as(e),
    "expected norm of the noise": lambda e, z: 1 / e,
    "the same, at most 4": lambda e, z: (1 / e).clamp_max(4.0),
    "annealed": lambda e, z: torch.ones_like(e),
}


def errors(sde: ForwardSDE, d: int, corrector: Corrector | None, steps: int) -> tuple[float, float]:
    """Return the largest relative error of a mode's standard deviation, and of a weight."""
    c = max(0.5, 2 / d**0.5)
    means = torch.tensor([-c, c], dtype=torch.float64).unsqueeze(1).expand(2, d)
    model = GaussianMixtureModel(sde, means, STDS, WEIGHTS)
    sampler = PCSampler(model, ReverseDiffusion(), corrector, steps=steps)
    generator = torch.Generator().manual_seed(0)
    x = sampler((SAMPLES[d], d), generator=generator, dtype=torch.float64)
    upper = x.mean(1) > 0
    parts = zip((~upper, upper), means, STDS, WEIGHTS, strict=True)
    found = [
        (
            float((x[rows] - mean).square().mean().sqrt() / std - 1),
            float(rows.double().mean() / weight - 1),
        )
        for rows, mean, std, weight in parts
    ]
    return max((f[0] for f in found), key=abs), max((f[1] for f in found), key=abs)


def cell(value: float) -> str:
    """Format a relative error."""
    return f"{value:+.1%}" if abs(value) < 10 else f"{value:.0f} times"


def main() -> None:
    """Print the tables of the two errors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--snr", type=float, default=0.16)
    arguments = parser.parse_args()
    correctors: dict[str, Corrector | None] = {"no corrector": None}
    correctors |= {name: RatioLangevin(ratio, arguments.snr) for name, ratio in RATIOS.items()}
    correctors["`Langevin`"] = Langevin(arguments.snr)
    rows: dict[str, list[tuple[float, float]]] = {}
    for name, corrector in correctors.items():
        for d in SAMPLES:
            found = [errors(sde, d, corrector, arguments.steps) for sde in PROCESSES]
            worst = (max((f[0] for f in found), key=abs), max((f[1] for f in found), key=abs))
            rows.setdefault(name, []).append(worst)
    for index, title, dimensions in (
        (0, "standard deviation", list(SAMPLES)),
        (1, "weight", list(SAMPLES)[:-1]),
    ):
        print(f"| error of the {title}, d = | " + " | ".join(f"{d:,}" for d in dimensions) + " |")
        print("|" + "---|" * (len(dimensions) + 1))
        for name, row in rows.items():
            cells = [cell(row[k][index]) for k in range(len(dimensions))]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
