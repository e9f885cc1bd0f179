"""The cheapest form of three claims, at 100 training steps: numbers that a test compares with.

A network of a new seed should have values within the spread of these, and so should differences of
pairs; the test is `test_a_new_seed_agrees_with_the_kept_ones`. At 100 steps a claim of the paper
need not hold yet: the numbers guard the library, not the claim.

    python examples/claims/guards.py
    pytest -m slow tests/examples/test_claims.py -k new_seed

10 minutes of one CPU core for five seeds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import bound, chain_bits, loss_by_noise
from presets import Run
from results import Results

LEVELS = (0.7, 3.0, 10.0)  # of noise


@dataclass(frozen=True)
class Guard:
    """A pair of recipes and a cheap measure.

    Args:
        a: the recipe that a claim says is better.
        b: the other.
        measure: the name of the measure.
        of: returns it for a run.
        value: makes a number of it.
    """

    a: str
    b: str
    measure: str
    of: Callable[[Run], Any]
    value: Callable[[Any], float]


GUARDS = {
    "cosine": Guard(
        "cosine, hybrid", "linear, hybrid", "bits per dimension, 8 test images",
        partial(chain_bits, count=8), lambda bits: float(bits["total"]),
    ),
    "importance sampling": Guard(
        "VP, LW + IS", "VP, LW", "bound, bits per dimension, 200 test images",
        partial(bound, count=200, draws=20), lambda bits: float(bits["mean"]),
    ),
    "stable targets": Guard(
        "VE, stable target", "VE", "error at noise 3, 500 test images",
        partial(loss_by_noise, noise=LEVELS, count=500), lambda errors: float(errors["3"]),
    ),
}  # fmt: skip


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train both recipes of each guard and measure them."""
    for seed, guard, at in product(tuple(seeds), GUARDS.values(), steps):
        for name in (guard.a, guard.b):
            lab.measure(name, seed, at, guard.measure, guard.of)


def findings(results: Results) -> list[Finding]:
    """Return the finding of each guard."""
    return [
        compare(results, name, guard.measure, (guard.a, guard.measure), (guard.b, guard.measure),
                -1, value=guard.value)
        for name, guard in GUARDS.items()
    ]  # fmt: skip


def draw(results: Results) -> Figure:
    """Plot the values of each guard by seed."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (title, guard) in zip(figure.subplots(1, 3), GUARDS.items(), strict=True):
        for name in (guard.a, guard.b):
            for at in results.steps(name, guard.measure)[-1:]:
                values = results.seeds(name, at, guard.measure)
                axes.plot([*values], [guard.value(v) for v in values.values()], "o", label=name)
        axes.set(title=title, xlabel="seed", ylabel=guard.measure.partition(",")[0])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return figure


CLAIM = Claim(
    "guards", "Guards", ("2102.09672", "2101.09258", "2302.00670"), 5, (100,), (100,), measure,
    findings, draw,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
