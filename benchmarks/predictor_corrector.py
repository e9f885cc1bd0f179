"""Compare predictor-corrector with the predictor alone at equal evaluations, with an exact score.

Samples a mixture of ten Gaussians in 64 dimensions with a predictor alone (N steps) and with a
Langevin corrector (N / 2 steps). Prints the energy distance of 2000 samples to 2000 exact samples:
mean ± standard error over seeds. The floor is the distance between two exact sets.

    python benchmarks/predictor_corrector.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from diffusionkit import (
    VESDE,
    VPSDE,
    Ancestral,
    ForwardSDE,
    GaussianMixtureModel,
    Langevin,
    PCSampler,
    Predictor,
    ReverseDiffusion,
    SubVPSDE,
)

SAMPLES, DIMENSIONS, MODES = 2000, 64, 10
PROCESSES: dict[str, ForwardSDE] = {
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "VE": VESDE(sigma_min=0.01, sigma_max=20.0),
}
PREDICTORS: dict[str, Predictor] = {
    "reverse diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
}
SNRS = (0.1, 0.16)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased."""
    n, m = len(x), len(y)
    within = [torch.cdist(z, z).sum() / (k * (k - 1)) for z, k in ((x, n), (y, m))]
    return float(2 * torch.cdist(x, y).mean() - within[0] - within[1])


def mixture(sde: ForwardSDE) -> GaussianMixtureModel:
    """Return a mixture of ten modes of different weights and widths."""
    generator = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn((MODES, DIMENSIONS), generator=generator)
    stds = torch.linspace(0.05, 0.3, MODES)
    return GaussianMixtureModel(sde, means, stds, torch.linspace(1, 3, MODES))


def distance(model: GaussianMixtureModel, sampler: PCSampler | None, seed: int) -> float:
    """Return the energy distance of a sampler, or of exact samples, to exact samples."""
    generator = torch.Generator().manual_seed(seed)
    truth = model.sample(SAMPLES, generator=generator)
    if sampler is None:
        return energy_distance(model.sample(SAMPLES, generator=generator), truth)
    return energy_distance(sampler((SAMPLES, DIMENSIONS), generator=generator), truth)


def cell(values: list[float]) -> str:
    """Format mean and standard error in thousandths."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{1e3 * statistics.mean(values):.1f} ± {1e3 * error:.1f}"


def main() -> None:
    """Print the table of all processes and predictors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[51, 101, 201])
    arguments = parser.parse_args()
    heads = ["predictor only", *(f"PC, snr {snr:g}" for snr in SNRS)]
    print("Energy distance to exact samples, in thousandths.\n")
    print("| process | predictor | evaluations | " + " | ".join(heads) + " | floor |")
    print("|" + "---|" * (len(heads) + 4))
    for process, sde in PROCESSES.items():
        model = mixture(sde)
        floor = cell([distance(model, None, seed) for seed in range(arguments.seeds)])
        for name, predictor in PREDICTORS.items():
            for n in arguments.evaluations:
                samplers = [PCSampler(model, predictor, steps=n - 1)]
                samplers += [
                    PCSampler(model, predictor, Langevin(snr), steps=(n - 1) // 2) for snr in SNRS
                ]
                cells = [
                    cell([distance(model, sampler, seed) for seed in range(arguments.seeds)])
                    for sampler in samplers
                ]
                print(f"| {process} | {name} | {n} | " + " | ".join(cells) + f" | {floor} |")


if __name__ == "__main__":
    main()
