"""Errors of posterior samplers for inverse problems whose posteriors are known.

Data are a correlated Gaussian in four dimensions, or a mixture of five Gaussians in eight, with
exact models of both. Measurements y = A x0 + noise are drawn from data, so that the exact posterior
of each is a Gaussian or a mixture in closed form. Every method draws 500 samples for each of 16
measurements. Two numbers are printed, with the root mean square over measurements above and below
the line:

- the distance of the samples' mean to the posterior's, over the posterior's standard deviation,
- the Frobenius norm of the error of their covariance, over that of the posterior's covariance.

Two smaller problems follow: a known coordinate without noise, and a nonlinear measurement.

    python benchmarks/inverse_problems.py [--process VP] [--save docs/tables]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    FlowMatchingSDE,
    ForwardSDE,
    GaussianMixtureModel,
    GradientGuidance,
    Inpainting,
    KarrasGrid,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    LogSNRGrid,
    PCSampler,
    Prediction,
    PseudoinverseGuidance,
    ScoreModel,
    TimeTravel,
)

SAMPLES, MEASUREMENTS, DOUBLE = 500, 16, torch.float64
STEPS = (25, 100, 400)
PROCESSES: dict[str, ForwardSDE] = {
    "VP": VPSDE(),
    "VE": VESDE(0.01, 50.0),
    "EDM": EDMSDE(),
    "flow": FlowMatchingSDE(),
}


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=seeded(seed), dtype=DOUBLE)


class GaussianModel(ScoreModel):
    """The exact model of data from N(mean, cov)."""

    def __init__(self, sde: ForwardSDE, mean: Tensor, cov: Tensor) -> None:
        """Keep the eigenvectors of the covariance."""
        super().__init__()
        self.sde, self.mean = sde, mean
        self.variances, self.axes = torch.linalg.eigh(cov)

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        """Predict data and noise of states (B, d)."""
        alpha, sigma = (c.unsqueeze(1) for c in self.sde.marginal(t.double()))
        white = (x.double() - alpha * self.mean) @ self.axes
        white = white / (alpha**2 * self.variances + sigma**2)
        x0 = self.mean + (alpha * self.variances * white) @ self.axes.T
        eps = sigma * white @ self.axes.T
        return Prediction(x, x0.to(x.dtype), eps.to(x.dtype), alpha.flatten(), sigma.flatten())


class Counted(ScoreModel):
    """A model that counts its evaluations, and the backward passes through it."""

    def __init__(self, model: ScoreModel) -> None:
        """Start at 0."""
        super().__init__()
        self.model, self.sde, self.forward_passes, self.backward_passes = model, model.sde, 0, 0

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        """Predict and count."""
        self.forward_passes += 1
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        return self.model.predict(x, t, **cond)

    def total(self) -> str:
        """Return the number of evaluations and of backward passes."""
        return f"{self.forward_passes} + {self.backward_passes}"

    def passes(self, steps: int) -> str:
        """Return the number of evaluations and of backward passes of a step."""
        return f"{self.forward_passes / steps:.0f} + {self.backward_passes / steps:.1f}"

    def _count(self, grad: Tensor) -> None:
        self.backward_passes += 1


class Problem:
    """Data of K Gaussians, a linear measurement, and the exact posteriors of measurements.

    Args:
        means: the means (K, d).
        covs: the covariances (K, d, d).
        weights: the weights (K,).
        operator: A (m, d).
        noise: the standard deviations of the measurement noise (m,).
        model: makes the exact model of a process.
    """

    def __init__(
        self,
        means: Tensor,
        covs: Tensor,
        weights: Tensor,
        operator: Tensor,
        noise: Tensor,
        model: Callable[[ForwardSDE], ScoreModel],
    ) -> None:
        """Draw measurements, and compute their posteriors."""
        self.A, self.noise, self.model = operator, noise, model
        k = torch.multinomial(weights, MEASUREMENTS, replacement=True, generator=seeded(1))
        roots = torch.linalg.cholesky(covs)
        d, m = means.shape[1], len(operator)
        x0 = means[k] + (roots[k] @ randn(MEASUREMENTS, d, 1, seed=2))[..., 0]
        self.y = x0 @ operator.T + noise * randn(MEASUREMENTS, m, seed=3)
        total = operator @ covs @ operator.T + torch.diag(noise**2)  # (K, m, m)
        gain = covs @ operator.T @ torch.linalg.inv(total)
        residual = self.y.unsqueeze(1) - means @ operator.T  # (M, K, m)
        self.means = means + (gain @ residual.unsqueeze(-1))[..., 0]
        self.covs = covs - gain @ operator @ covs
        solved = torch.linalg.solve(total, residual.unsqueeze(-1))[..., 0]
        logs = weights.log() - 0.5 * (residual * solved).sum(2) - 0.5 * torch.logdet(total)
        self.weights = torch.softmax(logs, 1)
        self.mean = (self.weights.unsqueeze(2) * self.means).sum(1)
        off = self.means - self.mean.unsqueeze(1)
        spread = self.covs + off.unsqueeze(3) * off.unsqueeze(2)
        self.cov = (self.weights[..., None, None] * spread).sum(1)
        center = weights @ means
        squares = covs.diagonal(0, 1, 2) + (means - center).square()
        self.sigma_data = math.sqrt(float((weights @ squares).mean()))

    def measure(self, x0: Tensor) -> Tensor:
        """Return A x0."""
        return x0 @ self.A.T.to(x0.dtype)

    def exact(self) -> Tensor:
        """Return samples of the posteriors (M * n, d)."""
        n, d = SAMPLES, self.mean.shape[1]
        k = torch.multinomial(self.weights, n, replacement=True, generator=seeded(4))
        root = torch.linalg.cholesky(self.covs)
        noise = randn(MEASUREMENTS, n, d, seed=5)
        row = torch.arange(MEASUREMENTS).unsqueeze(1)
        x = self.means[row, k] + torch.einsum("mnij,mnj->mni", root[k], noise)
        return torch.flatten(x, 0, 1)

    def errors(self, x: Tensor) -> tuple[float, float]:
        """Return the relative errors of the mean and of the covariance of samples (M * n, d)."""
        x = x.double().view(MEASUREMENTS, SAMPLES, -1)
        mean = x.mean(1)
        off = x - mean.unsqueeze(1)
        cov = off.mT @ off / (SAMPLES - 1)
        size = self.cov.diagonal(0, 1, 2).sum()
        first = ((mean - self.mean).square().sum() / size).sqrt()
        second = (cov - self.cov).norm() / self.cov.norm()
        return float(first), float(second)


def gaussian() -> Problem:
    """Return a correlated Gaussian in four dimensions, of which two are measured."""
    root = randn(4, 4, seed=5)
    mean = torch.tensor([0.3, -0.5, 0.8, 0.0], dtype=DOUBLE)
    cov = 0.15 * root @ root.T + 0.02 * torch.eye(4, dtype=DOUBLE)
    A = torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 1.0, 2.0, 0.3]], dtype=DOUBLE)
    one, noise = torch.ones(1, dtype=DOUBLE), torch.tensor([0.3, 0.6], dtype=DOUBLE)
    return Problem(mean[None], cov[None], one, A, noise, lambda sde: GaussianModel(sde, mean, cov))


def mixture() -> Problem:
    """Return five Gaussians in eight dimensions, of which three are measured."""
    means, std = randn(5, 8, seed=6), 0.3
    covs = (std**2 * torch.eye(8, dtype=DOUBLE)).expand(5, 8, 8)
    weights = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3], dtype=DOUBLE)
    A, noise = randn(3, 8, seed=7) / math.sqrt(8), torch.full((3,), 0.3, dtype=DOUBLE)
    return Problem(
        means, covs, weights, A, noise,
        lambda sde: GaussianMixtureModel(sde, means, [std] * 5, weights),
    )  # fmt: skip


def guided(name: str, problem: Problem, model: ScoreModel) -> ScoreModel:
    """Return a model guided by a method, for each sample's measurement."""
    y = problem.y.repeat_interleave(SAMPLES, 0)
    if name == "DPS":
        return GradientGuidance(
            model, lambda x0: -0.5 * ((y - problem.measure(x0)) / problem.noise).square().sum(1)
        )
    if name == "PiGDM":
        return PseudoinverseGuidance(model, problem.measure, y, problem.noise, problem.sigma_data)
    return LinearGaussianGuidance(model, problem.measure, y, problem.noise)


