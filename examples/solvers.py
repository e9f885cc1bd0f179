"""Compare solvers by error and sample quality against network evaluations.

On a mixture of two Gaussians with its exact score, the error of deterministic solvers decreases
with their order. On a small network trained on scikit-learn's digits, the table shows the error
against the converged probability flow and the energy distance to held-out digits, for which the
network sets a floor. It prints tables and saves a picture, `outputs/solvers.png`. Runtime: three
minutes on one CPU core; the second command takes half a minute.

    python examples/solvers.py
    python examples/solvers.py --train-steps 100 --samples 100
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from digits import Quality, load, pixels
from guided_digits import train
from helpers import argument_parser, picture_path, positive_int, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    LMS,
    AdaptiveSDE,
    Ancestral,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver3M,
    GaussianMixtureModel,
    Heun,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    Predictor,
    ProbabilityFlow,
    ScoreModel,
    StochasticHeun,
    UniPC,
)

EVALUATIONS = (6, 10, 16, 20, 40, 80, 160)
TOLERANCES = (0.5, 0.1, 0.02)


class Solver(NamedTuple):
    """A predictor and its evaluations per step."""

    predictor: Predictor
    evaluations: int = 1


DETERMINISTIC = {
    "DDIM": Solver(DDIM()),
    "Heun": Solver(Heun(), 2),
    "DPM-Solver++ 2S": Solver(DPMSolver2S(), 2),
    "DPM-Solver++ 2M": Solver(DPMSolver2M()),
    "DPM-Solver++ 3M": Solver(DPMSolver3M()),
    "UniPC 2": Solver(UniPC(order=2)),
    "UniPC 3": Solver(UniPC(order=3)),
    "DEIS 3": Solver(DEIS(order=3)),
    "DEIS 4": Solver(DEIS(order=4)),
    "LMS 4": Solver(LMS(order=4)),
}
STOCHASTIC = {
    "Ancestral": Solver(Ancestral()),
    "DDIM, eta .5": Solver(DDIM(eta=0.5)),
    "DPM-Solver++ 2M SDE": Solver(DPMSolver2MSDE()),
    "stochastic Heun": Solver(StochasticHeun(), 2),
}


class Point(NamedTuple):
    """A measure of a solver at a number of evaluations."""

    evaluations: int
    value: float


def runs(
    model: ScoreModel, solver: Solver, z: Tensor, grid: KarrasGrid | LogSNRGrid, seed: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Yield evaluations and samples from the same noise z (n, d) for increasing budgets."""
    for evaluations in EVALUATIONS:
        steps = max(2, evaluations // solver.evaluations)
        sampler = PCSampler(model, solver.predictor, grid=grid, steps=steps)
        x = sampler(z, generator=torch.Generator().manual_seed(seed))
        yield sampler.nfe, x


def adaptive(model: ScoreModel, z: Tensor, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yield evaluations and samples of the adaptive solver for decreasing tolerances."""
    for rtol in TOLERANCES:
        sampler = PCSampler(model, AdaptiveSDE(rtol=rtol), steps=1, grid=KarrasGrid())
        x = sampler(z, generator=torch.Generator().manual_seed(seed))
        yield sampler.nfe, x


def rms(x: Tensor, exact: Tensor) -> float:
    """Return the root mean squared error."""
    return float((x - exact).square().mean().sqrt())


def exact_flow(model: ScoreModel, z: Tensor, tolerance: float) -> Tensor:
    """Solve the probability flow from noise z (n, d) to a tolerance."""
    flow = ProbabilityFlow(model, "dopri8", tolerance, tolerance, denoise=False, t_end=1e-5)
    return flow.decode(z)


def on_mixture(n: int) -> dict[str, list[Point]]:
    """Return the errors of deterministic solvers on a one-dimensional Gaussian mixture."""
    model = GaussianMixtureModel(EDMSDE(), [[-1.0], [0.8]], [0.2, 0.4], [0.3, 0.7])
    generator = torch.Generator().manual_seed(0)
    z = model.sde.prior_sample((n, 1), generator=generator, dtype=torch.float64)
    exact = exact_flow(model, z, 1e-10)
    return {
        name: [Point(nfe, rms(x, exact)) for nfe, x in runs(model, solver, z, LogSNRGrid())]
        for name, solver in DETERMINISTIC.items()
    }


def on_digits(
    model: ScoreModel, quality: Quality, n: int
) -> tuple[dict[str, list[Point]], dict[str, list[Point]]]:
    """Return errors against the converged flow, and energy distances to the test digits."""
    z = model.sde.prior_sample((n, 64), generator=torch.Generator().manual_seed(0))
    exact = exact_flow(model, z, 1e-6)
    errors, energies = {}, {}
    for name, solver in (DETERMINISTIC | STOCHASTIC).items():
        found = list(runs(model, solver, z, KarrasGrid(to_zero=True)))
        if name in DETERMINISTIC:
            errors[name] = [Point(nfe, rms(x, exact)) for nfe, x in found]
        energies[name] = [Point(nfe, quality.energy_distance(pixels(x))) for nfe, x in found]
    energies["adaptive"] = [
        Point(nfe, quality.energy_distance(pixels(x))) for nfe, x in adaptive(model, z)
    ]
    return errors, energies


def table(found: dict[str, list[Point]]) -> str:
    """Return a table by solver and budget; deviating evaluations are in parentheses."""
    lines = [f"{'evaluations':<20}" + "".join(f"{n:>12}" for n in EVALUATIONS)]
    for name, points in found.items():
        cells = [
            f"{p.value:.2g}" + ("" if abs(p.evaluations - n) <= 1 else f" ({p.evaluations})")
            for n, p in zip(EVALUATIONS, points, strict=False)
        ]
        lines.append(f"{name:<20}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def plot(ax: Axes, found: dict[str, list[Point]], title: str, ylabel: str) -> None:
    """Plot values against evaluations."""
    for i, (name, points) in enumerate(found.items()):
        style = "-" if name in DETERMINISTIC else "--"
        ax.plot(*zip(*points, strict=True), f"o{style}", color=f"C{i}", label=name, markersize=3)
    ax.set(xscale="log", yscale="log", xlabel="evaluations", ylabel=ylabel, title=title)
    ax.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    ax.minorticks_off()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables and save the picture."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--train-steps", type=positive_int, default=3000, help="training steps")
    add("--samples", type=positive_int, default=500, help="samples per solver")
    add("--seed", type=int, default=0, help="the training seed")
    add("--output", type=picture_path, default="outputs/solvers.png", help="path of the figure")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    mixture = on_mixture(args.samples)
    print(f"Error on a mixture of two Gaussians\n{table(mixture)}\n", flush=True)
    data = load()
    quality = Quality(data)
    model = train(data, args.train_steps, args.seed)
    errors, energies = on_digits(model, quality, args.samples)
    attainable = quality.attainable_energy_distance(args.samples)
    print(f"Error against the converged flow of a network trained on digits\n{table(errors)}\n")
    print(f"Energy distance to the test digits (training digits: {attainable:.2g})")
    print(table(energies))
    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plot(left, mixture, "Gaussian mixture, exact score", "error")
    plot(middle, errors, "network trained on digits", "error against converged flow")
    plot(right, energies, "network trained on digits", "energy distance to test digits")
    right.axhline(attainable, color="gray", linestyle=":", label="training digits")
    right.legend(fontsize=7)
    save(figure, args.output)
    print(f"\n{time.perf_counter() - start:.0f} s, picture {args.output}")


if __name__ == "__main__":
    main()
