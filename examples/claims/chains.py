"""Improved DDPM on 256 levels: where the bits of the cosine schedule are, and few sampling steps.

Nichol and Dhariwal, 2021, arXiv 2102.09672: the cosine schedule has fewer bits and better samples
than the linear one, and longer chains have fewer bits (section 3.2 and tables 1 and 2); L_hybrid
keeps its samples good in 25 to 100 steps, where those of fixed variances, large or small, break
down (section 4, figure 8); L_vlb with importance sampling has the fewest bits (section 3.3). Bits
are also counted by log-SNR: those above 8 concern noise finer than a grey level. The paper
compares precision and recall with those of a GAN, which is not done here; they are compared between
objectives.

    python examples/claims/chains.py
    python examples/claims/chains.py --seeds 2 --steps 20

Small: 16x16 glyphs, chains of 1,000 and 4,000 steps, an ADM U-Net of width 16; 40 minutes of one
CPU core for each seed.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import EDGES, Quality, chain_bits
from presets import Run
from results import Results
from torch import Tensor

from diffusionkit import Ancestral, Clip, DenoisedModel, PCSampler

HYBRID, VLB = ("linear, hybrid", "cosine, hybrid"), ("linear, VLB", "cosine, VLB")
SIMPLE, UNIFORM = "cosine, simple", "cosine, VLB, uniform steps"
FEW = (25, 100)  # sampling steps
IMAGES, SAMPLES = 32, 250
DISTANCE = f"glyph Fréchet distance, {SAMPLES} samples"
TOTAL = itemgetter("total")
BITS = f"bits per dimension, {IMAGES} test images"
SMALL = "fixed small variance"
FIXED = {"fixed large variance": "forward", SMALL: "posterior"}
LEARNED = {"learned variance": "model"}
VARIANCES: dict[str, dict[str, str]] = {
    **dict.fromkeys((*HYBRID, *VLB, UNIFORM), LEARNED),
    SIMPLE: FIXED,
    # The means of L_hybrid with a variance that it did not learn tell which of them matters.
    HYBRID[1]: LEARNED | {SMALL: "posterior"},
}
STYLES = {"fixed large variance": "--", SMALL: ":"}
LONG = ("linear, hybrid, T = 4000", "cosine, hybrid, T = 4000")  # their bits alone


def samples(variance: str, steps: int) -> str:
    """Return the name of a measure of samples."""
    return f"samples, {variance}, {steps} steps, {SAMPLES} samples"


def sampler(run: Run, variance: Any, steps: int) -> Callable[..., Tensor]:
    """Return ancestral sampling in a subset of the chain's steps, with clipping."""
    chain: Any = run.model.sde
    model = DenoisedModel(run.model, Clip())
    return PCSampler(model, Ancestral(variance), grid=chain.respaced(str(steps)))


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train every chain and objective; count bits, and draw samples in few steps."""
    seeds = tuple(seeds)
    for seed, (name, variances) in product(seeds, VARIANCES.items()):
        for at in steps:
            if name != SIMPLE:
                lab.measure(name, seed, at, BITS, partial(chain_bits, count=IMAGES))
            quality = Quality(lab, name, seed, at)
            for (label, variance), few in product(variances.items(), FEW):
                draw = partial(sampler, variance=variance, steps=few)
                of = quality(f"{label}, {few}", draw, SAMPLES)
                lab.measure(name, seed, at, samples(label, few), of)
    for seed, name in product(seeds, LONG):
        lab.measure(name, seed, steps[-1], BITS, partial(chain_bits, count=IMAGES))


def findings(results: Results) -> list[Finding]:
    """Return the findings: bits by schedule and objective, samples by objective and steps."""
    linear, cosine = HYBRID
    found = [compare(
        results, "the cosine schedule has fewer bits", "bits/dim, L_hybrid", (cosine, BITS),
        (linear, BITS), -1, value=TOTAL, labels=("cosine", "linear"),
    )]  # fmt: skip
    for name, one, short in zip(("linear", "cosine"), LONG, HYBRID, strict=True):
        found.append(compare(
            results, f"chains of 4,000 steps have fewer bits than those of 1,000, {name}",
            "bits/dim, L_hybrid", (one, BITS), (short, BITS), -1, value=TOTAL,
            labels=("4,000", "1,000"),
        ))  # fmt: skip
    found.append(compare(
        results, "the cosine schedule has fewer bits in chains of 4,000 steps",
        "bits/dim, L_hybrid", (LONG[1], BITS), (LONG[0], BITS), -1, value=TOTAL,
        labels=("cosine", "linear"),
    ))  # fmt: skip
    for few in FEW:
        for fixed in FIXED:
            found.append(compare(
                results, f"L_hybrid has better samples than L_simple in {few} steps, {fixed}",
                f"{DISTANCE}, cosine", (cosine, samples("learned variance", few)),
                (SIMPLE, samples(fixed, few)), -1, value=itemgetter("frechet"),
                labels=("hybrid", "simple"),
            ))  # fmt: skip
    for few in FEW:
        learned = samples("learned variance", few)
        found.append(compare(
            results, f"the cosine schedule has better samples in {few} steps",
            f"{DISTANCE}, L_hybrid", (cosine, learned), (linear, learned), -1,
            value=itemgetter("frechet"), labels=("cosine", "linear"),
        ))  # fmt: skip
    for hybrid, vlb in zip(HYBRID, VLB, strict=True):
        schedule = hybrid.partition(",")[0]
        found.append(compare(
            results, f"L_vlb has fewer bits than L_hybrid, {schedule}", "bits/dim", (vlb, BITS),
            (hybrid, BITS), -1, value=TOTAL, labels=("VLB", "hybrid"),
        ))  # fmt: skip
        learned = samples("learned variance", FEW[-1])
        found.append(compare(
            results, f"L_hybrid has better samples than L_vlb, {schedule}",
            f"{DISTANCE}, {FEW[-1]} steps", (hybrid, learned), (vlb, learned), -1,
            value=itemgetter("frechet"), labels=("hybrid", "VLB"),
        ))  # fmt: skip
    found.append(compare(
        results, "resampled steps lower the bits of L_vlb", "bits/dim, cosine", (VLB[1], BITS),
        (UNIFORM, BITS), -1, value=TOTAL, labels=("resampled", "uniform"),
    ))  # fmt: skip
    return found


def others(results: Results) -> list[Finding]:
    """Return comparisons that the paper does not make: parts of bits, variances, recall."""
    parts: dict[str, Callable[[dict[str, Any]], float]] = {
        "below": lambda bits: bits["total"] - bits["above"]["8"],
        "above": lambda bits: bits["above"]["8"],
    }
    found = [
        compare(results, f"the cosine schedule has fewer bits from log-SNRs {part} 8",
                "bits/dim, L_hybrid", (HYBRID[1], BITS), (HYBRID[0], BITS), -1, value=value,
                labels=("cosine", "linear"))
        for part, value in parts.items()
    ]  # fmt: skip
    for few in FEW:
        found.append(compare(
            results, f"a learned variance is better than the small one, same network, {few} steps",
            f"{DISTANCE}, cosine, L_hybrid",
            (HYBRID[1], samples("learned variance", few)), (HYBRID[1], samples(SMALL, few)), -1,
            value=itemgetter("frechet"), labels=("learned", "small"),
        ))  # fmt: skip
    for few in FEW:
        found.append(compare(
            results, f"the means of L_hybrid are better than those of L_simple in {few} steps",
            f"{DISTANCE}, cosine, fixed small variance",
            (HYBRID[1], samples(SMALL, few)), (SIMPLE, samples(SMALL, few)), -1,
            value=itemgetter("frechet"), labels=("hybrid", "simple"),
        ))  # fmt: skip
    for part, few in product(("precision", "recall"), FEW):
        found.append(compare(
            results, f"L_hybrid has higher {part} than L_simple in {few} steps, fixed large "
            "variance", f"{part}, cosine", (HYBRID[1], samples("learned variance", few)),
            (SIMPLE, samples("fixed large variance", few)), 1,
            value=itemgetter(part), labels=("hybrid", "simple"),
        ))  # fmt: skip
    return found


def draw(results: Results) -> Figure:
    """Plot the bits by log-SNR, and the Fréchet distance against the number of steps."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = dict(zip((*HYBRID, *VLB, SIMPLE), ("C1", "C0", "C3", "C4", "C2"), strict=True))
    bounded = results.common_steps(*product((*HYBRID, *VLB), [BITS]))
    for at, name in product(bounded[-1:], (*HYBRID, *VLB)):
        for number, bits in enumerate(results.seeds(name, at, BITS).values()):
            above = [bits["above"][f"{edge:g}"] for edge in EDGES]
            left.plot(EDGES, above, color=colors[name], alpha=0.7,
                      label=None if number else name)  # fmt: skip
    left.axvline(8, color="gray", linestyle=":", linewidth=0.8)
    left.set(xlabel="log-SNR", ylabel="bits/dim from above this log-SNR")
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8)
    kinds = [(name, label) for name, variances in VARIANCES.items() for label in variances]
    sampled = results.common_steps(*(
        (name, samples(label, few)) for (name, label), few in product(kinds, FEW)
    ))  # fmt: skip
    for at, (name, label) in product(sampled[-1:], kinds):
        by_seed = [results.seeds(name, at, samples(label, few)) for few in FEW]
        for number, seed in enumerate(sorted(set.intersection(*map(set, by_seed)))):
            right.plot(FEW, [table[seed]["frechet"] for table in by_seed], marker="o",
                       color=colors[name], alpha=0.7, linestyle=STYLES.get(label, "-"),
                       label=None if number else f"{name}, {label}")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="glyph Fréchet distance")
    right.set_xticks([], minor=True)
    right.set_xticks(FEW, [str(few) for few in FEW])
    if right.get_legend_handles_labels()[0]:
        figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


CLAIM = Claim(
    "chains", "Improved DDPM", ("2102.09672",), 3, (800,), (100_000,), measure, findings, draw,
    others,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
