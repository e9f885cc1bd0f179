"""Why the cosine schedule looks bad with an MLP: the bits of grey levels, and eps at high noise.

The small experiments of examples/improved_ddpm.py found more bits with the cosine schedule than
with the linear one on digits, against Nichol and Dhariwal, 2021, arXiv 2102.09672, and samples on
patches of photographs that get worse with more steps. This script takes the same networks and
budgets and looks where the bits are: above a log-SNR of 8 the noise is a seventh of one of the 17
levels of the digits. And it trains the same network to predict v instead of eps: alpha at the end
of the cosine chain is 4.9e-5, by which an error of eps is divided in x0.

    python examples/claims/cosine_with_mlps.py
    python examples/claims/cosine_with_mlps.py --seeds 2 --steps 50

6 minutes of one CPU core for each seed; --scale changes nothing.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import bits_by_log_snr, rounded
from results import Results

import diffusionkit as dk
from diffusionkit.networks import MLP

IMAGE_SETS = ("digits", "patches")
SCHEDULES, MODELS = ("linear", "cosine"), {"eps": dk.EpsModel, "v": dk.VModel}
CHAIN, SAMPLES, IMAGES, FEW = 1000, 500, 300, (10, 25, 50, 100, 1000)
BITS = f"bits per dimension, {IMAGES} test images"
ENERGY = f"energy distance of {SAMPLES} samples, thousandths"
ERRORS = "error of x0 over the variance of the data"


def name_of(data: str, schedule: str, model: str = "eps") -> str:
    """Return the name of a run."""
    return f"MLP {data} {schedule} {model}"


def trained(data: str, schedule: str, model: str, seed: int, steps: int) -> tuple[Any, Any]:
    """Return the images and a model trained with L_hybrid, as examples/improved_ddpm.py does."""
    import improved_ddpm  # with scikit-learn, which the other claims do not need
    from bits_per_dim import DATA, SIZE
    from helpers import fit

    images, chain = DATA[data](), improved_ddpm.CHAINS[schedule](CHAIN)
    torch.manual_seed(seed)
    width = SIZE * SIZE
    network = MLP(width, out_features=2 * width, width=192, depth=4)
    made = MODELS[model](network, chain, variance="learned_range")
    decoder = dk.GaussianDecoder(levels=images.levels)
    loss_of, x0 = improved_ddpm.objective("hybrid", decoder), decoder.encode(images.train)

    def loss() -> torch.Tensor:
        chosen: Any = torch.randint(len(x0), (improved_ddpm.BATCH,))
        found: torch.Tensor = loss_of(made, x0[chosen])
        return found

    fit(made, loss, steps, lr=improved_ddpm.LEARNING_RATE, ema_decay=improved_ddpm.EMA_DECAY)
    return images, made.eval()


def measures_of(
    data: str, schedule: str, model: str, seed: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Return all measures of one run: bits, energy distances and errors of x0 at high noise."""
    import improved_ddpm

    images, made = trained(data, schedule, model, seed, steps)
    decoder = dk.GaussianDecoder(levels=images.levels)
    generator = torch.Generator().manual_seed(0)
    bounds = [dk.ChainNELBO(made, decoder)(images.test[:IMAGES], generator=generator)]
    sample = partial(improved_ddpm.energies, made, made.sde, dk.Ancestral("model"), images)
    energies = sample(SAMPLES, seed)
    x0, errors = decoder.encode(images.test), {}
    for k in (1000, 999, 990, 950, 900, 800):
        t = torch.full((len(x0),), k / CHAIN, dtype=torch.float64)
        noisy = made.sde.perturb(x0, t, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            error = (made.predict(noisy.x, t.to(noisy.x.dtype)).x0 - noisy.x0).square().mean()
        errors[str(k)] = rounded(float(error / x0.var()))
    few = [str(n) for n in FEW]
    return {
        BITS: bits_by_log_snr(bounds, made.sde, images.test[0].numel()),
        ENERGY: dict(zip(few, [rounded(1000 * e) for e in energies], strict=True)),
        ERRORS: errors,
    }


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train every run and measure it."""
    runs = [(data, schedule, "eps") for data, schedule in product(IMAGE_SETS, SCHEDULES)]
    for seed, at, (data, schedule, model) in product(
        seeds, steps, [*runs, ("patches", "cosine", "v")]
    ):
        name = name_of(data, schedule, model)
        lab.note(name, seed, at, partial(measures_of, data, schedule, model, seed, at))


def findings(results: Results) -> list[Finding]:
    """Return the findings: the bits of both schedules."""
    return [fewer_bits(results, data, "", itemgetter("total")) for data in IMAGE_SETS]


def fewer_bits(
    results: Results, data: str, part: str, value: Callable[[dict[str, Any]], float]
) -> Finding:
    """Return the finding of fewer bits with the cosine schedule, in all or a part of them."""
    linear, cosine = (name_of(data, schedule) for schedule in SCHEDULES)
    return compare(
        results, f"the cosine schedule has fewer bits, {data}{part}", "bits/dim, L_hybrid",
        (cosine, BITS), (linear, BITS), -1, value=value, labels=("cosine", "linear"),
    )  # fmt: skip


def others(results: Results) -> list[Finding]:
    """Return where the bits are, and what predicting v changes."""
    parts: dict[str, Callable[[dict[str, Any]], float]] = {
        ", from log-SNRs below 8": lambda bits: float(bits["total"] - bits["above"]["8"]),
        ", from log-SNRs above 8": lambda bits: float(bits["above"]["8"]),
    }
    found = [fewer_bits(results, data, part, value)
             for data, (part, value) in product(IMAGE_SETS, parts.items())]  # fmt: skip
    eps, v = name_of("patches", "cosine"), name_of("patches", "cosine", "v")

    def energy(table: dict[str, float], steps: str) -> float:
        return float(table[steps])

    for few in ("10", "100", "1000"):
        found.append(compare(
            results, f"predicting v has better samples than eps, cosine, patches, {few} steps",
            "energy distance, thousandths", (v, ENERGY), (eps, ENERGY), -1,
            value=partial(energy, steps=few), labels=("v", "eps"), digits=0,
        ))  # fmt: skip
    return found


def draw(results: Results) -> Figure:
    """Plot the energy distance against steps, and the error of x0 by noise."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = {"linear, eps": ("linear", "eps"), "cosine, eps": ("cosine", "eps"),
             "cosine, v": ("cosine", "v")}  # fmt: skip
    for number, (label, (schedule, model)) in enumerate(lines.items()):
        run = name_of("patches", schedule, model)
        for measure, axes in ((ENERGY, left), (ERRORS, right)):
            for at in results.steps(run, measure)[-1:]:
                for place, table in enumerate(results.seeds(run, at, measure).values()):
                    x = [int(key) for key in table]
                    axes.plot(x, [*table.values()], marker="o", color=f"C{number}", alpha=0.7,
                              label=None if place else label)  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="sampling steps",
             ylabel="energy distance, thousandths")  # fmt: skip
    right.set(yscale="log", xlabel="step of the chain", ylabel="error of x0 / variance")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "cosine_with_mlps", "The cosine schedule with an MLP", ("2102.09672",), 3, (3000,), (3000,),
    measure, findings, draw, others,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