def daps(problem: Problem, model: ScoreModel, steps: int, inner: int) -> Tensor:
    """Return samples of decoupled annealing (DAPS), with exact draws in place of its MCMC.

    At each noise level the probability flow takes the state to data in a few Euler steps; data are
    drawn from N(flow's data, sigma^2 I) times the likelihood; noise of the next level is added.
    """
    y = problem.y.repeat_interleave(SAMPLES, 0)
    precision = (problem.A.T / problem.noise**2) @ problem.A
    generator = seeded(9)

    def levels(largest: float, n: int, smallest: float) -> list[float]:
        ends = largest ** (1 / 7), smallest ** (1 / 7)
        return [(ends[0] + k / n * (ends[1] - ends[0])) ** 7 for k in range(n + 1)]

    x = 80.0 * randn(len(y), problem.A.shape[1], seed=8)
    for now, after in pairwise(levels(80.0, steps, 0.01)):
        state = x
        flow = levels(now, inner, min(0.01, 0.5 * now))
        for t, s in pairwise([*flow[:-1], 0.0]):
            x0 = model.predict(state, torch.full((len(x),), t, dtype=DOUBLE)).x0
            state = x0 + s / t * (state - x0)
        inverse = torch.linalg.inv(torch.eye(x.shape[1], dtype=DOUBLE) / now**2 + precision)
        mean = (state / now**2 + (y / problem.noise**2) @ problem.A) @ inverse
        z = torch.randn(x.shape, generator=generator, dtype=DOUBLE)
        data = mean + z @ torch.linalg.cholesky(inverse).T
        x = data + after * torch.randn(x.shape, generator=generator, dtype=DOUBLE)
    return torch.as_tensor(data)


