"""Compare the probability-flow likelihood with the algorithm of the released score_sde_pytorch.

The released algorithm, reimplemented: the state flattened on the host in float64, SciPy's RK45 in t
from t_min to T, and two evaluations of the drift at each point, one without gradients for the state
and one with gradients for Hutchinson's estimate of the divergence. Both use the same model, data,
probe and tolerance. Accuracy is measured on a model with exact score against a much tighter
tolerance; time on a small DDPM++ trained briefly on digits.

    python benchmarks/likelihood.py [--rounds 3] [--steps 200] [--tolerance 1e-5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from scipy.integrate import solve_ivp  # type: ignore[import-untyped]
from sklearn.datasets import load_digits
from torch import Tensor

from diffusionkit import (
    VESDE,
    VPSDE,
    EDMModel,
    ForwardSDE,
    GaussianMixtureModel,
    ScoreMatching,
    ScoreModel,
    SubVPSDE,
)
from diffusionkit.likelihood.divergence import Hutchinson
from diffusionkit.likelihood.ode import ODELikelihood
from diffusionkit.networks import DDPMpp

PROCESSES: dict[str, ForwardSDE] = {
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "VE": VESDE(sigma_min=0.01, sigma_max=50.0),
}
BATCH = 8


def seeded() -> torch.Generator:
    """Return the generator of the probe, the same for both algorithms."""
    return torch.Generator().manual_seed(0)


def released(model: ScoreModel, x: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Return log p (B,) and the number of network evaluations of the released algorithm."""
    sde, shape, evaluations = model.sde, x.shape, 0
    probe = Hutchinson().start(x, seeded())[0]

    def drift(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        f, g = sde.drift_coefficient(t), sde.diffusion(t)
        ones = (-1, *(1,) * (x.ndim - 1))
        score: Tensor = model(x, t)
        return f.view(ones) * x - 0.5 * g.view(ones) ** 2 * score

    def rates(t: float, state: np.ndarray) -> np.ndarray:
        sample = torch.from_numpy(state[: x.numel()]).view(shape).to(x.dtype)
        times = torch.full((len(x),), t, dtype=x.dtype)
        with torch.no_grad():
            velocity = drift(sample, times)
        with torch.enable_grad():
            sample.requires_grad_()
            inner = (drift(sample, times) * probe).sum()
            (gradient,) = torch.autograd.grad(inner, sample)
        divergence = (gradient * probe).flatten(1).sum(1)
        return np.concatenate([velocity.double().flatten(), divergence.double()])

    start = np.concatenate([x.double().flatten(), np.zeros(len(x))])
    span = (sde.t_min, sde.T)
    end = solve_ivp(rates, span, start, method="RK45", rtol=tolerance, atol=tolerance).y[:, -1]
    latent = torch.from_numpy(end[: x.numel()]).view(shape)
    log_prob: Tensor = sde.prior_log_prob(latent) + torch.from_numpy(end[x.numel() :])
    return log_prob, evaluations


def ours(model: ScoreModel, x: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Return log p (B,) and the number of network evaluations."""
    result = ODELikelihood(model, rtol=tolerance, atol=tolerance)(x, generator=seeded())
    return result.log_prob, result.nfe


def mixture(sde: ForwardSDE) -> tuple[ScoreModel, Tensor]:
    """Return a mixture of three image-shaped Gaussians and samples of it at t_min."""
    means = 0.5 * torch.randn((3, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    model = GaussianMixtureModel(sde, means, [0.1, 0.2, 0.3])
    x = model.sample(BATCH, generator=seeded(), dtype=torch.float64)
    return model, sde.perturb(x, torch.full((BATCH,), sde.t_min), generator=seeded()).x


def trained(sde: ForwardSDE, steps: int) -> tuple[ScoreModel, Tensor]:
    """Return a DDPM++ briefly trained on digits, and dequantized digits."""
    torch.manual_seed(0)
    pixels = torch.from_numpy(load_digits().images).float().unsqueeze(1)
    data = (pixels + torch.rand_like(pixels)) * (2 / 17) - 1
    network = DDPMpp(channels=1, width=16, multipliers=(1, 2), blocks=1, dropout=0.0)
    # EDMModel's noise label varies slowly. With 999 t, a briefly trained network still oscillates
    # with the 160 periods of the embedding, and these dominate the solver's cost.
    model = EDMModel(network, sde)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        x = data[torch.randint(len(data), (64,))]
        optimizer.zero_grad()
        ScoreMatching()(model, x).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval(), data[:BATCH]


def row(
    name: str, model: ScoreModel, x: Tensor, rounds: int, tolerance: float, exact: Tensor | None
) -> str:
    """Run both algorithms alternately and return a row of the table."""
    algorithms = (ours, released)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        found = []
        for algorithm, elapsed in zip(algorithms, times, strict=True):
            start = time.perf_counter()
            found.append(algorithm(model, x, tolerance))
            elapsed.append(1e3 * (time.perf_counter() - start))
    (a, evaluations_a), (b, evaluations_b) = found
    d = x[0].numel()
    faster = statistics.median(theirs / own for own, theirs in zip(*times, strict=True))
    errors = ["" if exact is None else f"{float((v - exact).abs().mean()) / d:.1e}" for v in (a, b)]
    return (
        f"| {name} | {float(a.mean()) / d:.5f} | {float(b.mean()) / d:.5f} "
        f"| {float((a - b).abs().mean()) / d:.1e} | {errors[0]} | {errors[1]} "
        f"| {evaluations_a} | {evaluations_b} | {evaluations_b / evaluations_a:.2f} "
        f"| {statistics.median(times[0]):.0f} | {statistics.median(times[1]):.0f} | {faster:.2f} |"
    )


def main() -> None:
    """Print nats per dimension, evaluations and times of both algorithms for three processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    arguments = parser.parse_args()
    rounds, tolerance = arguments.rounds, arguments.tolerance
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, tolerance {tolerance:g};")
    print(
        f"log p in nats per dimension, batch {BATCH}, medians of {rounds} rounds, paired ratios\n"
    )
    print("| model | ours | released | mean abs. difference | our error | released error "
          "| our NFE | released NFE | ratio | our ms | released ms | ratio |")  # fmt: skip
    print("|" + "---|" * 12)
    for name, sde in PROCESSES.items():
        model, x = mixture(sde)
        tight = ODELikelihood(model, method="dopri8", rtol=1e-9, atol=1e-9)
        exact = tight(x, generator=seeded()).log_prob
        print(row(f"{name}, mixture", model, x, rounds, tolerance, exact), flush=True)
    for name, sde in PROCESSES.items():
        model, x = trained(sde, arguments.steps)
        print(row(f"{name}, DDPM++", model, x, rounds, tolerance, None), flush=True)


if __name__ == "__main__":
    main()
