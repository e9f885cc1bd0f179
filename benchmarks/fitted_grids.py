"""Compare fitted grids with fixed ones, on two trained networks and on a mixture.

For each solver and number of evaluations it prints the root mean square distance of samples from
the tightly solved probability flow, in units of the data: on `KarrasGrid()`, on the best of
twelve published grids, chosen on the very draws that are judged, on the default `TangentGrid()`,
and on the grid of `fit_grid`, fitted to other draws; then the ratio of fitted to published, and the
seconds of the fit. The first network is that of examples/solvers.py, the second a U-Net on glyphs;
the mixture has forty modes in 64 dimensions, k-means clusters of the digits, with its exact score.

    python benchmarks/fitted_grids.py
    python benchmarks/fitted_grids.py --train-steps 100 --glyph-steps 10 --draws 32 --test-draws 64
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    IPNDM,
    AYSGrid,
    DPMSolver2M,
    EDMModel,
    EDMWeighting,
    GaussianMixtureModel,
    KarrasGrid,
    LogNormalTimes,
    LogSNRGrid,
    PCSampler,
    Predictor,
    ProbabilityFlow,
    ScoreMatching,
    ScoreModel,
    TangentGrid,
    UniPC,
    VelocityAdams,
    fit_grid,
)
from diffusionkit.data import glyphs
from diffusionkit.networks import DDPMpp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import load
from guided_digits import train
from helpers import fit

MODES = 40
SOLVERS: dict[str, Predictor] = {
    "DEIS 3": DEIS(3),
    "IPNDM 3": IPNDM(3),
    "VelocityAdams 3": VelocityAdams(),
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


def published_grids(steps: int) -> Iterator[Tensor]:
    """Yield a dozen fixed grids that releases have, with several last levels."""
    for t_end in (0.002, 0.012, 0.08):
        for kind in (LogSNRGrid, KarrasGrid, AYSGrid):
            yield kind(t_end=t_end, to_zero=True)(EDMSDE(), steps)
    for t_end in (0.002, 0.012):
        yield AYSGrid(t_end=t_end)(EDMSDE(), steps)
    top = EDMSDE().T
    u = torch.linspace(top / (1 + top), 0, steps + 1, dtype=torch.float64)
    yield u / (1 - u)  # uniform times on the straight path of flow matching


def glyph_network(steps: int) -> ScoreModel:
    """Train a small U-Net on glyphs of 16 x 16 pixels; a few minutes for 1,000 steps."""
    torch.manual_seed(0)
    data = glyphs("train", size=16)
    images = torch.stack([data[k][0] for k in range(len(data))]).float() / 127.5 - 1
    network = DDPMpp(1, width=16, multipliers=(1, 2), blocks=1, attention_levels=(), dropout=0.0)
    model = EDMModel(network, EDMSDE())
    objective = ScoreMatching(EDMWeighting(), times=LogNormalTimes())

    def loss() -> Tensor:
        return objective(model, images[torch.randint(len(images), (64,))])

    fit(model, loss, steps, lr=2e-3, ema_decay=0.99, name="glyphs")
    return model.eval()


def rows(
    model: ScoreModel,
    shape: tuple[int, ...],
    draws: int,
    test_draws: int,
    names: Sequence[str],
    evaluations: Sequence[int],
) -> None:
    """Print a row for every solver and number of evaluations, and the best of each number."""
    z = model.sde.prior_sample((test_draws, *shape), generator=seeded(100))
    exact = ProbabilityFlow(model, "dopri8", 1e-6, 1e-6).sample(z)

    def error(predictor: Predictor, times: Tensor) -> float:
        x = PCSampler(model, predictor, grid=times, denoise=False)(z)
        return float((x - exact).square().mean().sqrt())

    head = ("evaluations", "Karras", "published", "default", "fitted", "ratio", "fit, s")
    print(f"{'':<16}" + "".join(f"{name:>12}" for name in head))
    best: dict[int, list[tuple[float, str]]] = {steps: [] for steps in evaluations}
    fits: dict[int, list[tuple[float, str]]] = {steps: [] for steps in evaluations}
    for name in names:
        predictor = SOLVERS[name]
        for steps in evaluations:
            start = time.process_time()
            grid = fit_grid(model, predictor, (draws, *shape), steps=steps, generator=seeded(0))
            seconds = time.process_time() - start
            karras = error(predictor, KarrasGrid(to_zero=True)(model.sde, steps))
            published = min(error(predictor, times) for times in published_grids(steps))
            default = error(predictor, TangentGrid()(model.sde, steps))
            fitted = error(predictor, torch.tensor(grid.times))
            best[steps].append((published, name))
            fits[steps].append((fitted, name))
            values = (karras, published, default, fitted)
            cells = (*(f"{value:.4f}" for value in values), f"{fitted / published:.2f}")
            print(f"{name:<16}{steps:>12}" + "".join(f"{c:>12}" for c in cells), end="")
            print(f"{seconds:>12.1f}", flush=True)
    for steps in evaluations:
        (published, one), (fitted, two) = min(best[steps]), min(fits[steps])
        print(
            f"{steps:>2} evaluations: best published {published:.4f} ({one}), "
            f"best fitted {fitted:.4f} ({two}), ratio {fitted / published:.2f}"
        )
    print(flush=True)


def main() -> None:
    """Print a table for each network and one for the mixture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--train-steps", type=int, default=3000, help="of the network on digits")
    add("--glyph-steps", type=int, default=1000, help="of the network on glyphs")
    add("--draws", type=int, default=512, help="draws of a fit, half held out")
    add("--test-draws", type=int, default=1024, help="draws that are judged")
    add("--evaluations", type=int, nargs="+", default=[6, 8, 10])
    add("--only", choices=("network", "glyphs", "mixture"), help="one of the tables")
    add("--solvers", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    args = parser.parse_args()
    data, draws = load(), (args.draws, args.test_draws)
    chosen = args.solvers, args.evaluations
    if args.only in (None, "network"):
        model = train(data, args.train_steps, 0)
        print("Network trained on digits", flush=True)
        rows(model, (64,), *draws, *chosen)
    if args.only in (None, "glyphs"):
        model = glyph_network(args.glyph_steps)
        print("U-Net trained on glyphs of 16 x 16", flush=True)
        rows(model, (1, 16, 16), args.draws // 8, args.test_draws // 8, *chosen)
    if args.only in (None, "mixture"):
        print("Mixture of forty Gaussians in 64 dimensions", flush=True)
        rows(mixture(data.train.flatten(1)), (64,), *draws, *chosen)


if __name__ == "__main__":
    main()