def grid_of(sde: ForwardSDE) -> Any:
    """Return the grid for a process."""
    return KarrasGrid() if isinstance(sde, EDMSDE) else LogSNRGrid()


def linear_problem(problem: Problem, sde: ForwardSDE) -> list[list[str]]:
    """Return the errors of every method at several numbers of steps."""
    table = [["method", "sampler", "passes a step", *(f"{n} steps" for n in STEPS)]]
    table.append(["exact samples", "", "", *[_shown(problem.errors(problem.exact()))] * len(STEPS)])
    shape = (MEASUREMENTS * SAMPLES, problem.A.shape[1])
    for method in ("MMPS", "PiGDM", "DPS"):
        for predictor in (DDIM(), Ancestral()):
            cells = []
            for n in STEPS:
                model = Counted(problem.model(sde))
                sampler = PCSampler(
                    guided(method, problem, model), predictor, steps=n, grid=grid_of(sde)
                )
                x = sampler(shape, generator=seeded(), dtype=DOUBLE)
                cells.append(_shown(problem.errors(x)))
            table.append([method, f"`{type(predictor).__name__}`", model.passes(n), *cells])
    for inner in (5, 1):
        cells = []
        for n in STEPS:
            model = Counted(problem.model(EDMSDE()))
            cells.append(_shown(problem.errors(daps(problem, model, n, inner))))
        table.append(["DAPS", f"flow of {inner} step{'s' * (inner > 1)}", model.passes(n), *cells])
    return table


