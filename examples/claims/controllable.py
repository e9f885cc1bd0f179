"""One unconditional model for inpainting, enlarging and class-conditional generation.

Song et al., 2021, arXiv 2011.13456, section 5 and appendix I: one unconditional model fills in
images, colors them, and draws images of a class with a classifier of noisy images; the paper shows
pictures. Here what is hidden of test glyphs is drawn by predictor and corrector with what is known
imposed, and scored by the energy score, which is lowest in the mean for samples of the true
posterior. Known are half of the pixels, a quarter of them, or the means of 4x4 blocks; the last
stands for colorization, also a linear measurement. The rival needs no network: the exact posterior
of the training set for a measurement with noise, little or at the level that suits it best in
hindsight. It knows every training image, but no new character.

    python examples/claims/controllable.py
    python examples/claims/controllable.py --seeds 2 --steps 20

Small: 16x16 glyphs, an NCSN++ of width 16 (VE), 100 evaluations; 20 minutes of one CPU core for
each seed, of which 10 are those of the checks and 5 those of the classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from class_guidance import CLASSES, class_shares
from einops import rearrange, repeat
from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import place_of, rounded, scaled, test_images
from presets import Run, open_data
from results import Results
from torch import Tensor

from diffusionkit import (
    Ancestral,
    Clip,
    DenoisedModel,
    EmpiricalModel,
    Langevin,
    LinearGaussianGuidance,
    LinearMeasurement,
    PCSampler,
    PseudoinverseGuidance,
    ReverseDiffusion,
    ScoreModel,
    TimeTravel,
)
from diffusionkit.calibration import energy_score
from diffusionkit.control import AveragePool, LinearOperator, Mask
from diffusionkit.random import seeded

IMAGES, MEMBERS, STEPS = 48, 4, 50
NOISE = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # of the measurement, in units of the range, for the rival
NETWORK, EXACT, MORE = "network", "training set", "more evaluations"
PIGDM, MMPS, REPAINT = "PiGDM", "MMPS", "RePaint"
LABELS = {EXACT: "exact score, same sampler"}
DASHES = ("dotted", "dashed", "dashdot", (0, (6, 1)), (0, (1, 4)))  # of the checks in the figure
_BUDGET = f"{IMAGES} test images, {MEMBERS} members, {2 * STEPS} evaluations"
_STEPS = f"{IMAGES} test images, {MEMBERS} members, {STEPS} steps"
SCORES = f"energy score, {_BUDGET}"
MEANS = f"energy score from means of blocks, {_BUDGET}"
CHECKS = {
    EXACT: f"energy score with the exact score of the training set, {_BUDGET}",
    REPAINT: f"energy score with time travel, {_BUDGET}",
    PIGDM: f"energy score with guidance, {_STEPS}",
    MMPS: f"energy score with MMPS in 3 iterations, {_STEPS}",
    MORE: f"energy score, {IMAGES} test images, {MEMBERS} members, {8 * STEPS} evaluations",
}


@dataclass(frozen=True)
class Task:
    """What is known of an image.

    Args:
        operator: the measurement, of images (B, 1, size, size).
        hidden: the weights of the pixels that are scored, (1, size, size).
    """

    operator: LinearOperator
    hidden: Tensor


def right_half(size: int) -> Task:
    """Return the task of drawing the right half."""
    known = torch.zeros(1, size, size)
    known[:, :, : size // 2] = 1
    return Task(Mask(known), 1 - known)


def scattered(size: int) -> Task:
    """Return the task of drawing three quarters of the pixels, at random."""
    random = torch.rand(1, size, size, generator=torch.Generator().manual_seed(0))
    known = (random < 0.25).float()
    return Task(Mask(known), 1 - known)


def blocks(size: int) -> Task:
    """Return the task of drawing the image from the means of blocks of 4x4 pixels."""
    return Task(AveragePool(4), torch.ones(1, size, size))


TASKS = {"right half": right_half, "scattered pixels": scattered}
MEASURES = {"right half": SCORES, "scattered pixels": SCORES, "means of blocks": MEANS}
ALL = {**TASKS, "means of blocks": blocks}


def draw_members(run: Run, truth: Tensor, task: Task, method: str = NETWORK) -> Tensor:
    """Return samples (n, members, C, H, W) of what fits to what is known of images.

    Args:
        run: the run, the seed of which is that of the samples.
        truth: the images (n, C, H, W).
        task: what is known of them.
        method: `NETWORK` or one of `CHECKS`.
    """
    given = repeat(truth, "n ... -> (n m) ...", m=MEMBERS).to(place_of(run))
    generators = [seeded(run.settings["training"]["seed"], i) for i in range(len(given))]
    sampler = sampler_of(run, task, given, method)
    x = sampler(given.shape, generator=generators, device=given.device, dtype=given.dtype)
    members: Tensor = rearrange(x.cpu(), "(n m) ... -> n m ...", m=MEMBERS)
    return members


def sampler_of(run: Run, task: Task, given: Tensor, method: str) -> PCSampler:
    """Return the sampler of a method, for what is known of given images (B, C, H, W)."""
    return (_guided if method in (PIGDM, MMPS) else _replacing)(run, task, given, method)


def _replacing(run: Run, task: Task, given: Tensor, method: str) -> PCSampler:
    """Return a sampler that imposes what is known of given images at every step."""
    known = LinearMeasurement(task.operator, task.operator(given))
    if method == REPAINT:
        travel = TimeTravel(jump=5, repeats=4)
        return PCSampler(
            run.model, Ancestral(), steps=STEPS // 2, constraint=known, time_travel=travel
        )
    model: ScoreModel = run.model
    if method == EXACT:
        model = EmpiricalModel(run.model.sde, training_images(run)).to(given.device)
    return PCSampler(
        model, ReverseDiffusion(), Langevin(snr=0.16, norm="batch"), constraint=known,
        steps=4 * STEPS if method == MORE else STEPS,
    )  # fmt: skip


def _guided(run: Run, task: Task, given: Tensor, method: str) -> PCSampler:
    """Return a sampler of a model that is guided by what is known of given images."""
    low, high = map(float, run.settings["data"]["range"])
    measured, noise = (task.operator, task.operator(given)), 0.005 * (high - low)
    if method == MMPS:
        model: ScoreModel = LinearGaussianGuidance(run.model, *measured, noise, iterations=3)
    else:
        # Without clipping, samples of a network of few training steps diverged.
        clipped = DenoisedModel(run.model, Clip(low, high))
        model = PseudoinverseGuidance(clipped, *measured, noise, sigma_data=0.25 * (high - low))
    return PCSampler(model, Ancestral(), steps=STEPS)


def training_images(run: Run) -> Tensor:
    """Return all training images, as data of the model."""
    data = open_data(run.settings)
    return scaled(run, torch.stack([data[i][0] for i in range(len(data))]))


def by_training_set(run: Run, truth: Tensor, task: Task, noise: float) -> Tensor:
    """Return samples (n, members, C, H, W) of the posterior of the training set."""
    images, operator = training_images(run), task.operator
    seen = operator(torch.ones_like(truth[:1])).flatten() != 0  # a mask leaves zeros
    x, y = (operator(part).flatten(1)[:, seen].double() for part in (truth, images))
    low, high = map(float, run.settings["data"]["range"])
    weights = torch.softmax(-0.5 * (torch.cdist(x, y) / (noise * (high - low))).square(), 1)
    generator = torch.Generator().manual_seed(run.settings["training"]["seed"])
    chosen = torch.multinomial(weights, MEMBERS, replacement=True, generator=generator)
    return images[chosen]


def score(run: Run, members: Tensor, truth: Tensor, task: Task) -> float:
    """Return the mean energy score of what is hidden, data in [-1, 1]."""
    low, high = map(float, run.settings["data"]["range"])
    value = energy_score(members, truth, weights=task.hidden[None]).mean()
    return rounded(2 / (high - low) * float(value))


def task_scores(run: Run, make: Callable[[int], Task]) -> dict[str, float]:
    """Return the energy scores of the network, and of the training set by noise, for a task."""
    truth, task = scaled(run, test_images(run, IMAGES)), make(run.settings["data"]["size"])
    found = {NETWORK: score(run, draw_members(run, truth, task), truth, task)}
    for noise in NOISE:
        found[f"{noise:g}"] = score(run, by_training_set(run, truth, task, noise), truth, task)
    return found


def scores(run: Run) -> dict[str, dict[str, float]]:
    """Return the energy scores of inpainting, by task."""
    return {task: task_scores(run, make) for task, make in TASKS.items()}


def block_scores(run: Run) -> dict[str, dict[str, float]]:
    """Return the energy scores from means of blocks, by task."""
    return {"means of blocks": task_scores(run, blocks)}


def check(run: Run, method: str) -> dict[str, float]:
    """Return the energy scores of another method of `CHECKS`, by task."""
    truth = scaled(run, test_images(run, IMAGES))
    tasks = {name: make(run.settings["data"]["size"]) for name, make in ALL.items()}
    return {
        name: score(run, draw_members(run, truth, task, method), truth, task)
        for name, task in tasks.items()
    }


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train the network; fill in test images, and draw images of classes."""
    measures: dict[str, Callable[[Run], Any]] = {
        SCORES: scores, MEANS: block_scores, CLASSES: class_shares,
        **{key: partial(check, method=method) for method, key in CHECKS.items()},
    }  # fmt: skip
    for (key, of), seed, at in product(measures.items(), tuple(seeds), steps):
        lab.measure("VE", seed, at, key, of)


