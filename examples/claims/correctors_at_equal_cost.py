"""Predictor and corrector against the predictor alone at equal numbers of evaluations, with VE.

Song et al., 2021, arXiv 2011.13456, table 1 (CIFAR-10, VE, FID): P2000, a predictor of 2,000 steps,
has 4.88 with the ancestral and 4.74 with the reverse diffusion sampler; PC1000, 1,000 steps of each
followed by one of the corrector, 3.62 and 3.60; C2000, the corrector alone, 20.43. All cost 2,000
evaluations, and one for the last denoising step, as they do here. The corrector has the paper's
signal-to-noise ratio for CIFAR-10, .16, which was not tuned for glyphs.

    python examples/claims/correctors_at_equal_cost.py
    python examples/claims/correctors_at_equal_cost.py --seeds 2 --steps 20

Small: 16x16 glyphs, an NCSN++ of width 16; 35 minutes of one CPU core for each seed, of which 8 are
those of 1,000 samples in 200 evaluations. Full: 200 to 2,000 evaluations.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product

from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import Quality
from presets import Run
from results import Results

from diffusionkit import Ancestral, Langevin, PCSampler, Predictor, ReverseDiffusion

# Predictor, evaluations without that of the last denoising step, and samples. What matters most
# comes first, for a budget that ends early.
BUDGETS = {
    "small": (
        ("reverse diffusion", 200, 1000), ("reverse diffusion", 1000, 250), ("ancestral", 200, 500),
        ("reverse diffusion", 100, 500),
    ),
    "full": tuple(product(("reverse diffusion", "ancestral"), (200, 500, 1000, 2000), (5000,))),
}  # fmt: skip
PREDICTORS: dict[str, Predictor] = {
    "reverse diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
}
SNR = 0.16
P, PC, C = "P", "PC", "C"
FLOOR = "glyph Fréchet distance of training images"


def kinds(predictor: str, evaluations: int) -> tuple[str, ...]:
    """Return the kinds of sampling with a predictor.

    The corrector alone needs none, and in fewer than 200 evaluations it draws noise.
    """
    return (P, PC, C) if predictor == "reverse diffusion" and evaluations >= 200 else (P, PC)


def name_of(predictor: str, kind: str, evaluations: int, count: int) -> str:
    """Return the name of a measure."""
    return f"{kind}, {predictor}, {evaluations} + 1 evaluations, {count} samples"


def sampler(run: Run, predictor: str, kind: str, evaluations: int) -> PCSampler:
    """Return the sampler with a number of evaluations, and one for the last denoising step."""
    step = None if kind == C else PREDICTORS[predictor]
    corrector = None if kind == P else Langevin(snr=SNR, norm="batch")
    steps = evaluations // 2 if kind == PC else evaluations
    return PCSampler(run.model, step, corrector, steps=steps)


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train the network, and sample with each kind and number of evaluations.

    The samples of a seed have the same initial noise, whatever the sampler.
    """
    seeds = tuple(seeds)
    for (predictor, evaluations, count), seed, at in product(BUDGETS[lab.scale], seeds, steps):
        quality = Quality(lab, "VE", seed, at)
        for kind in kinds(predictor, evaluations):
            name = name_of(predictor, kind, evaluations, count)
            draw = partial(sampler, predictor=predictor, kind=kind, evaluations=evaluations)
            lab.measure("VE", seed, at, name, quality(name, draw, count))
    for at in steps:
        lab.measure("VE", seeds[0], at, FLOOR, Quality(lab, "VE", seeds[0], at).floors)


def findings(results: Results) -> list[Finding]:
    """Return the findings for each budget: PC against P, and against the corrector alone."""
    found = []
    for predictor, evaluations, count in BUDGETS[results.settings.get("scale", "small")]:
        names = {kind: name_of(predictor, kind, evaluations, count) for kind in (P, PC, C)}
        for kind, claim in ((P, "than the predictor alone"), (C, "than the corrector alone")):
            if kind in kinds(predictor, evaluations):
                found.append(compare(
                    results, f"predictor and corrector are better {claim}, {evaluations:,} "
                    f"evaluations, {predictor}", f"glyph Fréchet distance, {count:,} samples",
                    ("VE", names[PC]), ("VE", names[kind]), -1,
                    value=lambda quality: quality["frechet"], labels=("PC", kind),
                ))  # fmt: skip
    return found


def floor(results: Results) -> Iterator[str]:
    """Yield a sentence of the distances that training images have."""
    tables = [table for at in results.steps("VE", FLOOR)[-1:]
              for table in results.seeds("VE", at, FLOOR).values()]  # fmt: skip
    for table in tables[:1]:
        parts = [f"{value:.2f} with {int(count):,}" for count, value in table.items()]
        yield f"Training images have distances of {', '.join(parts)} images."


def draw(results: Results) -> Figure:
    """Plot the Fréchet distance of each seed, for each budget and kind of sampling."""
    budgets = sorted(
        BUDGETS[results.settings.get("scale", "small")],
        key=lambda budget: (budget[0] == "ancestral", budget[1]),
    )
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes, marks = figure.subplots(), {P: "o", PC: "s", C: "x"}
    for place, (predictor, evaluations, count) in enumerate(budgets):
        for number, kind in enumerate(kinds(predictor, evaluations)):
            name = name_of(predictor, kind, evaluations, count)
            for at in results.steps("VE", name)[-1:]:
                distances = [q["frechet"] for q in results.seeds("VE", at, name).values()]
                across = [place + 0.2 * (number - 1)] * len(distances)
                axes.plot(across, distances, marks[kind], color=f"C{number}", label=kind)
    labels = [f"{predictor}\n{evaluations:,} evaluations, {count:,} samples"
              for predictor, evaluations, count in budgets]  # fmt: skip
    axes.set_xticks(range(len(budgets)), labels, fontsize=8)
    axes.set(yscale="log", ylabel="glyph Fréchet distance", xlim=(-0.5, len(budgets) - 0.5))
    handles, kinds_drawn = axes.get_legend_handles_labels()
    if handles:
        each = dict(zip(kinds_drawn, handles, strict=True))
        axes.legend(each.values(), each.keys(), fontsize=8)
    return figure


CLAIM = Claim(
    "correctors_at_equal_cost", "Predictor and corrector", ("2011.13456",), 3, (800,), (100_000,),
    measure, findings, draw,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
