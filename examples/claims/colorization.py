"""Color for gray patches of photographs, drawn by one unconditional model.

Song et al., 2021, arXiv 2011.13456, appendix I.3: an unconditional model colors gray images by
predictor and corrector, with the gray of the image imposed in a rotated color space; the paper
shows pictures. Here the colors of test patches are scored by the energy score, which is lowest in
the mean for samples of the true posterior. One rival is the gray image itself; the other needs no
network: the exact posterior of the training set for a gray image with noise, little or at the level
that suits it best in hindsight. It knows every training patch, but no new one.

    python examples/claims/colorization.py
    python examples/claims/colorization.py --seeds 2 --steps 20

Small: 16x16 patches of two photographs, an NCSN++ of width 16 (VE), 100 evaluations; 4 minutes of
one CPU core for each seed.
"""

from collections.abc import Iterable
from itertools import product

from controllable import (
    IMAGES,
    MEMBERS,
    NETWORK,
    NOISE,
    STEPS,
    Task,
    of_network,
    of_training_set,
    score,
    task_scores,
)
from einops import repeat
from experiment import Claim, Finding, Lab, compare
from matplotlib.figure import Figure
from measures import scaled, test_images
from presets import Run
from results import Results
from torch import ones

from diffusionkit.control import Gray

RECIPE, TASK = "VE, color patches", "colors"
MEASURE = (
    f"energy score of colors, {IMAGES} test patches, {MEMBERS} members, {2 * STEPS} evaluations"
)
GRAY = f"energy score of the gray image, {IMAGES} test patches"


def coloring(size: int) -> Task:
    """Return the task of drawing the colors of a gray image."""
    return Task(Gray(3), ones(3, size, size))


def color_scores(run: Run) -> dict[str, dict[str, float]]:
    """Return the energy scores of the network, and of the training set by noise."""
    return {TASK: task_scores(run, coloring)}


def gray_score(run: Run) -> float:
    """Return the energy score of the images without their colors."""
    truth, task = scaled(run, test_images(run, IMAGES)), coloring(run.settings["data"]["size"])
    gray = task.operator.inverse(task.operator(truth))
    return score(run, repeat(gray, "n ... -> n m ...", m=MEMBERS), truth, task)


def measure(lab: Lab, seeds: Iterable[int], steps: tuple[int, ...]) -> None:
    """Train the network and color test patches."""
    for seed, at in product(tuple(seeds), steps):
        lab.measure(RECIPE, seed, at, MEASURE, color_scores)
        lab.measure(RECIPE, seed, at, GRAY, gray_score)


def findings(results: Results) -> list[Finding]:
    """Return the findings: the network against the gray image and the training set."""
    of, what = (RECIPE, MEASURE), f"energy score, {RECIPE}"
    found = [compare(
        results, "colors are better than gray", what, of, (RECIPE, GRAY), -1,
        value=of_network(TASK), value_b=float, labels=(NETWORK, "gray"),
    )]  # fmt: skip
    for rival, noise in (("little noise", NOISE[0]), ("its best noise", None)):
        found.append(compare(
            results, f"colors are better than those of the training set at {rival}", what, of, of,
            -1, value=of_network(TASK), value_b=of_training_set(TASK, noise),
            labels=(NETWORK, "training set"),
        ))  # fmt: skip
    return found


def draw(results: Results) -> Figure:
    """Plot the scores of the training set against its noise, those of the network and of gray."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for at in results.steps(RECIPE, MEASURE)[-1:]:
        gray = results.seeds(RECIPE, at, GRAY)
        for number, (seed, found) in enumerate(results.seeds(RECIPE, at, MEASURE).items()):
            rivals = [found[TASK][f"{noise:g}"] for noise in NOISE]
            lines = [
                (axes.plot(NOISE, rivals, color="C1", alpha=0.7)[0], "training set"),
                (axes.axhline(found[TASK][NETWORK], color="C0", alpha=0.7), NETWORK),
            ]
            if seed in gray:
                lines.append((axes.axhline(gray[seed], color="gray", linestyle=":"), "gray"))
            for line, label in lines if not number else []:
                line.set_label(label)
    axes.set(xscale="log", ylabel="energy score of the colors",
             xlabel="noise of the gray image, training set")  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    "colorization", "Colorization", ("2011.13456",), 3, (800,), (100_000,), measure, findings, draw
)

if __name__ == "__main__":
    CLAIM.main(__doc__)
