"""Compare fitted grids with fixed ones, on a network trained on digits and on a mixture.

For each solver and number of evaluations it prints the root mean square distance of samples from
the tightly solved probability flow, in units of the data: on `KarrasGrid()`, on the best of about
thirty fixed grids, chosen on the very draws that are judged, and on the grid of `fit_grid`, fitted
to other draws; then the ratio of the last two, and the seconds of the fit. The network is that of
examples/solvers.py; the mixture has forty modes in 64 dimensions, k-means clusters of the digits,
with its exact score.

    python benchmarks/fitted_grids.py
    python benchmarks/fitted_grids.py --train-steps 100 --draws 32 --test-draws 64
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    DPMSolver2M,
    GaussianMixtureModel,
    KarrasGrid,
    PCSampler,
    Predictor,
    ProbabilityFlow,
    ScoreModel,
    UniPC,
    fit_grid,
)
from diffusionkit.sampling.grid_search import fixed_grids

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import load
from guided_digits import train

MODES = 40
EVALUATIONS = (6, 8, 10)
SOLVERS: dict[str, Predictor] = {
    "DEIS 3": DEIS(3),
    "UniPC 2": UniPC(),
    "DPM-Solver++ 2M": DPMSolver2M(),
    "DDIM": DDIM(),
}


def mixture(images: Tensor) -> GaussianMixtureModel:
    """Return a Gaussian at each of the k-means clusters of images (n, 64)."""
    found = KMeans(MODES, random_state=0, n_init=2).fit(images.numpy())
    labels, means = torch.tensor(found.labels_), torch.tensor(found.cluster_centers_)
    stds = torch.stack([(images[labels == k] - means[k]).std() for k in range(MODES)])
    weights = torch.bincount(labels, minlength=MODES) / len(images)
    return GaussianMixtureModel(EDMSDE(), means, stds, weights)


def seeded(seed: int) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def rows(model: ScoreModel, draws: int, test_draws: int) -> None:
    """Print a row for every solver and number of evaluations."""
    z = model.sde.prior_sample((test_draws, 64), generator=seeded(100))
    exact = ProbabilityFlow(model, "dopri8", 1e-6, 1e-6).sample(z)

    def error(predictor: Predictor, times: Tensor) -> float:
        x = PCSampler(model, predictor, grid=times, denoise=False)(z)
        return float((x - exact).square().mean().sqrt())

    head = ("evaluations", "Karras", "best fixed", "fitted", "ratio", "fit, s")
    print(f"{'':<16}" + "".join(f"{name:>12}" for name in head))
    ratios = []
    for name, predictor in SOLVERS.items():
        for steps in EVALUATIONS:
            start = time.process_time()
            grid = fit_grid(model, predictor, (draws, 64), steps=steps, generator=seeded(0))
            seconds = time.process_time() - start
            karras = error(predictor, KarrasGrid(to_zero=True)(model.sde, steps))
            best = min(error(predictor, times) for times in fixed_grids(model.sde, steps))
            fitted = error(predictor, torch.tensor(grid.times))
            ratios.append(fitted / best)
            cells = (f"{karras:.4f}", f"{best:.4f}", f"{fitted:.4f}", f"{fitted / best:.2f}")
            print(f"{name:<16}{steps:>12}" + "".join(f"{c:>12}" for c in cells), end="")
            print(f"{seconds:>12.1f}", flush=True)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"ratios from {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {mean:.2f}\n")


def main() -> None:
    """Print a table for the network and one for the mixture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=512, help="draws of a fit, half held out")
    parser.add_argument("--test-draws", type=int, default=1024, help="draws that are judged")
    parser.add_argument("--only", choices=("network", "mixture"), help="one of the tables")
    args = parser.parse_args()
    data = load()
    if args.only != "mixture":
        model = train(data, args.train_steps, 0)
        print("Network trained on digits", flush=True)
        rows(model, args.draws, args.test_draws)
    if args.only != "network":
        print("Mixture of forty Gaussians in 64 dimensions", flush=True)
        rows(mixture(data.train.flatten(1)), args.draws, args.test_draws)


if __name__ == "__main__":
    main()
