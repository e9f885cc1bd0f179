"""Compare the spread of `NELBO` for plain draws, control variates, and adaptive strata.

The spread is the standard deviation over repeated estimates for the same data, at equal
evaluations. Plain draws are the same code with more draws required for control variates than are
made, and equal strata the same code without a pilot. Exact scores of a Gaussian
and of a mixture, and a small network trained on digits.

    python benchmarks/bound_noise.py [--samples 100 300 1000] [--repeats 200] [--steps 1500]
"""

from __future__ import annotations

import argparse
import math
from unittest import mock

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from diffusionkit import (
    NELBO,
    VESDE,
    VPSDE,
    EDMModel,
    ForwardSDE,
    GaussianMixtureModel,
    ScoreMatching,
    ScoreModel,
    SubVPSDE,
)
from diffusionkit.likelihood import _control_variates, nelbo
from diffusionkit.networks import MLP

PROCESSES: dict[str, ForwardSDE] = {
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "VE": VESDE(sigma_min=0.01, sigma_max=50.0),
}


def gaussian(sde: ForwardSDE) -> tuple[ScoreModel, Tensor]:
    """Return a Gaussian in 64 dimensions and one draw of it."""
    x = 0.5 * torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    return GaussianMixtureModel(sde, torch.zeros(1, 64), [0.5]), x


def mixture(sde: ForwardSDE) -> tuple[ScoreModel, Tensor]:
    """Return a mixture of eight Gaussians in 64 dimensions and one draw of it."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, 64, generator=generator)
    x = means[:1] + 0.2 * torch.randn(1, 64, generator=generator)
    return GaussianMixtureModel(sde, means, [0.2] * 8), x


def trained(sde: ForwardSDE, steps: int) -> tuple[ScoreModel, Tensor]:
    """Return a network trained on dequantized digits, and one digit."""
    torch.manual_seed(0)
    pixels = torch.from_numpy(load_digits().data).float()
    data = (pixels + torch.rand_like(pixels)) * (2 / 17) - 1
    model = EDMModel(MLP(64, width=256), sde)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        x = data[torch.randint(len(data), (128,))]
        optimizer.zero_grad()
        ScoreMatching()(model, x).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval(), data[:1]


@torch.no_grad()
def spread(model: ScoreModel, x: Tensor, samples: int, repeats: int) -> tuple[float, float]:
    """Return the standard deviation over repeated bounds and the mean they state."""
    many = x.double().expand(repeats, -1).contiguous()
    bound = NELBO(model, samples=samples)(many, generator=torch.Generator().manual_seed(1))
    if bound.stderr is None:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    return float(bound.nats.std()), float(bound.stderr.square().mean().sqrt())


def main() -> None:
    """Print a table of standard errors in nats per dimension."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    print(
        "standard error in nats per dimension: that of NELBO, its ratio to plain draws, the ratio "
        "of control variates alone, and stderr over the spread\n"
    )
    print("| model |" + "".join(f" {n} draws |" for n in arguments.samples))
    print("|" + "---|" * (1 + len(arguments.samples)))
    for name, sde in PROCESSES.items():
        problems = {
            "Gaussian": gaussian(sde),
            "mixture": mixture(sde),
            "digits network": trained(sde, arguments.steps),
        }
        for kind, (model, x) in problems.items():
            cells = []
            for samples in arguments.samples:
                with mock.patch.object(nelbo, "pilot_draws", return_value=0):
                    with mock.patch.object(_control_variates, "LEAST", 10**9):
                        plain, _ = spread(model, x, samples, arguments.repeats)
                    controlled, _ = spread(model, x, samples, arguments.repeats)
                found, stated = spread(model, x, samples, arguments.repeats)
                cells.append(
                    f" {found / math.prod(x.shape):.5f}, {found / plain:.3f}, "
                    f"{controlled / plain:.3f}, {stated / found:.2f} |"
                )
            print(f"| {name}, {kind} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
