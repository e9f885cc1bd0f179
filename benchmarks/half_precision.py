"""Measure samplers of networks in half precision against exact standard deviations.

The network is the exact noise predictor of N(0, 1/4) data; it rounds its input and its output to
float32, bfloat16 or float16. All samplers are then linear in the state and in the noise, so that
the exact standard deviation of their samples on the same grid is the norm of their responses to
unit impulses, computed in float64. Prints the deviations from it in percent, for three processes;
the standard error of each is 100 / sqrt(2 n) percent.

    python benchmarks/half_precision.py [--steps 200] [--n 1048576] [--device cpu]
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    Corrector,
    DPMSolver2M,
    DPMSolver2MSDE,
    EpsModel,
    EulerMaruyama,
    ForwardSDE,
    Heun,
    KarrasGrid,
    Langevin,
    PCSampler,
    Predictor,
    ReverseDiffusion,
    StochasticHeun,
    UniformGrid,
    UniPC,
)
from diffusionkit.random import NoisePath

STD = 0.5  # of the data
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROCESSES = {"VP": VPSDE(), "VE": VESDE(0.01, 50.0), "EDM": EDMSDE()}
SAMPLERS: list[tuple[Predictor, Corrector | None]] = [
    (Ancestral(), None),
    (ReverseDiffusion(), None),
    (EulerMaruyama(), None),
    (StochasticHeun(), None),
    (DPMSolver2MSDE(), None),
    (DDIM(), None),
    (Heun(), None),
    (DPMSolver2M(), None),
    (DEIS(), None),
    (UniPC(), None),
    (ReverseDiffusion(), Langevin()),
    (Ancestral(), AnnealedLangevin()),
]


class Network(nn.Module):
    """The noise predictor of Gaussian data, with its input and output rounded to a dtype."""

    def __init__(self, sde: ForwardSDE, dtype: torch.dtype) -> None:
        super().__init__()
        self.sde = sde
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return sigma / (alpha^2 STD^2 + sigma^2) x."""
        alpha, sigma = self.sde.marginal(t.double())
        slope = sigma / ((alpha * STD) ** 2 + sigma**2)
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return (slope.to(wide.dtype).view(-1, *(1,) * (x.ndim - 1)) * wide).to(x.dtype)


def model_of(sde: ForwardSDE, dtype: torch.dtype, device: str = "cpu") -> EpsModel:
    """Return the exact model with a network in a dtype."""
    return EpsModel(Network(sde, dtype).to(device), sde, label=lambda sde, t: t)


class Impulses(NoisePath):
    """Noise that is 1 for one sample and 0 for all others, another one in each draw."""

    def __init__(self, n: int) -> None:
        self.n, self.draws = n, 0

    @override
    def __len__(self) -> int:
        return self.n

    @override
    def __getitem__(self, index: Any) -> Any:
        return torch.Generator()

    @override
    def increment(self, x: Tensor, sde: Any, t: Tensor, s: Tensor) -> Tensor:
        """Return the next impulse, like x."""
        self.draws += 1
        noise = torch.zeros_like(x)
        noise[self.draws] = 1.0
        return noise


def exact_std(
    model: EpsModel, predictor: Predictor, corrector: Corrector | None, grid: Tensor
) -> float:
    """Return the standard deviation of samples, in float64.

    The first sample is the response to the initial state, each other that to one draw of noise. In
    one dimension the step of `Langevin` is that of `AnnealedLangevin` within 1e-3.
    """
    count = 2 * len(grid)
    noise, sde = Impulses(count), model.sde
    x = torch.zeros(count, 1, dtype=torch.float64)
    x[0] = sde.prior_std
    state = None
    for t, s in itertools.pairwise(grid):
        t, s = t.expand(count), s.expand(count)
        if corrector is not None:
            pull = 2 * corrector.snr**2  # type: ignore[attr-defined]
            alpha, sigma = sde.perturbation_kernel(x, t)
            x = model.predict(x, t).combine(x=1 - pull, x0=pull * alpha)
            spread = math.sqrt(2 * pull) * sigma[:1]
            x = x + spread * noise.increment(x, sde, t, s)
        step = predictor.step(model, x, t, s, state, generator=noise)
        x, state = step.x, step.state
    return float(model.predict(x, grid[-1].expand(count)).x0.norm())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--n", type=int, default=2**20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(f"percent off, {arguments.steps} steps, n = {arguments.n}, {arguments.device}\n")
    names = [f"{p}, {str(d).removeprefix('torch.')}" for p in PROCESSES for d in DTYPES]
    print("| sampler |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    for predictor, corrector in SAMPLERS:
        row = []
        for name, sde in PROCESSES.items():
            grid = KarrasGrid() if name == "EDM" else UniformGrid()
            times = grid(sde, arguments.steps)
            right = exact_std(model_of(sde, torch.float64), predictor, corrector, times)
            for dtype in DTYPES:
                model = model_of(sde, dtype, arguments.device)
                # One dimension for each sample, so that Langevin's norms are those of one number.
                sampler = PCSampler(model, predictor, corrector, grid=times)
                x = sampler((arguments.n, 1), generator=seeded(arguments.device))
                row.append(f"{100 * (float(x.double().std()) / right - 1):+.2f}")
        label = type(predictor).__name__
        label += "" if corrector is None else f" + {type(corrector).__name__}"
        print(f"| {label} |", " | ".join(row), "|", flush=True)


def seeded(device: str) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator(device).manual_seed(0)


if __name__ == "__main__":
    main()
