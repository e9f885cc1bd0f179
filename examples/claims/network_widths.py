"""Bits and quality of samples against the operations of networks of several widths.

Nichol and Dhariwal, 2021, arXiv 2102.09672, section 6: networks of 64 to 192 channels, trained with
L_hybrid on ImageNet 64x64, have lower FID and fewer bits the more operations they were trained
with; FID against operations is close to a power law, bits less so. Here networks of three widths
are trained for equal numbers of steps.

    python examples/claims/network_widths.py
    python examples/claims/network_widths.py --seeds 2 --steps 20

Small: 16x16 glyphs, the cosine schedule in 1,000 steps, ADM U-Nets of width 8, 16 and 24; 12
minutes of one CPU core for each seed. Full: width 64, 128 and 192.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise, product
from operator import itemgetter
from typing import Any

import torch
from chains import IMAGES, sampler
from experiment import Claim, Finding, Lab, compare
from intervals import interval
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from measures import Quality, chain_bits
from presets import Run
from recipes import WIDTHS
from results import Results
from torch.utils.flop_counter import FlopCounterMode

STEPS, SAMPLES = 100, 500  # of sampling
BITS = f"bits per dimension, {IMAGES} test images"
QUALITY = f"samples, learned variance, {STEPS} steps, {SAMPLES} samples"
OPERATIONS = "operations of training"


def operations(run: Run) -> float:
    """Return the operations of training: those of a forward pass, twice as many backward."""
    data, batch = run.settings["data"], run.settings["training"]["batch"]
    x = torch.zeros(1, data["channels"], data["size"], data["size"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.parts.network.cpu()(x, torch.zeros(1))
    forward: int = counter.get_total_flops()
    return 3.0 * forward * int(batch) * run.step


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train networks of each width; count operations and bits, and draw samples."""
    for seed, name, at in product(tuple(seeds), WIDTHS, steps):
        lab.measure(name, seed, at, BITS, partial(chain_bits, count=IMAGES))
        draw = partial(sampler, variance="model", steps=STEPS)
        quality = Quality(lab, name, seed, at)(f"learned variance, {STEPS}, scaling", draw, SAMPLES)
        lab.measure(name, seed, at, QUALITY, quality)
        lab.measure(name, seed, at, OPERATIONS, operations)


VALUES: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "bits/dim": (BITS, itemgetter("total")),
    f"glyph Fréchet distance, {SAMPLES} samples": (QUALITY, itemgetter("frechet")),
}


def slope(results: Results, label: str) -> Finding:
    """Return the finding of a negative exponent of a power law, by seed."""
    key, value = VALUES[label]
    exponents: list[float] = []
    at = max(results.common_steps(*((name, key) for name in WIDTHS)), default=0)
    tables = {name: results.seeds(name, at, key) for name in WIDTHS}
    costs = {name: results.seeds(name, at, OPERATIONS) for name in WIDTHS}
    for seed in sorted(set.intersection(*(t.keys() & costs[n].keys() for n, t in tables.items()))):
        x = [math.log(costs[name][seed]) for name in WIDTHS]
        y = [math.log(value(tables[name][seed])) for name in WIDTHS]
        exponents.append(exponent(x, y))
    found = interval(exponents) if len(exponents) > 1 else None
    mean = found.mean if found else float("nan")
    return Finding("it falls with the operations of training", f"exponent of {label}",
                   ("exponent", mean), ("none", 0.0), found, -1, at if found else 0)  # fmt: skip


def exponent(x: list[float], y: list[float]) -> float:
    """Return the slope of the least-squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def findings(results: Results) -> list[Finding]:
    """Return the findings: each width against the one before, and the exponents."""
    found = []
    for label, (key, value) in VALUES.items():
        for (small, few), (large, many) in pairwise(WIDTHS.items()):
            found.append(compare(
                results, f"width {many} is better than {few}", label, (large, key), (small, key),
                -1, value=value, labels=(str(many), str(few)),
            ))  # fmt: skip
        found.append(slope(results, label))
    return found


def draw(results: Results) -> Figure:
    """Plot bits and the Fréchet distance against the operations of training."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (label, (key, value)) in zip(figure.subplots(1, 2), VALUES.items(), strict=True):
        for place, (name, width) in enumerate(WIDTHS.items()):
            for at in results.common_steps(*product(WIDTHS, (OPERATIONS, key)))[-1:]:
                costs, tables = (results.seeds(name, at, m) for m in (OPERATIONS, key))
                seeds = sorted(costs.keys() & tables.keys())
                axes.plot([costs[s] for s in seeds], [value(tables[s]) for s in seeds], "o",
                          color=f"C{place}", label=f"width {width}")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="operations of training", ylabel=label)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "network_widths", "Width of the network", ("2102.09672",), 3, (800,), (100_000,), measure,
    findings, draw,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
