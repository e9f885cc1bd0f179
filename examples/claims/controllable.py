"""Inpainting by an unconditional model, against the truth and against the training set.

Song et al., 2021, arXiv 2011.13456, section 5: one unconditional model also fills in images. Parts
of test glyphs are hidden, drawn by predictor and corrector with what is known imposed, and scored
by the energy score of the hidden pixels, which is lowest in the mean for samples of the true
posterior. The rival needs no network: the exact posterior of the training set for a measurement
with noise, at the noise that suits it best. It knows every training image, but no new character.

    python examples/claims/controllable.py
    python examples/claims/controllable.py --seeds 2 --steps 20

Small: 16x16 glyphs, an NCSN++ of width 16 (VE), 100 evaluations; 4 minutes of one CPU core for each
seed.
"""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from einops import rearrange, repeat
from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import place_of, rounded, scaled, test_images
from presets import Run, open_data
from results import Results
from torch import Tensor

from diffusionkit import Inpainting, Langevin, PCSampler, ReverseDiffusion
from diffusionkit.calibration import energy_score
from diffusionkit.random import seeded

IMAGES, MEMBERS, STEPS = 48, 4, 50
NOISE = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # of the measurement, in units of the range, for the rival
SCORES = f"energy score, {IMAGES} test images, {MEMBERS} members, {2 * STEPS} evaluations"


def right_half(size: int) -> Tensor:
    """Return the mask of known pixels (1, size, size): the left half."""
    known = torch.zeros(1, size, size)
    known[:, :, : size // 2] = 1
    return known


def scattered(size: int) -> Tensor:
    """Return the mask of known pixels (1, size, size): a quarter of them, at random."""
    return (torch.rand(1, size, size, generator=torch.Generator().manual_seed(0)) < 0.25).float()


TASKS = {"right half": right_half, "scattered pixels": scattered}


def by_network(run: Run, truth: Tensor, known: Tensor) -> Tensor:
    """Return samples (n, members, C, H, W) of the network, given known pixels of the truth."""
    n, place = len(truth), place_of(run)
    given = repeat(truth, "n ... -> (n m) ...", m=MEMBERS).to(place)
    sampler = PCSampler(
        run.model, ReverseDiffusion(), Langevin(snr=0.16, norm="batch"), steps=STEPS,
        constraint=Inpainting(given, known.to(place)),
    )  # fmt: skip
    seed = run.settings["training"]["seed"]
    generators = [seeded(seed, i) for i in range(len(given))]
    x = sampler(given.shape, generator=generators, device=place)
    members: Tensor = rearrange(x.cpu(), "(n m) ... -> n m ...", n=n)
    return members


def by_training_set(run: Run, truth: Tensor, known: Tensor, noise: float) -> Tensor:
    """Return samples (n, members, C, H, W) of the posterior of the training set."""
    data = open_data(run.settings)
    images = scaled(run, torch.stack([data[i][0] for i in range(len(data))]))
    seen = known.expand(truth.shape[1:]).flatten().bool()
    distance = torch.cdist(truth.flatten(1)[:, seen].double(), images.flatten(1)[:, seen].double())
    low, high = map(float, run.settings["data"]["range"])
    weights = torch.softmax(-0.5 * (distance / (noise * (high - low))).square(), 1)
    generator = torch.Generator().manual_seed(run.settings["training"]["seed"])
    chosen = torch.multinomial(weights, MEMBERS, replacement=True, generator=generator)
    return images[chosen]


def scores(run: Run) -> dict[str, dict[str, float]]:
    """Return the mean energy scores of the hidden pixels, data in [-1, 1], for every task."""
    truth = scaled(run, test_images(run, IMAGES))
    low, high = map(float, run.settings["data"]["range"])
    found: dict[str, dict[str, float]] = {}
    for task, make in TASKS.items():
        known = make(run.settings["data"]["size"])

        def score(members: Tensor, hidden: Tensor = 1 - known) -> float:
            value = energy_score(members, truth, weights=hidden[None]).mean()
            return rounded(2 / (high - low) * float(value))

        rivals = {f"{s:g}": score(by_training_set(run, truth, known, s)) for s in NOISE}
        found[task] = {"network": score(by_network(run, truth, known)), **rivals}
    return found


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train the network, and fill in test images."""
    for seed, at in product(seeds, steps):
        lab.measure("VE", seed, at, SCORES, scores)


def of_network(task: str) -> Callable[[dict[str, Any]], float]:
    """Return a function of all scores: that of the network."""
    return lambda found: float(found[task]["network"])


def of_training_set(task: str) -> Callable[[dict[str, Any]], float]:
    """Return a function of all scores: the lowest of the training set."""
    return lambda found: min(float(found[task][f"{s:g}"]) for s in NOISE)


def findings(results: Results) -> list[Finding]:
    """Return a finding for each task."""
    return [
        compare(
            results, f"inpainting is better than the posterior of the training set, {task}",
            "energy score, VE", ("VE", SCORES), ("VE", SCORES), -1, value=of_network(task),
            value_b=of_training_set(task), labels=("network", "training set"),
        )
        for task in TASKS
    ]  # fmt: skip


def draw(results: Results) -> Figure:
    """Plot the scores of the training set against its noise, and those of the network."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for at in results.steps("VE", SCORES)[-1:]:
            for number, found in enumerate(results.seeds("VE", at, SCORES).values()):
                rivals = [found[task][f"{s:g}"] for s in NOISE]
                axes.plot(NOISE, rivals, color="C1", alpha=0.7,
                          label=None if number else "training set")  # fmt: skip
                axes.axhline(found[task]["network"], color="C0", alpha=0.7,
                             label=None if number else "network")  # fmt: skip
        axes.set(xscale="log", title=task, ylabel="energy score",
                 xlabel="noise of the measurement, training set")  # fmt: skip
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "controllable", "Inpainting", ("2011.13456",), 3, (800,), (100_000,), measure, findings, draw
)

if __name__ == "__main__":
    CLAIM.main(__doc__)
