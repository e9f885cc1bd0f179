"""Is a conditional model calibrated? Coverage, ranks and scores of samplers with few steps.

Two stations measure their distances to a ship, and a conditional model learns the posterior of its
position, whose exact form is known. Samples of the exact posterior, of the model with enough steps
and of samplers with too few are evaluated by simulation-based calibration, expected coverage,
spread-skill ratio and energy score. It prints a table and saves a picture,
`outputs/calibration.png`. Runtime: two minutes on one CPU core; the second command takes half a
minute.

    python examples/calibration.py
    python examples/calibration.py --train-steps 300 --cases 200
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from helpers import argument_parser, fit, picture_path, positive_int, save
from matplotlib.figure import Figure
from torch import Tensor

from diffusionkit import (
    DDIM,
    VPSDE,
    Ancestral,
    EDMModel,
    EDMWeighting,
    LogSNRGrid,
    PCSampler,
    Predictor,
    ScoreMatching,
    ScoreModel,
    UniPC,
)
from diffusionkit.calibration import (
    ExpectedCoverage,
    SBCResult,
    SpreadSkill,
    energy_score,
    expected_coverage,
    plot_coverage,
    plot_rank_histogram,
    simulation_based_calibration,
    spread_skill,
)
from diffusionkit.networks import MLP

STATIONS = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
NOISE = 0.2  # the error of a distance
DRAWS = 39  # samples of each posterior
SAMPLERS: dict[str, tuple[Predictor, int]] = {
    "UniPC, 20 steps": (UniPC(), 20),
    "ancestral, 10 steps": (Ancestral(), 10),
    "DDIM, 10 steps": (DDIM(), 10),
    "DDIM, 3 steps": (DDIM(), 3),
}
SHOWN = ("exact", "UniPC, 20 steps", "DDIM, 10 steps", "DDIM, 3 steps")


class Judged(NamedTuple):
    """The results of all tests for some samples."""

    ranks: SBCResult
    coverage: ExpectedCoverage
    by_data: ExpectedCoverage
    ratio: SpreadSkill
    energy: Tensor


def simulate(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw places (n, 2) from the prior N(0, I), and measured distances (n, 2)."""
    theta = torch.randn(n, 2, generator=generator)
    distance = torch.cdist(theta, STATIONS)
    return theta, distance + NOISE * torch.randn(distance.shape, generator=generator)


def train(steps: int, generator: torch.Generator) -> ScoreModel:
    """Train a conditional model of places given distances on 20,000 simulations."""
    theta, x = simulate(20_000, generator)
    torch.manual_seed(0)
    model = EDMModel(MLP(2, condition_features=2, width=64), VPSDE(), sigma_data=1.0)
    objective = ScoreMatching(EDMWeighting(1.0))

    def loss() -> Tensor:
        rows = torch.randint(len(theta), (256,), generator=generator)
        return objective(model, theta[rows], condition=x[rows], generator=generator)

    fit(model, loss, steps, lr=3e-3, ema_decay=0.99)
    return model.eval()


def exact(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw places (n, DRAWS, 2) from the exact posteriors of distances (n, 2), on a fine grid."""
    axis = torch.linspace(-4, 4, 161)
    grid, width = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0])
    distance, prior = torch.cdist(grid, STATIONS), -0.5 * grid.square().sum(1)
    found = []
    for some in torch.split(x, 50):
        error = (some.unsqueeze(1) - distance) / NOISE
        density = torch.softmax(prior - 0.5 * error.square().sum(2), 1)
        index = torch.multinomial(density, DRAWS, replacement=True, generator=generator)
        inside = torch.rand((*index.shape, 2), generator=generator) - 0.5
        found.append(grid[index] + width * inside)
    return torch.cat(found)


def sample(model: ScoreModel, name: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw places (n, DRAWS, 2) from the model's posteriors of distances (n, 2)."""
    predictor, steps = SAMPLERS[name]
    sampler = PCSampler(model, predictor, grid=LogSNRGrid(), steps=steps)
    condition = x.repeat_interleave(DRAWS, 0)
    drawn = sampler((len(condition), 2), condition=condition, generator=generator)
    return drawn.view(len(x), DRAWS, 2)


def judge(samples: Tensor, theta: Tensor, x: Tensor, generator: torch.Generator) -> Judged:
    """Apply all tests to samples (n, DRAWS, 2) of the posteriors of distances (n, 2)."""
    # The distances determine the first coordinate, and nothing of the sign of the second.
    first = (x[:, :1].square() - x[:, 1:].square()) / 4
    references = torch.cat([first, torch.zeros_like(first)], 1)
    coverage = partial(expected_coverage, samples, theta, generator=generator)
    return Judged(
        simulation_based_calibration(samples, theta, bins=20, generator=generator),
        coverage(),
        coverage(references=references),
        spread_skill(samples, theta),
        energy_score(samples, theta),
    )


def row(name: str, one: Judged, best: Judged) -> str:
    """Return the row of the table for some samples, with the excess of their energy score."""
    p_values = (*one.ranks.p_value.tolist(), one.coverage.p_value, one.by_data.p_value)
    excess = one.energy - best.energy
    error = float(excess.std()) / len(excess) ** 0.5
    ratio = f"{one.ratio.ratio:.2f} ± {one.ratio.stderr:.2f}"
    cells = [*(f"{p:.2g}" for p in p_values), ratio, f"{float(excess.mean()):.4f} ± {error:.4f}"]
    return f"{name:<20}" + "".join(f"{cell:>17}" for cell in cells)


def draw_figure(found: dict[str, Judged]) -> Figure:
    """Plot coverage curves, and the ranks of the second coordinate of a good and a bad sampler."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    plot_coverage({name: found[name].by_data for name in SHOWN}, axes[0])
    for ax, name in zip(axes[1:], (SHOWN[1], SHOWN[3]), strict=True):
        plot_rank_histogram(found[name].ranks, ax, index=1).set_title(name)
    axes[0].set_title("references made of the data")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, judge, and save the picture."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--train-steps", type=positive_int, default=2000, help="training steps")
    add("--cases", type=positive_int, default=1000, help="simulations to test with")
    add("--output", type=picture_path, default="outputs/calibration.png", help="path of the figure")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    model = train(args.train_steps, generator)
    theta, x = simulate(args.cases, generator)

    heads = ("SBC p, first", "SBC p, second", "coverage p", "by the data p", "spread / skill")
    print(f"{'':<20}" + "".join(f"{head:>17}" for head in (*heads, "excess energy")))
    found: dict[str, Judged] = {}
    for name in ("exact", *SAMPLERS):
        drawn = exact(x, generator) if name == "exact" else sample(model, name, x, generator)
        found[name] = judge(drawn, theta, x, generator)
        print(row(name, found[name], found["exact"]), flush=True)
    save(draw_figure(found), args.output)
    print(f"picture {args.output}")


if __name__ == "__main__":
    main()
