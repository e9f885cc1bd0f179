"""Compare fitted grids with fixed ones, on two trained networks and on a mixture.

For each solver and number of evaluations it prints the root mean square distance of samples from
the tightly solved probability flow, in units of the data: on `KarrasGrid()`, on the best of
twelve published grids, chosen on the same draws that it is evaluated on, on the default
`TangentGrid()`, and on the grid of `fit_grid`, fitted to other draws, without and with a free first
step from the mean of the model's predictions in noise (`AnalyticFirstStep`); for these two also the
ratio to published, and the seconds of the fit without the flow, which all fits share. The last
lines compare the best of all solvers, with a 90% bootstrap interval over the evaluation draws, and
in parentheses the roots of the median squares. The first network is that of examples/solvers.py,
the second a U-Net on glyphs; the mixture has forty modes in 64 dimensions, k-means clusters of the
digits, with its exact score.

    python benchmarks/fitted_grids.py
    python benchmarks/fitted_grids.py --train-steps 100 --glyph-steps 10 --draws 32 --test-draws 64
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    IPNDM,
    AnalyticFirstStep,
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
KINDS = "fitted", "free"
Ends: TypeAlias = tuple[Tensor, Tensor]
SOLVERS: dict[str, Predictor] = {
    "DEIS 3": DEIS(3),
    "IPNDM 3": IPNDM(3),
    "VelocityAdams 3": VelocityAdams(),
    "corrected": VelocityAdams(corrected=True),
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


def glyph_images() -> Tensor:
    """Return glyphs (n, 1, 16, 16)."""
    data = glyphs("train", size=16)
    return torch.stack([data[k][0] for k in range(len(data))]).float() / 127.5 - 1


def glyph_network(images: Tensor, steps: int) -> ScoreModel:
    """Train a small U-Net on glyphs of 16 x 16 pixels; a few minutes for 1,000 steps."""
    torch.manual_seed(0)
    network = DDPMpp(1, width=16, multipliers=(1, 2), blocks=1, attention_levels=(), dropout=0.0)
    model = EDMModel(network, EDMSDE())
    objective = ScoreMatching(EDMWeighting(), times=LogNormalTimes())

    def loss() -> Tensor:
        return objective(model, images[torch.randint(len(images), (64,))])

    fit(model, loss, steps, lr=2e-3, ema_decay=0.99, name="glyphs")
    return model.eval()


def mean_prediction(model: ScoreModel, shape: tuple[int, ...]) -> Tensor:
    """Return the mean of predictions in pure noise, a quarter of that at T, (*D)."""
    time = 0.25 * model.sde.T
    z = time * torch.randn(128, *shape, generator=seeded(5))
    with torch.no_grad():
        return model.predict(z, torch.full((128,), time)).x0.mean(0)


def squares(model: ScoreModel, predictor: Predictor, times: Tensor, ends: Ends) -> Tensor:
    """Return the mean square distances (n,) of samples from the flow."""
    start, end = ends
    x = PCSampler(model, predictor, grid=times, denoise=False)(start)
    return (x - end).flatten(1).double().square().mean(1)


def interval(found: Tensor, published: Tensor) -> str:
    """Return the ratio of two root mean squares of (n,) values, with its bootstrap interval."""
    n = len(found)
    rows = torch.randint(n, (2000, n), generator=seeded(7))
    ratios = (found[rows].mean(1) / published[rows].mean(1)).sqrt()
    low, high = torch.quantile(ratios, ratios.new_tensor([0.05, 0.95])).tolist()
    return f"{float((found.mean() / published.mean()).sqrt()):.2f} [{low:.2f}, {high:.2f}]"


def rows(
    model: ScoreModel,
    mean: Tensor,
    draws: Ends,
    judged: Ends,
    names: Sequence[str],
    fitted: Sequence[str],
    kinds: Sequence[str],
    evaluations: Sequence[int],
) -> None:
    """Print a row for every solver and number of evaluations, and the best of each number."""
    head = ("evaluations", "Karras", "published", "default", "fitted", "ratio", "fit, s")
    print(f"{'':<16}" + "".join(f"{name:>12}" for name in (*head, "free", "ratio", "fit, s")))
    best: dict[tuple[int, str], list[tuple[float, str, Tensor]]] = {}
    for name in names:
        predictor = SOLVERS[name]
        for steps in evaluations:
            fixed = KarrasGrid(to_zero=True)(model.sde, steps), TangentGrid()(model.sde, steps)
            karras, default = (squares(model, predictor, t, judged) for t in fixed)
            tried = (squares(model, predictor, t, judged) for t in published_grids(steps))
            found = {"published": min(tried, key=lambda one: float(one.mean()))}
            seconds = {}
            both = ("fitted", predictor), ("free", AnalyticFirstStep(predictor, mean))
            for kind, part in both:
                if name not in fitted or kind not in kinds:
                    continue
                start = time.process_time()
                n = steps + (kind == "free")
                grid = fit_grid(model, part, draws[0], steps=n, target=draws[1])
                seconds[kind] = time.process_time() - start
                found[kind] = squares(model, part, torch.tensor(grid.times), judged)
            error = {kind: float(one.mean().sqrt()) for kind, one in found.items()}
            for kind in found:
                best.setdefault((steps, kind), []).append((error[kind], name, found[kind]))
            plain = (float(one.mean().sqrt()) for one in (karras, default))
            cells = [f"{value:.4f}" for value in plain]
            cells.insert(1, f"{error['published']:.4f}")
            for kind in KINDS:
                if kind not in seconds:
                    cells += ["", "", ""]
                    continue
                ratio = error[kind] / error["published"]
                cells += [f"{error[kind]:.4f}", f"{ratio:.2f}", f"{seconds[kind]:.1f}"]
            line = f"{name:<16}{steps:>12}" + "".join(f"{c:>12}" for c in cells)
            print(line.rstrip(), flush=True)
    for steps in evaluations:
        least = {
            kind: min(best[steps, kind], key=lambda one: one[0]) for kind in ("published", *kinds)
        }
        value, name, published = least["published"]
        print(f"{steps:>2} evaluations: best published {value:.4f}", end="")
        print(f" ({float(published.median().sqrt()):.4f}; {name})", end="")
        for kind in kinds:
            value, name, one = least[kind]
            print(f"; {kind} {value:.4f} ({float(one.median().sqrt()):.4f}; {name})", end="")
            print(f", ratio {interval(one, published)}", end="")
        print(flush=True)
    print(flush=True)


def ends(model: ScoreModel, count: int, shape: tuple[int, ...], seed: int, tight: bool) -> Ends:
    """Return states at T (count, *shape), and where the probability flow takes them."""
    z = model.sde.prior_sample((count, *shape), generator=seeded(seed))
    tolerance = 1e-6 if tight else 1e-5
    flow = ProbabilityFlow(model, "dopri5", tolerance, tolerance)
    return z, torch.cat([flow.sample(part) for part in torch.split(z, 256)])


def main() -> None:
    """Print a table for each network and one for the mixture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--train-steps", type=int, default=3000, help="training steps on digits")
    add("--glyph-steps", type=int, default=1000, help="training steps on glyphs")
    add("--draws", type=int, default=512, help="draws for a fit, half of them held out")
    add("--test-draws", type=int, default=1024, help="draws for the evaluation")
    add("--evaluations", type=int, nargs="+", default=[6, 8, 10])
    add("--only", choices=("network", "glyphs", "mixture"), help="one of the tables")
    add("--solvers", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    add("--fitted", choices=SOLVERS, nargs="+", help="solvers to fit, by default all")
    add("--kinds", choices=KINDS, nargs="+", default=list(KINDS), help="kinds of fits")
    args = parser.parse_args()
    data = load()
    digits = data.train.flatten(1)

    def table(
        title: str, model: ScoreModel, shape: tuple[int, ...], draws: int, judged: int
    ) -> None:
        print(title, flush=True)
        fit, test = (
            ends(model, count, shape, seed, tight)
            for count, seed, tight in ((draws, 0, False), (judged, 100, True))
        )
        mean = mean_prediction(model, shape)
        fitted = args.fitted or args.solvers
        rows(model, mean, fit, test, args.solvers, fitted, args.kinds, args.evaluations)

    if args.only in (None, "network"):
        model = train(data, args.train_steps, 0)
        table("Network trained on digits", model, (64,), args.draws, args.test_draws)
    if args.only in (None, "glyphs"):
        images = glyph_images()
        few = args.draws // 4, args.test_draws // 8
        model = glyph_network(images, args.glyph_steps)
        table("U-Net trained on glyphs of 16 x 16", model, (1, 16, 16), *few)
    if args.only in (None, "mixture"):
        title = "Mixture of forty Gaussians in 64 dimensions"
        table(title, mixture(digits), (64,), args.draws, args.test_draws)


if __name__ == "__main__":
    main()
