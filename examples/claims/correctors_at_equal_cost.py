"""Predictor and corrector against the predictor alone at equal numbers of evaluations, with VE.

Song et al., 2021, arXiv 2011.13456, table 1: at equal computation, a step of the corrector after
each step of the predictor gives better samples than twice as many steps of the predictor (P2000
against PC1000), with the reverse diffusion and the ancestral sampler.

    python examples/claims/correctors_at_equal_cost.py
    python examples/claims/correctors_at_equal_cost.py --seeds 2 --steps 20

Small: 16x16 glyphs, an NCSN++ of width 16, 100 and 200 evaluations; 8 minutes of one CPU core for
each seed. Full: 200 to 2,000 evaluations.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import Quality
from presets import Run
from results import Results
from torch import Tensor

from diffusionkit import Langevin, PCSampler, Predictor, ReverseDiffusion

EVALUATIONS = {"small": (100, 200), "full": (200, 500, 1000, 2000)}
SAMPLES = {"small": 250, "full": 5000}
PREDICTORS: dict[str, Predictor] = {"reverse diffusion": ReverseDiffusion()}
SNR = 0.16
KINDS = ("P", "PC")


def name_of(predictor: str, kind: str, evaluations: int, count: int) -> str:
    """Return the name of a measure."""
    return f"{kind}, {predictor}, {evaluations} evaluations, {count} samples"


def sampler(run: Run, predictor: str, kind: str, count: int) -> Callable[..., Tensor]:
    """Return the sampler with a number of evaluations, the last of which denoises."""
    step = PREDICTORS[predictor]
    if kind == "P":
        return PCSampler(run.model, step, steps=count - 1)
    corrector = Langevin(snr=SNR, norm="batch")
    return PCSampler(run.model, step, corrector, steps=count // 2)


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train the network, and sample with both at each number of evaluations."""
    count = SAMPLES[lab.scale]
    for seed, at in product(seeds, steps):
        quality = Quality(lab, "VE", seed, at)
        for evaluations, label, kind in product(EVALUATIONS[lab.scale], PREDICTORS, KINDS):
            name = name_of(label, kind, evaluations, count)
            draw = partial(sampler, predictor=label, kind=kind, count=evaluations)
            lab.measure("VE", seed, at, name, quality(name, draw, count))


def findings(results: Results) -> list[Finding]:
    """Return the findings, for each number of evaluations."""
    scale = results.settings.get("scale", "small")
    found = []
    for evaluations in EVALUATIONS[scale]:
        for label in PREDICTORS:
            alone, both = (name_of(label, kind, evaluations, SAMPLES[scale]) for kind in KINDS)
            found.append(compare(
                results, f"a corrector is better than more steps, {evaluations} evaluations",
                f"glyph Fréchet distance, VE, {label}", ("VE", both), ("VE", alone), -1,
                value=lambda quality: quality["frechet"], labels=("PC", "P"),
            ))  # fmt: skip
    return found


def draw(results: Results) -> Figure:
    """Plot the Fréchet distance against the number of evaluations."""
    scale = results.settings.get("scale", "small")
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for place, label in enumerate(PREDICTORS):
        for kind, style in zip(KINDS, ("--", "-"), strict=True):
            by_seed: dict[int, list[tuple[int, float]]] = {}
            for evaluations in EVALUATIONS[scale]:
                name = name_of(label, kind, evaluations, SAMPLES[scale])
                for at in results.steps("VE", name)[-1:]:
                    for seed, quality in results.seeds("VE", at, name).items():
                        by_seed.setdefault(seed, []).append((evaluations, quality["frechet"]))
            for number, points in enumerate(by_seed.values()):
                axes.plot(*zip(*points, strict=True), style, marker="o", color=f"C{place}",
                          alpha=0.7, label=None if number else f"{kind}, {label}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="network evaluations",
             ylabel="glyph Fréchet distance")  # fmt: skip
    axes.set_xticks([], minor=True)
    axes.set_xticks(EVALUATIONS[scale], [str(n) for n in EVALUATIONS[scale]])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "correctors_at_equal_cost", "Predictor and corrector", ("2011.13456",), 3, (800,), (100_000,),
    measure, findings, draw,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
