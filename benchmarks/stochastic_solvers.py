"""Compare stochastic solvers by the energy distance of their samples, at equal evaluations.

Three models: three Gaussians in the plane and forty in 64 dimensions, with exact scores, against
samples of the same mixtures; and a network trained on scikit-learn's digits, that of
examples/solvers.py, against test digits. Each number is that of the better of two grids. The last
rows are a deterministic solver, and exact samples or training digits. Energy distances include
what equal distributions have at this number of samples.

    python benchmarks/stochastic_solvers.py
    python benchmarks/stochastic_solvers.py --train-steps 100 --samples 100 --only network
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffusionkit import (
    EDMSDE,
    Ancestral,
    AYSGrid,
    DPMSolver2MSDE,
    DPMSolver2SAncestral,
    DPMSolver3MSDE,
    GaussianMixtureModel,
    Heun,
    LogSNRGrid,
    PCSampler,
    Predictor,
    SASolver,
    ScoreModel,
    StochasticHeun,
    UniPC,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import load
from fitted_grids import mixture, seeded
from guided_digits import train
from helpers import energy_distance

EVALUATIONS = (6, 10, 20, 40)
GRIDS = (AYSGrid(), LogSNRGrid(t_end=0.1, to_zero=True))
SOLVERS: Mapping[str, tuple[Predictor, int]] = {
    "Ancestral()": (Ancestral(), 1),
    "Heun(churn=40, s_min=.05, s_max=50)": (Heun(churn=40.0, s_min=0.05, s_max=50.0), 2),
    "StochasticHeun()": (StochasticHeun(), 2),
    "DPMSolver2SAncestral()": (DPMSolver2SAncestral(), 2),
    "DPMSolver2MSDE()": (DPMSolver2MSDE(), 1),
    "DPMSolver2MSDE(0.3)": (DPMSolver2MSDE(0.3), 1),
    "DPMSolver3MSDE()": (DPMSolver3MSDE(), 1),
    "SASolver()": (SASolver(), 1),
    'SASolver(lines="exact")': (SASolver(lines="exact"), 1),
    "SASolver(tau=0.5)": (SASolver(tau=0.5), 1),
    "SASolver(s_min=.05, s_max=1)": (SASolver(s_min=0.05, s_max=1.0), 1),
    "UniPC(), without noise": (UniPC(), 1),
}


def plane() -> GaussianMixtureModel:
    """Return three Gaussians in the plane."""
    means = [[-1.0, 0.5], [1.0, -0.5], [0.3, 1.2]]
    return GaussianMixtureModel(EDMSDE(), means, [0.2, 0.3, 0.1], [0.4, 0.4, 0.2])


def distance(model: ScoreModel, predictor: Predictor, steps: int, z: Tensor, data: Tensor) -> float:
    """Return the energy distance to data on the better of the grids, from noise z (n, d)."""
    found = []
    for grid in GRIDS:
        sampler = PCSampler(model, predictor, grid=grid, steps=steps, denoise=False)
        found.append(energy_distance(sampler(z, generator=seeded(2)), data))
    return min(found)


def rows(model: ScoreModel, samples: int, data: Tensor, exact: Tensor) -> None:
    """Print a row for every solver, and one for exact samples (n, d)."""
    z = model.sde.prior_sample((samples, data.shape[1]), generator=seeded(1))
    print("".join([f"{'evaluations':<38}", *(f"{n:>9}" for n in EVALUATIONS)]), flush=True)
    for name, (predictor, each) in SOLVERS.items():
        found = [distance(model, predictor, max(2, n // each), z, data) for n in EVALUATIONS]
        print("".join([f"{name:<38}", *(f"{value:>9.4f}" for value in found)]), flush=True)
    print(f"{'exact samples':<38}{energy_distance(exact[:samples], data):>9.4f}\n", flush=True)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--only", choices=("plane", "mixture", "network"), help="one of the tables")
    args = parser.parse_args()
    digits = load()
    images = digits.train.flatten(1)
    for name, model in (("plane", plane()), ("mixture", mixture(images))):
        if args.only in (None, name):
            n, d = args.samples, model.means.shape[1]
            print(f"{len(model.means)} Gaussians in {d} dimensions")
            data, exact = (model.sample(k, generator=seeded(k)) for k in (4 * n, n))
            rows(model, n, data, exact)
    if args.only in (None, "network"):
        print("Network trained on digits")
        rows(train(digits, args.train_steps, 0), args.samples, digits.test.flatten(1), images)


if __name__ == "__main__":
    main()
