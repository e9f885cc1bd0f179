"""Stable targets: their variance on glyphs, and the error by noise level of networks.

Xu et al., 2023, arXiv 2302.00670: the variance of the stable target is far below that of the
denoising target, most of all at intermediate noise, and networks trained on it learn better and
faster there, and have better samples. The variances need no training and are those of the data set
itself. The same network is trained with either target, from equal seeds, with EDM, VE and VP; the
error on the same noisy test images is compared noise level by noise level, and samples of EDM by
Heun's method, of VE by the probability flow.

    python examples/claims/stable_targets.py
    python examples/claims/stable_targets.py --seeds 5 --steps 1000 2000 \
        --only EDM "EDM, stable target"
    python examples/claims/stable_targets.py --seeds 2 --steps 100

Small: 16x16 glyphs, a DDPM++ or NCSN++ of width 16; 20 minutes of one CPU core for each seed,
and 10 minutes for the variances.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from operator import itemgetter

import torch
from experiment import Claim, Finding, Lab, compare
from intervals import interval
from matplotlib.figure import Figure
from measures import Quality, loss_by_noise, rounded
from presets import Run
from results import Results
from torch import Tensor

from diffusionkit import EDMSDE, Heun, KarrasGrid, PCSampler, ProbabilityFlow
from diffusionkit.data import glyphs
from diffusionkit.diagnostics import dsm_variance, posterior_divergence, stf_variance

SIZES = (64, 1024, 4096)  # of the reference, for the variances
LEVELS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)  # of noise
# The variance of the denoising target is largest at intermediate noise: from 1.2 at .7 to 2 at 5.
INTERVALS = {"low": (0.0, 0.9), "intermediate": (0.9, 5.5), "high": (5.5, 100.0)}
PROCESSES = ("EDM", "VE", "VP")
IMAGES, STATES = 1000, 400  # test images for losses, noisy states for variances
LOSS = f"error by noise level, {IMAGES} test images"
# Samplers of the paper's table 1, and numbers of samples.
SAMPLES = {
    "EDM": ("Heun, rho 7, 35 evaluations", 1000), "VE": ("probability flow, tolerance 1e-4", 500),
}  # fmt: skip
VARIANCES = f"variances, {STATES} states"


def variances(size: int) -> dict[str, dict[str, list[float]]]:
    """Return the variances of targets, in units of the noise, with standard errors."""
    data = glyphs("train", size=size)
    x = torch.stack([data[i][0] for i in range(len(data))]).float() / 127.5 - 1
    sde, t = EDMSDE(sigma_max=50.0), torch.tensor(LEVELS, dtype=torch.float64)

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    found = {"denoising": dsm_variance(sde, x, t, units="noise", samples=STATES, generator=seed())}
    for n in SIZES:
        found[f"stable, n = {n}"] = stf_variance(
            sde, x, t, n, units="noise", samples=STATES, draws=1, generator=seed()
        )
    found["total variation"] = posterior_divergence(
        sde, x, t, kind="tv", samples=STATES, generator=seed()
    )
    found["f-divergence"] = posterior_divergence(sde, x, t, samples=STATES, generator=seed())
    return {
        name: {"value": [rounded(v) for v in estimate.value.tolist()],
               "stderr": [rounded(v) for v in estimate.stderr.tolist()]}
        for name, estimate in found.items()
    }  # fmt: skip


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Measure the variances; train each process with both targets."""
    size = 16 if lab.scale == "small" else 32
    lab.note("data", 0, 0, lambda: {VARIANCES: variances(size)})
    for process, seed, at in product(PROCESSES, tuple(seeds), steps):
        for name in (process, stable(process)):
            lab.measure(name, seed, at, LOSS, errors)
            if process in SAMPLES and at == steps[-1]:
                text = samples(process)
                quality = Quality(lab, name, seed, at)(text, sampler, SAMPLES[process][1])
                lab.measure(name, seed, at, text, quality)


def stable(process: str) -> str:
    """Return the recipe of a process with stable targets."""
    return f"{process}, stable target"


def samples(process: str) -> str:
    """Return the name of the measure of a process's samples."""
    sampled, count = SAMPLES[process]
    return f"{sampled}, {count} samples"


def sampler(run: Run) -> Callable[..., Tensor]:
    """Return Heun's method for EDM, and the solver of the probability flow for another process."""
    if isinstance(run.model.sde, EDMSDE):
        return PCSampler(run.model, Heun(), grid=KarrasGrid(7.0, to_zero=True), steps=18)
    return ProbabilityFlow(run.model, rtol=1e-4, atol=1e-4).sample


def errors(run: Run) -> dict[str, float]:
    """Return the errors of a run by noise level."""
    return loss_by_noise(run, LEVELS, IMAGES)


def mean_log(low: float, high: float) -> Callable[[dict[str, float]], float]:
    """Return a function of errors by noise level: 100 times their mean logarithm within limits."""

    def mean(table: dict[str, float]) -> float:
        chosen = [100 * math.log(v) for level, v in table.items() if low <= float(level) <= high]
        return statistics.fmean(chosen)

    return mean


