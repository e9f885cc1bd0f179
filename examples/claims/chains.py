"""Improved DDPM on 256 levels: where the bits of the cosine schedule are, and few sampling steps.

Nichol and Dhariwal, 2021, arXiv 2102.09672: the cosine schedule has fewer bits and better samples
than the linear one; L_hybrid has fewer bits than L_simple and keeps its samples good in 25 to 100
steps, where those of fixed variances break down; L_vlb with importance sampling has the fewest
bits. The bits are also counted by log-SNR: those above 8 concern noise finer than a grey level.

    python examples/claims/chains.py
    python examples/claims/chains.py --seeds 2 --steps 20

Small: 16x16 glyphs, chains of 1,000 steps, an ADM U-Net of width 16; 25 minutes of one CPU core
for each seed.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import EDGES, Quality, chain_bits
from presets import Run
from results import Results
from torch import Tensor

from diffusionkit import Ancestral, Clip, DenoisedModel, PCSampler

HYBRID, VLB = ("linear, hybrid", "cosine, hybrid"), ("linear, VLB", "cosine, VLB")
SIMPLE = "cosine, simple"
FEW = (25, 100)  # sampling steps
IMAGES, SAMPLES = 32, 250
BITS = f"bits per dimension, {IMAGES} test images"
FIXED = {"fixed large variance": "forward", "fixed small variance": "posterior"}
VARIANCES = {name: {"learned variance": "model"} for name in (*HYBRID, *VLB)} | {SIMPLE: FIXED}


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
    for seed, (name, variances) in product(seeds, VARIANCES.items()):
        for at in steps:
            if name != SIMPLE:
                lab.measure(name, seed, at, BITS, partial(chain_bits, count=IMAGES))
            quality = Quality(lab, name, seed, at)
            for (label, variance), few in product(variances.items(), FEW):
                draw = partial(sampler, variance=variance, steps=few)
                of = quality(f"{label}, {few}", draw, SAMPLES)
                lab.measure(name, seed, at, samples(label, few), of)


def findings(results: Results) -> list[Finding]:
    """Return the findings: bits by schedule and by log-SNR, samples by objective and steps."""
    linear, cosine = HYBRID
    parts: dict[str, Callable[[dict[str, Any]], float]] = {
        "in all": lambda bits: bits["total"],
        "from log-SNRs below 8": lambda bits: bits["total"] - bits["above"]["8"],
        "from log-SNRs above 8": lambda bits: bits["above"]["8"],
    }
    found = [
        compare(results, f"the cosine schedule has fewer bits, {part}", "bits/dim, L_hybrid",
                (cosine, BITS), (linear, BITS), -1, value=value, labels=("cosine", "linear"))
        for part, value in parts.items()
    ]  # fmt: skip

    def distance(quality: dict[str, float]) -> float:
        return quality["frechet"]

    for few in FEW:
        for fixed in FIXED:
            found.append(compare(
                results, f"L_hybrid has better samples than L_simple in {few} steps, {fixed}",
                "glyph Fréchet distance, cosine", (cosine, samples("learned variance", few)),
                (SIMPLE, samples(fixed, few)), -1, value=distance, labels=("hybrid", "simple"),
            ))  # fmt: skip
    for few in FEW:
        learned = samples("learned variance", few)
        found.append(compare(
            results, f"the cosine schedule has better samples in {few} steps",
            "glyph Fréchet distance, L_hybrid", (cosine, learned), (linear, learned), -1,
            value=distance, labels=("cosine", "linear"),
        ))  # fmt: skip
    for hybrid, vlb in zip(HYBRID, VLB, strict=True):
        schedule = hybrid.partition(",")[0]
        found.append(compare(
            results, f"L_vlb with resampling has fewer bits than L_hybrid, {schedule}", "bits/dim",
            (vlb, BITS), (hybrid, BITS), -1, value=parts["in all"], labels=("VLB", "hybrid"),
        ))  # fmt: skip
    return found


def draw(results: Results) -> Figure:
    """Plot the bits by log-SNR, and the Fréchet distance against the number of steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = dict(zip((*HYBRID, *VLB, SIMPLE), ("C1", "C0", "C3", "C4", "C2"), strict=True))
    for name in (*HYBRID, *VLB):
        for at in results.steps(name, BITS)[-1:]:
            for number, bits in enumerate(results.seeds(name, at, BITS).values()):
                above = [bits["above"][f"{edge:g}"] for edge in EDGES]
                left.plot(EDGES, above, color=colors[name], alpha=0.7,
                          label=None if number else name)  # fmt: skip
    left.axvline(8, color="gray", linestyle=":", linewidth=0.8)
    left.set(xlabel="log-SNR", ylabel="bits/dim from above this log-SNR")
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8)
    for name, variances in VARIANCES.items():
        for label in variances:
            for at in results.steps(name, samples(label, FEW[0]))[-1:]:
                by_seed = [results.seeds(name, at, samples(label, few)) for few in FEW]
                for number, seed in enumerate(sorted(set.intersection(*map(set, by_seed)))):
                    right.plot(FEW, [table[seed]["frechet"] for table in by_seed], marker="o",
                               color=colors[name], alpha=0.7,
                               linestyle="--" if "large" in label else "-",
                               label=None if number else f"{name}, {label}")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="glyph Fréchet distance")
    right.set_xticks([], minor=True)
    right.set_xticks(FEW, [str(few) for few in FEW])
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "chains", "Improved DDPM", ("2102.09672",), 3, (800,), (100_000,), measure, findings, draw
)

if __name__ == "__main__":
    CLAIM.main(__doc__)
