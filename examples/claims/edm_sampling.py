"""EDM's sampler and weighting: quality of samples against network evaluations.

Karras et al., 2022, arXiv 2206.00364: Heun's method reaches the quality of Euler's in far fewer
evaluations; noise levels are best spaced with rho = 7, not 3 or, uniformly, 1; EDM's weighting
trains better than a uniform weight of the noise error.

    python examples/claims/edm_sampling.py
    python examples/claims/edm_sampling.py --seeds 2 --steps 20

Small: 16x16 glyphs, a DDPM++ of width 16; 15 minutes of one CPU core for each seed.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import Quality
from presets import Run
from results import Results
from stable_targets import LOSS, errors, mean_log
from torch import Tensor

from diffusionkit import Euler, Heun, KarrasGrid, PCSampler

PLAIN, UNIFORM = "EDM", "EDM, uniform weighting"
EVALUATIONS = (11, 19, 35)  # odd, for Heun's method to zero noise
SAMPLERS = {
    "Heun, rho 7": (True, 7.0), "Euler, rho 7": (False, 7.0), "Heun, rho 3": (True, 3.0),
    "Heun, rho 1": (True, 1.0),
}  # fmt: skip
SAMPLES = 250


def name_of(sampler: str, evaluations: int) -> str:
    """Return the name of a measure."""
    return f"{sampler}, {evaluations} evaluations, {SAMPLES} samples"


def sampler(run: Run, name: str, evaluations: int) -> Callable[..., Tensor]:
    """Return a sampler with a number of evaluations."""
    second, rho = SAMPLERS[name]
    steps = (evaluations + 1) // 2 if second else evaluations
    grid = KarrasGrid(rho, to_zero=True)
    return PCSampler(run.model, Heun() if second else Euler(), grid=grid, steps=steps)


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train with both weightings, and sample with every sampler."""
    for seed, name, at in product(seeds, (PLAIN, UNIFORM), steps):
        lab.measure(name, seed, at, LOSS, errors)
        quality = Quality(lab, name, seed, at)
        for kind, evaluations in product(SAMPLERS, EVALUATIONS):
            if name == PLAIN or (kind == "Heun, rho 7" and evaluations == EVALUATIONS[-1]):
                measure, draw = name_of(kind, evaluations), partial(
                    sampler, name=kind, evaluations=evaluations
                )  # fmt: skip
                lab.measure(name, seed, at, measure, quality(measure, draw, SAMPLES))


def findings(results: Results) -> list[Finding]:
    """Return the findings at each number of evaluations."""

    def distance(quality: dict[str, float]) -> float:
        return quality["frechet"]

    found = []
    text = f"glyph Fréchet distance, {SAMPLES} samples"
    others = {
        "Heun is better than Euler": "Euler, rho 7", "rho 7 is better than 3": "Heun, rho 3",
        "rho 7 is better than 1": "Heun, rho 1",
    }  # fmt: skip
    for (claim, other), evaluations in product(others.items(), EVALUATIONS):
        a, b = name_of("Heun, rho 7", evaluations), name_of(other, evaluations)
        found.append(compare(
            results, f"{claim}, {evaluations} evaluations", text, (PLAIN, a), (PLAIN, b), -1,
            value=distance, labels=("Heun, rho 7", other),
        ))  # fmt: skip
    last = name_of("Heun, rho 7", EVALUATIONS[-1])
    found.append(compare(
        results, "EDM's weighting has better samples than a uniform one", text, (PLAIN, last),
        (UNIFORM, last), -1, value=distance, labels=("EDM's", "uniform"),
    ))  # fmt: skip
    found.append(compare(
        results, "EDM's weighting has lower errors than a uniform one",
        "100 log error, mean over levels", (PLAIN, LOSS), (UNIFORM, LOSS), -1,
        value=mean_log(0.0, math.inf), labels=("EDM's", "uniform"), digits=2,
    ))  # fmt: skip
    return found


def draw(results: Results) -> Figure:
    """Plot the Fréchet distance against the number of evaluations, but not of noise images."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(kind for kind in SAMPLERS if kind != "Heun, rho 1"):
        by_seed: dict[int, list[tuple[int, float]]] = {}
        for evaluations in EVALUATIONS:
            name = name_of(kind, evaluations)
            for at in results.steps(PLAIN, name)[-1:]:
                for seed, quality in results.seeds(PLAIN, at, name).items():
                    by_seed.setdefault(seed, []).append((evaluations, quality["frechet"]))
        for number, points in enumerate(by_seed.values()):
            axes.plot(*zip(*points, strict=True), marker="o", color=f"C{place}", alpha=0.7,
                      label=None if number else kind)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="network evaluations",
             ylabel="glyph Fréchet distance")  # fmt: skip
    axes.set_xticks([], minor=True)
    axes.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "edm_sampling", "EDM", ("2206.00364",), 3, (2000,), (100_000,), measure, findings, draw
)

if __name__ == "__main__":
    CLAIM.main(__doc__)