def findings(results: Results) -> list[Finding]:
    """Return the findings: lower errors in each interval of noise, fewer steps, better samples."""
    found = []
    for process in PROCESSES:
        for name, (low, high) in INTERVALS.items():
            found.append(compare(
                results, f"stable targets lower the error at {name} noise, {process}",
                "100 log error, mean over levels", (stable(process), LOSS), (process, LOSS), -1,
                value=mean_log(low, high), digits=2, labels=("stable", "denoising"),
            ))  # fmt: skip
    found.append(fewer_steps(results, "EDM", "intermediate"))
    for process in SAMPLES:
        text = samples(process)
        found.append(compare(
            results, f"stable targets have better samples, {process}",
            f"glyph Fréchet distance, {text}", (stable(process), text), (process, text), -1,
            value=itemgetter("frechet"), labels=("stable", "denoising"),
        ))  # fmt: skip
    return found


def fewer_steps(results: Results, process: str, name: str) -> Finding:
    """Return the finding of fewer steps to the same error, in percent of the denoising target's.

    The error is that of the denoising target at the most steps; the steps of the stable target are
    interpolated in logarithms of errors and steps from its last two errors.
    """
    error, shares = mean_log(*INTERVALS[name]), []
    plain, other = (process, LOSS), (stable(process), LOSS)
    *_, few, many = (0, 0, *results.common_steps(plain, other))
    goal, last = results.seeds(process, many, LOSS), results.seeds(stable(process), many, LOSS)
    first = results.seeds(stable(process), few, LOSS)
    for seed in sorted(goal.keys() & last.keys() & first.keys()):
        a, b = error(first[seed]), error(last[seed])
        excess = (error(goal[seed]) - b) / (a - b)
        shares.append(100 * (few / many) ** excess)
    enough = len(shares) > 1
    found = interval(share - 100 for share in shares) if enough else None
    mean = 100 + found.mean if found else math.nan
    return Finding(
        f"stable targets need fewer steps to the same error at {name} noise, {process}",
        "steps, % of those of denoising", ("stable", mean), ("denoising", 100.0), found, -1,
        many if enough else 0, digits=2,
    )  # fmt: skip


def variance_table(results: Results) -> Iterator[str]:
    """Yield the lines of the table of variances."""
    table = results.get(Results.key("data", 0, 0), VARIANCES) or {}
    yield "| noise | " + " | ".join(table) + " |"
    yield "|---" * (1 + len(table)) + "|"
    for i, level in enumerate(LEVELS):
        cells = [f"{e['value'][i]:.2g} ± {e['stderr'][i]:.1g}" for e in table.values()]
        yield f"| {level:g} | " + " | ".join(cells) + " |"


def gain_table(results: Results) -> Iterator[str]:
    """Yield the lines of the table of errors by noise level, and their change by stable targets."""
    yield "| noise | " + " | ".join(f"{p}, error | change, %" for p in PROCESSES) + " |"
    yield "|---" * (1 + 2 * len(PROCESSES)) + "|"
    for level in LEVELS:
        cells = [f"{level:g}"]
        for process in PROCESSES:
            finding = by_level(results, process, level)
            error = math.exp(finding.b[1] / 100)
            found = finding.found
            cells += ["", ""] if found is None else [
                f"{error:.2g}", f"{found.mean:+.2f} ± {found.half:.2f}",
            ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def by_level(results: Results, process: str, level: float) -> Finding:
    """Return the change of the error by stable targets at a noise level, in percent."""
    pair = (stable(process), LOSS), (process, LOSS)
    return compare(results, "", "", *pair, -1, value=mean_log(level, level))


def draw(results: Results) -> Figure:
    """Plot the variances, and the ratio of errors by noise level."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    table = results.get(Results.key("data", 0, 0), VARIANCES) or {}
    for name, estimate in table.items():
        if name not in ("total variation", "f-divergence"):
            left.errorbar(LEVELS, estimate["value"], estimate["stderr"], label=name, capsize=2)
    left.set(xscale="log", yscale="log", xlabel=r"noise $\sigma / \alpha$",
             ylabel="variance of the target, units of the noise")  # fmt: skip
    if table:
        left.legend(fontsize=8)
    for number, process in enumerate(PROCESSES):
        findings = [by_level(results, process, level) for level in LEVELS]
        shown = [(level * 1.03**number, one.found.mean, one.found.half)
                 for level, one in zip(LEVELS, findings, strict=True) if one.found]  # fmt: skip
        if shown:
            x, mean, half = zip(*shown, strict=True)
            label = f"{process}, {findings[0].steps:,} steps"
            right.errorbar(x, mean, half, marker="o", capsize=2, label=label)
    right.axhline(0, color="gray", linewidth=0.8)
    for _, high in list(INTERVALS.values())[:-1]:
        right.axvline(high, color="gray", linestyle=":", linewidth=0.8)
    right.set(xscale="log", xlim=left.get_xlim(), xlabel=r"noise $\sigma / \alpha$",
              ylabel="change of the error by stable targets, %")  # fmt: skip
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "stable_targets", "Stable targets", ("2302.00670",), 3, (800,), (100_000,), measure, findings,
    draw,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