def of_network(task: str) -> Callable[[dict[str, Any]], float]:
    """Return a function of all scores: that of the network."""
    return lambda found: float(found[task][NETWORK])


def of_training_set(task: str, noise: float | None = None) -> Callable[[dict[str, Any]], float]:
    """Return a function of all scores: that of the training set at a noise, or the lowest."""
    if noise is not None:
        return lambda found: float(found[task][f"{noise:g}"])
    return lambda found: min(float(found[task][f"{s:g}"]) for s in NOISE)


def findings(results: Results) -> list[Finding]:
    """Return the findings: two baselines for each task, and for classes."""
    found = []
    for task, key in MEASURES.items():
        what = "from means of blocks" if task == "means of blocks" else f"inpainting, {task}"
        baselines = {"at little noise": NOISE[0], "at its best noise": None}
        if task == "means of blocks":  # where the least noise is the best
            del baselines["at little noise"]
        for baseline, noise in baselines.items():
            found.append(compare(
                results, f"{what}: better than the posterior of the training set {baseline}",
                "energy score, VE", ("VE", key), ("VE", key), -1, value=of_network(task),
                value_b=of_training_set(task, noise), labels=(NETWORK, EXACT),
            ))  # fmt: skip
    of = ("VE", CLASSES)
    for kind, other in (("unconditional", "unconditional ones"), ("training", "training images")):
        found.append(compare(
            results, f"images of a class are taken for it more often than {other}", "share, VE",
            of, of, 1, value=itemgetter("guided"), value_b=itemgetter(kind),
            labels=("guided", kind),
        ))  # fmt: skip
        found.append(compare(
            results, f"images of a class are nearer to its test images than {other}",
            "energy distance of features, VE", of, of, -1, value=itemgetter("guided distance"),
            value_b=itemgetter(f"{kind} distance"), labels=("guided", kind),
        ))  # fmt: skip
    return found


