"""Likelihood weighting, with and without importance sampling; likelihoods of three processes.

Song et al., 2021, arXiv 2101.09258: likelihood weighting (LW) lowers the bound, and importance
sampling (IS) of its times lowers the variance of its loss and the bound further. At few steps LW
without IS is worse than no weighting, since its weight spans four decades; the question is whether
and when the curves cross, with and without clipping of the gradient. Song et al., 2021, arXiv
2011.13456, table 2: sub-VP has fewer bits than VP, by the probability flow.

    python examples/claims/maximum_likelihood.py
    python examples/claims/maximum_likelihood.py --seeds 2 --steps 20 40

Small: dequantized 16x16 glyphs, DDPM++ (VP, sub-VP) and NCSN++ (VE) of width 16; 14 minutes of one
CPU core for each seed and 1,200 steps.
"""

from collections.abc import Iterable

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import bound, ode_bits
from results import Results

WEIGHTINGS = ("VP", "VP, LW", "VP, LW, no clipping", "VP, LW + IS")
PROCESSES = ("VP", "sub-VP", "VE")
IMAGES, DRAWS, FLOW_IMAGES, TOLERANCE = 500, 20, 64, 1e-3
BOUND = f"bound, bits per dimension, {IMAGES} test images"
FLOW = f"probability flow, bits per dimension, {FLOW_IMAGES} test images"


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train every weighting and process; measure the bound, and the flow's bits at the end."""
    for seed in seeds:
        for name in dict.fromkeys((*WEIGHTINGS, *PROCESSES)):
            for at in steps:
                lab.measure(name, seed, at, BOUND, lambda run: bound(run, IMAGES, DRAWS))
                if at == steps[-1]:
                    lab.measure(
                        name, seed, at, FLOW, lambda run: ode_bits(run, FLOW_IMAGES, TOLERANCE)
                    )


def bits(found: dict[str, float]) -> float:
    """Return the mean bits over images."""
    return found["mean"]


def findings(results: Results) -> list[Finding]:
    """Return the findings: weightings at each number of steps, processes at the last."""
    found = []
    plain, weighted, unclipped, sampled = WEIGHTINGS
    for at in results.steps(plain, BOUND):
        for claim, a, b in (
            ("LW with IS lowers the bound", sampled, plain),
            ("LW without IS lowers the bound", weighted, plain),
            ("LW without IS or clipping lowers the bound", unclipped, plain),
            ("IS lowers the bound of LW", sampled, weighted),
        ):
            found.append(compare(
                results, f"{claim}, {at} steps", "bits/dim, VP", (a, BOUND), (b, BOUND), -1,
                value=bits, steps=at, labels=(a.partition(", ")[2], b.partition(", ")[2] or "none"),
            ))  # fmt: skip
    found.append(compare(
        results, "LW with IS lowers the bits of the probability flow", "bits/dim, VP",
        (sampled, FLOW), (plain, FLOW), -1, value=bits, labels=("LW + IS", "none"),
    ))  # fmt: skip
    for process, other in (("sub-VP", "VP"), ("VE", "VP")):
        for name, key in (("bound", BOUND), ("probability flow", FLOW)):
            found.append(compare(
                results, f"{process} has fewer bits than {other} by the {name}", "bits/dim",
                (process, key), (other, key), -1 if process == "sub-VP" else 1, value=bits,
            ))  # fmt: skip
    return [one for one in found if one.found is not None or "no clipping" not in one.a]


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
    left.set(xlabel="training steps", ylabel="bound, bits/dim")
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8)
    for number, name in enumerate(PROCESSES):
        for key, marker in ((BOUND, "o"), (FLOW, "x")):
            for at in results.steps(name, key)[-1:]:
                values = [value["mean"] for value in results.seeds(name, at, key).values()]
                right.plot([number] * len(values), values, marker, color="C0" if marker == "o"
                           else "C1", label=None if number else key.partition(",")[0])  # fmt: skip
    right.set_xticks(range(len(PROCESSES)), PROCESSES)
    right.set_ylabel("bits/dim")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "maximum_likelihood", "Maximum likelihood", ("2101.09258", "2011.13456"), 3, (800,),
    (50_000, 100_000, 200_000), measure, findings, draw,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
