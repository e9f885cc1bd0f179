"""Likelihood weighting, importance sampling, learned dequantization; bits of three processes.

Song et al., 2021, arXiv 2101.09258, with VP on CIFAR-10: 3.16 bits per dimension by the probability
flow without a weighting, 3.06 with likelihood weighting (LW), 2.95 with importance sampling (IS) of
its times, which lowers the variance of the loss (section 5), and 2.83 with variational
dequantization. The paper trains for a million steps; the question is whether and when curves of few
steps cross, with and without clipping of the gradient. Song et al., 2021, arXiv 2011.13456,
table 2: sub-VP has fewer bits than VP, by the probability flow.

    python examples/claims/maximum_likelihood.py
    python examples/claims/maximum_likelihood.py --seeds 2 --steps 20 40

Small: dequantized 16x16 glyphs, DDPM++ (VP, sub-VP) and NCSN++ (VE) of width 16; 25 minutes of one
CPU core for each seed and 800 steps. The dequantizer is trained for 800 steps on a network with LW
and IS that is not changed.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise, product

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import bound, loss_variances, ode_bits
from results import Results

PLAIN, SAMPLED = "VP", "VP, LW + IS"
UNCLIPPED = ("VP, LW, no clipping", "VP, LW + IS, no clipping")
WEIGHTINGS = (PLAIN, "VP, LW", SAMPLED, *UNCLIPPED)
PROCESSES = ("VP", "sub-VP", "VE")
DEQUANTIZER = "VP, LW + IS, learned dequantizer"
PAIRS = (
    ("LW with IS lowers the bound", SAMPLED, PLAIN),
    ("LW without IS lowers the bound", "VP, LW", PLAIN),
    ("IS lowers the bound of LW", SAMPLED, "VP, LW"),
    ("LW with IS and without clipping lowers the bound", UNCLIPPED[1], PLAIN),
    ("LW without IS or clipping lowers the bound", UNCLIPPED[0], PLAIN),
    ("IS lowers the bound of LW without clipping", UNCLIPPED[1], UNCLIPPED[0]),
)
IMAGES, DRAWS, FLOW_IMAGES, TOLERANCE = 500, 20, 64, 1e-3
BOUND = f"bound, bits per dimension, {IMAGES} test images"
FLOW = f"probability flow, bits per dimension, {FLOW_IMAGES} test images"
VARIANCES = f"variances of the LW loss, {2 * IMAGES} test images, 4 draws"


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train every weighting and process; measure the bound and the bits of the flow.

    The learned dequantizer, and the variances, are measured at the first number of steps.
    """
    flow = partial(ode_bits, count=FLOW_IMAGES, tolerance=TOLERANCE)
    bits_of = partial(bound, count=IMAGES, draws=DRAWS)
    for seed in seeds:
        for name in dict.fromkeys((*WEIGHTINGS, *PROCESSES)):
            for at in steps:
                lab.measure(name, seed, at, BOUND, bits_of)
                lab.measure(name, seed, at, FLOW, flow)
        variances = partial(loss_variances, count=2 * IMAGES, draws=4)
        lab.measure(SAMPLED, seed, steps[0], VARIANCES, variances)
        lab.measure(DEQUANTIZER, seed, steps[0], BOUND, bits_of)
        lab.measure(DEQUANTIZER, seed, steps[0], FLOW, flow)


def bits(found: dict[str, float]) -> float:
    """Return the mean bits over images."""
    return found["mean"]


def log_variance(times: str) -> Callable[[dict[str, float]], float]:
    """Return a function of variances: the logarithm, base 10, of that with some times."""
    return lambda found: math.log10(found[times])


def short(name: str) -> str:
    """Return the weighting of a recipe."""
    return name.partition(", ")[2].partition(", ")[0] or "none"


def by_steps(results: Results) -> Iterator[tuple[str, list[Finding]]]:
    """Yield the findings of each pair of weightings, at all numbers of steps."""
    for claim, a, b in PAIRS:
        found = []
        for at in results.common_steps((a, BOUND), (b, BOUND)):
            labels = short(a), short(b)
            found.append(compare(
                results, f"{claim}, {at:,} steps", "bits/dim, VP", (a, BOUND), (b, BOUND), -1,
                value=bits, steps=at, labels=labels,
            ))  # fmt: skip
        yield claim, found