def others(results: Results) -> list[Finding]:
    """Return what limits the network: other methods for each task."""
    found = []
    for task, key in MEASURES.items():
        for method, text in (
            (EXACT, "with the exact score of the training set than with the network"),
            (MORE, "with four times the evaluations"),
            (REPAINT, "with RePaint than with a corrector"),
            (PIGDM, "with PiGDM than with replacement"),
            (MMPS, "with MMPS than with replacement"),
        ):
            found.append(compare(
                results, f"{task}: better {text}", "energy score, VE", ("VE", CHECKS[method]),
                ("VE", key), -1, value=itemgetter(task),
                value_b=of_network(task), labels=(method, NETWORK),
            ))  # fmt: skip
    return found


def draw(results: Results) -> Figure:
    """Plot the scores of the training set against its noise, and those of the network."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (task, key) in zip(figure.subplots(1, 3), MEASURES.items(), strict=True):
        for at in results.steps("VE", key)[-1:]:
            for number, found in enumerate(results.seeds("VE", at, key).values()):
                rivals = [found[task][f"{s:g}"] for s in NOISE]
                axes.plot(NOISE, rivals, color="C1", alpha=0.7,
                          label=None if number else EXACT)  # fmt: skip
                axes.axhline(found[task][NETWORK], color="C0", alpha=0.7,
                             label=None if number else NETWORK)  # fmt: skip
        for color, (dashes, (method, other)) in enumerate(
            zip(DASHES, CHECKS.items(), strict=True), 2
        ):
            for at in results.steps("VE", other)[-1:]:
                for number, found in enumerate(results.seeds("VE", at, other).values()):
                    label = None if number else f"check: {LABELS.get(method, method)}"
                    axes.axhline(found[task], color=f"C{color}", alpha=0.7, linestyle=dashes,
                                 label=label)  # fmt: skip
        axes.set(xscale="log", title=task, ylabel="energy score",
                 xlabel="noise of the measurement, training set")  # fmt: skip
    if figure.axes[0].get_legend_handles_labels()[0]:
        labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


CLAIM = Claim(
    "controllable", "Controllable generation", ("2011.13456",), 3, (800,), (100_000,), measure,
    findings, draw, others,
)  # fmt: skip

if __name__ == "__main__":
    CLAIM.main(__doc__)