def known_coordinate(sde: ForwardSDE) -> list[list[str]]:
    """Return errors for two coordinates of correlation .8, one of them known to be 1.5."""
    rho, known, n = 0.8, 1.5, 4000
    cov = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=DOUBLE)
    mean, std = rho * known, math.sqrt(1 - rho**2)
    data, mask = torch.tensor([known, 0.0], dtype=DOUBLE), torch.tensor([True, False])
    constraint = Inpainting(data, mask)
    y = data[:1].unsqueeze(0)

    def first(x0: Tensor) -> Tensor:
        return x0[:, :1]

    def plain(model: ScoreModel) -> ScoreModel:
        return model

    methods: list[tuple[str, Callable[[ScoreModel], ScoreModel], dict[str, Any]]] = [
        ("`Inpainting`", plain, {"constraint": constraint}),
        (
            "`Inpainting`, five `AnnealedLangevin` steps",
            plain,
            {"constraint": constraint, "corrector": AnnealedLangevin(steps=5)},
        ),
        (
            "RePaint: `Inpainting`, `TimeTravel(10, 10)`",
            plain,
            {"constraint": constraint, "time_travel": TimeTravel(10, 10)},
        ),
        ("PiGDM", lambda model: PseudoinverseGuidance(model, first, y, 0.0), {}),
        ("MMPS", lambda model: LinearGaussianGuidance(model, first, y, 0.0), {}),
    ]
    table = [["method", "evaluations + backward passes", "error of the mean", "standard deviation"]]
    for name, wrap, options in methods:
        model = Counted(GaussianModel(sde, torch.zeros(2, dtype=DOUBLE), cov))
        sampler = PCSampler(wrap(model), Ancestral(), steps=100, grid=grid_of(sde), **options)
        other = sampler((n, 2), generator=seeded(), dtype=DOUBLE)[:, 1]
        table.append(
            [name, model.total(), f"{float(other.mean() - mean) / std:.2f}",
             f"{float(other.std()) / std:.2f}"]
        )  # fmt: skip
    return table


def nonlinear(sde: ForwardSDE) -> list[list[str]]:
    """Return errors for y = tanh(2 x0) + noise, with the posterior by quadrature."""
    center, spread, n = 0.5, 0.5, 4000
    line = torch.linspace(-3.0, 4.0, 20001, dtype=DOUBLE)
    table = [["noise", "y", "method", "error of the mean", "standard deviation"]]
    for noise, value in ((0.5, 0.9), (0.1, 0.9), (0.1, 0.3)):
        y = torch.tensor([[value]], dtype=DOUBLE)
        logs = -0.5 * ((line - center) / spread) ** 2
        logs = logs - 0.5 * ((value - torch.tanh(2 * line)) / noise) ** 2
        p = torch.softmax(logs, 0)
        mean = float(p @ line)
        std = float((p @ (line - mean) ** 2).sqrt())
        model = GaussianMixtureModel(sde, [[center]], [spread])

        def measure(x0: Tensor) -> Tensor:
            return torch.tanh(2 * x0)

        def log_likelihood(x0: Tensor, y: Tensor = y, noise: float = noise) -> Tensor:
            return -0.5 * ((y - measure(x0)) / noise).square().sum(1)

        for name, wrapped in (
            ("MMPS, linearized", LinearizedGaussianGuidance(model, measure, y, noise)),
            ("DPS", GradientGuidance(model, log_likelihood)),
        ):
            sampler = PCSampler(wrapped, Ancestral(), steps=200, grid=grid_of(sde))
            x = sampler((n, 1), generator=seeded(), dtype=DOUBLE)
            off, ratio = float(x.mean() - mean) / std, float(x.std()) / std
            table.append([f"{noise:g}", f"{value:g}", name, f"{off:.2f}", f"{ratio:.2f}"])
    return table


def _shown(errors: tuple[float, float]) -> str:
    return ", ".join(f"{e:.2f}" if e < 10 else "diverges" for e in errors)


def _markdown(table: list[list[str]]) -> str:
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    """Print the tables, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--process", choices=PROCESSES, default="VP")
    parser.add_argument("--save", type=Path, help="write the tables to a folder")
    options = parser.parse_args()
    sde = PROCESSES[options.process]
    for name, table in (
        ("gaussian", linear_problem(gaussian(), sde)),
        ("mixture", linear_problem(mixture(), sde)),
        ("known", known_coordinate(sde)),
        ("nonlinear", nonlinear(sde)),
    ):
        print(f"{name}\n\n{_markdown(table)}", flush=True)
        if options.save:
            path = options.save / f"inverse_problems_{name}.md"
            path.write_text(_markdown(table), encoding="utf-8")


if __name__ == "__main__":
    main()
