"""Measure the solver's error and the probes' noise of `ODELikelihood`: the tables of the docs.

A network trained on digits and a mixture of eight, on VP in 64 dimensions. The second table has
variances of traces of the Jacobian, integrated over the angle along straight paths from data to
noise, relative to Rademacher probes at equal numbers of products.

    python benchmarks/likelihood_noise.py [--steps 1500] [--save]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bound_noise import mixture, trained
from side_by_side import TABLES
from sklearn.datasets import load_digits
from torch import Tensor

from diffusionkit import (
    VPSDE,
    ExactDivergence,
    GaussianMixtureModel,
    Hutchinson,
    ODELikelihood,
    ScoreModel,
)

DIGITS, PROBES, DRAWS = 16, 64, 200


def seeded() -> torch.Generator:
    """Return a new generator."""
    return torch.Generator().manual_seed(0)


def digits() -> Tensor:
    """Return dequantized digits (n, 64)."""
    pixels = torch.from_numpy(load_digits().data).double()
    noise = torch.rand(pixels.shape, generator=seeded(), dtype=pixels.dtype)
    return (pixels + noise) * (2 / 17) - 1


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.square().mean().sqrt())


def tolerances(model: ScoreModel, x: Tensor) -> str:
    """Return the table of the solver's error with the noise of 1, 8 and 64 probes."""
    d = x.shape[1]
    exact_trace = ExactDivergence()
    tight = ODELikelihood(model, divergence=exact_trace, method="dopri8", rtol=1e-7, atol=1e-7)
    exact = tight(x).log_prob
    probes = ODELikelihood(model, divergence=Hutchinson(PROBES), rtol=1e-3, atol=1e-3)
    stderr = probes(x, generator=seeded()).stderr
    if stderr is None:
        raise RuntimeError(f"expected a standard error of {PROBES} probes, got none")
    one = rms(stderr) * PROBES**0.5 / d
    lines = [
        "| tolerance | evaluations | error of the solver | with the noise of 1 probe | 8 probes "
        "| 64 probes |",
        "|---|---|---|---|---|---|",
    ]
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        likelihood = ODELikelihood(
            model, divergence=ExactDivergence(), rtol=tolerance, atol=tolerance
        )
        found = likelihood(x)
        error = rms(found.log_prob - exact) / d
        cells = [f"{(error**2 + one**2 / k) ** 0.5:.3f}".lstrip("0") for k in (1, 8, 64)]
        lines.append(f"| {tolerance:.0e} | {found.nfe} | {error:.1e} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("e-0", "e-")


def jacobians(model: ScoreModel, x: Tensor) -> Tensor:
    """Return the symmetric parts (n, d, d) of the velocity's Jacobians, integrated."""
    sde, total = model.sde, torch.zeros(len(x), x.shape[1], x.shape[1], dtype=x.dtype)
    eps = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    for level in torch.linspace(10.0, -6.0, 17, dtype=torch.float64):
        t = sde.time_at_log_snr(level.view(1))
        alpha, sigma = sde.marginal(t)
        r = torch.hypot(alpha, sigma)
        states, times = alpha * x + sigma * eps, t.expand(len(x))

        def velocity(y: Tensor, times: Tensor = times) -> Tensor:
            return model.predict(y, times).v.sum(0)  # the rows of a batch are independent

        found = torch.autograd.functional.jacobian(velocity, states)  # type: ignore[no-untyped-call]
        rows = r * found.transpose(0, 1)
        # d theta = d level / (4 cosh(level / 2))
        total += rows / (4 * torch.cosh(level / 2))
    return 0.5 * (total + total.mT)


def off_diagonal(a: Tensor) -> Tensor:
    """Return the variances (n,) of a Rademacher probe, over 2."""
    return a.square().sum((1, 2)) - a.diagonal(dim1=1, dim2=2).square().sum(1)


def hutch_pp(a: Tensor, products: int) -> Tensor:
    """Return the variance of Hutch++ (n,): a third of the products each for its three parts."""
    n, d, k = len(a), a.shape[1], products // 3 or 1
    traces = []
    generator = seeded()
    for _ in range(DRAWS):
        s, g = (torch.randn(2, n, d, k, generator=generator, dtype=a.dtype).sign()).unbind()
        q = torch.linalg.qr(a @ s).Q
        rest = g - q @ (q.mT @ g)
        inside, outside = ((v * (a @ v)).sum((1, 2)) for v in (q, rest))
        traces.append(inside + outside / k)
    return torch.stack(traces).var(0)


def orthogonal(a: Tensor, products: int) -> Tensor:
    """Return the variance (n,) of the mean over orthogonal Gaussian directions."""
    generator, traces = seeded(), []
    for _ in range(DRAWS):
        g = torch.randn(len(a), a.shape[1], products, generator=generator, dtype=a.dtype)
        q = torch.linalg.qr(g).Q
        traces.append((q * (a @ q)).sum((1, 2)) * a.shape[1] / products)
    return torch.stack(traces).var(0)


def ratios(a: Tensor, data: Tensor) -> dict[str, list[float]]:
    """Return mean variances relative to Rademacher probes, by the kind of probe."""
    plain = off_diagonal(a)
    own = float(plain.mean())
    half = len(a) // 2
    axes = torch.linalg.eigh(torch.cov(data.T)).eigenvectors
    fitted = torch.linalg.eigh(a[:half].mean(0)).eigenvectors
    within = (3, 6, 12, 24)

    def against(variance: Callable[[Tensor, int], Tensor]) -> list[float]:
        return [float(variance(a, m).mean()) / (2 * own / m) for m in within]

    return {
        "Gaussian probes": [float(a.square().sum((1, 2)).mean()) / own],
        "Hutch++, 3 to 24 products": against(hutch_pp),
        "orthogonal Gaussian probes, 3 to 24": against(orthogonal),
        "probes in the basis of the data's principal components": [
            float(off_diagonal(axes.T @ a @ axes).mean()) / own
        ],
        "probes in a basis fitted to other samples' Jacobians": [
            float(off_diagonal(fitted.T @ a[half:] @ fitted).mean()) / float(plain[half:].mean())
        ],
    }


def short(values: list[float]) -> str:
    """Return the range of numbers with two digits."""

    def text(value: float) -> str:
        return f"{value:.0f}" if value >= 10 else f"{value:.2g}".removeprefix("0")

    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def probe_table(problems: dict[str, tuple[ScoreModel, Tensor]]) -> str:
    """Return the table of variances by the kind of probe and problem."""
    found = {name: ratios(jacobians(model, x[:DIGITS]), x) for name, (model, x) in problems.items()}
    lines = ["| | " + " | ".join(found) + " |", "|" + "---|" * (1 + len(found))]
    for kind in next(iter(found.values())):
        lines.append(f"| {kind} | " + " | ".join(short(v[kind]) for v in found.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables, and save them for the docs if requested."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--save", action="store_true", help="save the tables for the docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = trained(VPSDE(), arguments.steps)
    model, x = model.double(), digits()
    oracle, _ = mixture(VPSDE())
    if not isinstance(oracle, GaussianMixtureModel):
        raise TypeError(f"oracle: expected a mixture, got {type(oracle).__name__}")
    drawn = oracle.sample(400, generator=seeded(), dtype=torch.float64)
    problems: dict[str, tuple[ScoreModel, Tensor]] = {
        "digits network": (model, x),
        "mixture": (oracle, drawn),
    }
    tables: dict[str, Callable[[], str]] = {
        "likelihood_tolerance": lambda: tolerances(model, x[:DIGITS]),
        "likelihood_probes": lambda: probe_table(problems),
    }
    for name, make in tables.items():
        table = make()
        print(f"{table}\n", flush=True)
        if arguments.save:
            (TABLES / f"{name}.md").write_text(f"{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
