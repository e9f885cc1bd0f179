"""The cheapest form of the claims, at 100 training steps: numbers that a test compares with.

A network of a new seed should have values within the spread of these, and so should differences of
pairs; the test is `test_a_new_seed_agrees_with_the_kept_ones`. At 100 steps a claim of the paper
need not hold yet: the numbers guard the library, not the claim.

    python examples/claims/guards.py
    pytest -m slow tests/examples/test_claims.py -k new_seed

Half an hour of one CPU core for five seeds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

import colorization
import controllable
import correctors_at_equal_cost as correctors
import edm_sampling as edm
from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import Quality, bound, chain_bits, loss_by_noise
from presets import Run
from results import Results

LEVELS = (0.7, 3.0, 10.0)  # of noise
SAMPLES, EVALUATIONS = 100, 60

# Returns what measures a run, given what measures samples.
Measure = Callable[[Quality], Callable[[Run], Any]]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a recipe and a cheap measure.

    Args:
        recipe: the recipe.
        measure: the name of the measure.
        of: returns the measure.
        value: makes a number of it.
        label: the name of the side.
    """

    recipe: str
    measure: str
    of: Measure
    value: Callable[[Any], float]
    label: str

    def found(self, lab: Lab, seed: int, steps: int) -> float:
        """Return the value for a seed after a number of steps, measured if need be."""
        quality = Quality(lab, self.recipe, seed, steps)
        found = lab.measure(self.recipe, seed, steps, self.measure, self.of(quality))
        return self.value(found)


Guard = tuple[Side, Side]  # the first should have the lower value, by the claim


def recipes(
    a: str, b: str, measure: str, of: Callable[[Run], Any], value: Callable[[Any], float]
) -> Guard:
    """Return a guard of two recipes with one measure."""
    first, second = (Side(name, measure, lambda _: of, value, name) for name in (a, b))
    return first, second


def samplers(recipe: str, **drawn: Callable[[Run], Any]) -> Guard:
    """Return a guard of two samplers of one recipe, by name."""

    def side(name: str, sampler: Callable[[Run], Any]) -> Side:
        measure = f"{name}, {SAMPLES} samples"
        return Side(recipe, measure, lambda quality: quality(measure, sampler, SAMPLES),
                    itemgetter("frechet"), name)  # fmt: skip

    first, second = (side(name, sampler) for name, sampler in drawn.items())
    return first, second


def fills_in() -> Guard:
    """Return the guard of the network against the training set, for the right half."""
    task = "right half"
    measure = f"energy score of the {task}"
    of = partial(controllable.task_scores, make=controllable.right_half)
    first, second = (
        Side("VE", measure, lambda _: lambda run: {task: of(run)}, value, label)
        for value, label in ((controllable.of_network(task), "network"),
                             (controllable.of_training_set(task), "training set"))
    )  # fmt: skip
    return first, second


def colors() -> Guard:
    """Return the guard of the network against the gray image."""
    recipe, network = colorization.RECIPE, controllable.of_network(colorization.TASK)
    return (
        Side(recipe, colorization.MEASURE, lambda _: colorization.color_scores, network, "network"),
        Side(recipe, colorization.GRAY, lambda _: colorization.gray_score, float, "gray"),
    )


TOTAL = ("bits per dimension, 8 test images", partial(chain_bits, count=8), itemgetter("total"))
BOUND = ("bound, bits per dimension, 200 test images", partial(bound, count=200, draws=20),
         itemgetter("mean"))  # fmt: skip
GUARDS: dict[str, Guard] = {
    "cosine": recipes("cosine, hybrid", "linear, hybrid", *TOTAL),
    "width": recipes("cosine, hybrid", "cosine, hybrid, width 8", *TOTAL),
    "importance sampling": recipes("VP, LW + IS", "VP, LW", *BOUND),
    "sub-VP": recipes("sub-VP", "VP", *BOUND),
    "stable targets": recipes(
        "VE, stable target", "VE", "error at noise 3, 500 test images",
        partial(loss_by_noise, noise=LEVELS, count=500), itemgetter("3"),
    ),
    "corrector": samplers("VE", **{
        kind: partial(correctors.sampler, predictor="reverse diffusion", kind=kind,
                      evaluations=EVALUATIONS)
        for kind in (correctors.PC, correctors.P)
    }),
    "Heun": samplers("EDM", **{
        kind: partial(edm.sampler, name=kind, evaluations=edm.EVALUATIONS[0])
        for kind in ("Heun, rho 7", "Euler, rho 7")
    }),
    "inpainting": fills_in(),
    "colorization": colors(),
}  # fmt: skip


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train the recipes of each guard and measure them."""
    for seed, sides, at in product(tuple(seeds), GUARDS.values(), steps):
        for side in sides:
            side.found(lab, seed, at)


def findings(results: Results) -> list[Finding]:
    """Return the finding of each guard."""
    return [
        compare(results, name, a.measure, (a.recipe, a.measure), (b.recipe, b.measure), -1,
                value=a.value, value_b=b.value, labels=(a.label, b.label))
        for name, (a, b) in GUARDS.items()
    ]  # fmt: skip


def draw(results: Results) -> Figure:
    """Plot the values of each guard by seed."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    for axes, (title, sides) in zip(figure.subplots(3, 3).flat, GUARDS.items(), strict=True):
        for side in sides:
            for at in results.steps(side.recipe, side.measure)[-1:]:
                values = results.seeds(side.recipe, at, side.measure)
                axes.plot([*values], [side.value(v) for v in values.values()], "o",
                          label=side.label)  # fmt: skip
        axes.set(title=title, xlabel="seed", ylabel=sides[0].measure.partition(",")[0])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return figure


CLAIM = Claim(
    "guards", "Guards", ("2102.09672", "2101.09258", "2302.00670", "2011.13456", "2206.00364"), 5,
    (100,), (100,), measure, findings, draw,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