def findings(results: Results) -> list[Finding]:
    """Return the findings: weightings at each number of steps, processes at the last."""
    found = [one for _, pair in by_steps(results) for one in pair]
    for at in results.common_steps((PLAIN, FLOW), (SAMPLED, FLOW)):
        found.append(compare(
            results, f"LW with IS lowers the bits of the probability flow, {at:,} steps",
            "bits/dim, VP", (SAMPLED, FLOW), (PLAIN, FLOW), -1, value=bits, steps=at,
            labels=("LW + IS", "none"),
        ))  # fmt: skip
    found.append(compare(
        results, "IS lowers the variance of the LW loss", "log10 variance, network of LW + IS",
        (SAMPLED, VARIANCES), (SAMPLED, VARIANCES), -1, value=log_variance("importance"),
        value_b=log_variance("uniform"), labels=("IS", "uniform times"), digits=2,
    ))  # fmt: skip
    for name, key in (("bound", BOUND), ("bits of the probability flow", FLOW)):
        found.append(compare(
            results, f"a learned dequantizer lowers the {name}", "bits/dim, VP, LW + IS",
            (DEQUANTIZER, key), (SAMPLED, key), -1, value=bits, labels=("learned", "uniform"),
        ))  # fmt: skip
    found.append(fewer_bits(results, "sub-VP", "probability flow"))
    return found


def fewer_bits(results: Results, process: str, name: str) -> Finding:
    """Return the finding of fewer bits of a process than of VP, by the bound or the flow."""
    key = BOUND if name == "bound" else FLOW
    return compare(results, f"{process} has fewer bits than VP by the {name}", "bits/dim",
                   (process, key), (PLAIN, key), -1, value=bits)  # fmt: skip


def others(results: Results) -> list[Finding]:
    """Return comparisons of bits that the papers do not give: other bounds, and VE."""
    return [fewer_bits(results, process, name) for process, name in
            (("sub-VP", "bound"), ("VE", "bound"), ("VE", "probability flow"))]  # fmt: skip


def crossing(means: dict[int, float]) -> float | None:
    """Return the steps at which a difference by steps is zero, None if it does not change sign.

    It is interpolated linearly in the logarithm of the steps.
    """
    for a, b in pairwise(sorted(means)):
        if means[a] * means[b] < 0:
            share = means[a] / (means[a] - means[b])
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return None


def crossings(results: Results) -> Iterator[str]:
    """Yield the lines of the table of where curves of two weightings cross."""
    yield "| claim | difference of the bound by steps, bits/dim | the curves cross |"
    yield "|---|---|---|"
    for claim, pair in by_steps(results):
        shown = [one for one in pair if one.found is not None]
        means = {one.steps: one.found.mean for one in shown if one.found}
        cells = [f"{one.steps:,}: {one.found.mean:+.3f} ± {one.found.half:.3f}"
                 for one in shown if one.found]  # fmt: skip
        at = crossing(means)
        where = "not measured at two numbers of steps"
        if len(means) > 1:
            low, high = min(means), max(means)
            where = f"not between {low:,} and {high:,} steps" if at is None else (
                f"at about {float(f'{at:.1g}'):,.0f} steps, by the means"
            )  # fmt: skip
        yield f"| {claim} | {'; '.join(cells)} | {where} |"


def draw(results: Results) -> Figure:
    """Plot the bound against training steps for each weighting, and both values of each process."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(WEIGHTINGS):
        by_seed: dict[int, list[tuple[int, float]]] = {}
        for at in results.steps(name, BOUND):
            for seed, value in results.seeds(name, at, BOUND).items():
                by_seed.setdefault(seed, []).append((at, value["mean"]))
        for place, points in enumerate(by_seed.values()):
            left.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", alpha=0.7,
                      label=None if place else name)  # fmt: skip
    left.set(xscale="log", xlabel="training steps", ylabel="bound, bits/dim")
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8)
    common = results.common_steps(*product(PROCESSES, (BOUND, FLOW)))
    for at, (number, name) in product(common[-1:], enumerate(PROCESSES)):
        for key, style in ((BOUND, "oC0"), (FLOW, "xC1")):
            values = [value["mean"] for value in results.seeds(name, at, key).values()]
            label = None if number else key.partition(",")[0]
            right.plot([number] * len(values), values, style, label=label)
            right.set_title(f"{at:,} steps", fontsize=10)
    right.set_xticks(range(len(PROCESSES)), PROCESSES)
    right.set_ylabel("bits/dim")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "maximum_likelihood", "Maximum likelihood", ("2101.09258", "2011.13456"), 3, (800,),
    (50_000, 100_000, 200_000), measure, findings, draw, others,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
