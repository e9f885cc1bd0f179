"""Training runs and measurements that resume, shared by all claims, and the command line.

A claim trains some recipes, each from several seeds, and measures them. Checkpoints, samples and
features are in a folder of runs, `runs/claims`, which all claims share; numbers are in a JSON file
of the claim, in `outputs/claims`. Whatever is there already is not computed again, so a command
that was stopped goes on when it is given again. On a CPU with one thread, the default, equal seeds
give the same numbers, bit for bit.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes  # first: it puts the training program on the path
import torch
from helpers import argument_parser, device, positive_int, save
from intervals import Interval, difference, interval, verdict
from launch import Place
from matplotlib.figure import Figure
from presets import Run, restore
from results import Results
from train import Training

from diffusionkit.training import CheckpointFolder


class Lab:
    """The runs of a claim and its numbers.

    Args:
        results: the numbers.
        runs: the folder of runs.
        scale: "small" or "full".
        place: where to compute.
        only: the recipes to train and measure, all if there are none.
        text: measures without this text in their names are left out.
    """

    def __init__(
        self,
        results: Results,
        runs: Path,
        scale: str,
        place: torch.device | str = "cpu",
        only: Collection[str] = (),
        text: str = "",
    ) -> None:
        self.results, self.runs, self.scale = results, runs / scale, scale
        self.only, self.text = only, text
        self.place = torch.device(place)
        self.memory: dict[str, Any] = {}  # what measures of several runs share
        self._last: tuple[str, Run] | None = None

    def folder(self, name: str, seed: int, steps: int) -> Path:
        """Return the folder of a run to a number of steps.

        Claims share a run, which they continue; it keeps its model at the steps they asked for. One
        that asks for fewer steps later has a run of its own.
        """
        shared = self.runs / name.replace(", ", "-").replace(" ", "_") / f"seed-{seed}"
        newest = CheckpointFolder(shared / "checkpoints").newest()
        beyond = newest is not None and int(newest.stem.partition("-")[2]) > steps
        if beyond and not _kept(shared, steps).exists():
            return shared.with_name(f"{shared.name}-to-{steps}")
        return shared

    def run(self, name: str, seed: int, steps: int) -> Run:
        """Return the averaged model of a recipe after a number of steps, trained if need be."""
        key = Results.key(name, seed, steps)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        out = self.folder(name, seed, steps)
        kept = _kept(out, steps)
        if not kept.exists():
            recipe, start = recipes.RECIPES[name], ""
            if recipe.start:
                before = recipes.START_STEPS[self.scale]
                self.run(recipe.start, seed, before)
                start = str(_kept(self.folder(recipe.start, seed, before), before))
            settings = recipe.settings(self.scale, seed, steps, start)
            training = Training(settings, out, Place(0, 1, self.place))
            print(f"{name}, seed {seed}: from step {training.step} to {steps}", flush=True)
            training.train()
            if training.step < steps:
                raise SystemExit("stopped; the same command goes on")
            _keep(CheckpointFolder(out / "checkpoints").newest(), kept)
        self._last = key, restore(kept, self.place)
        return self._last[1]

    def measure(
        self, name: str, seed: int, steps: int, measure: str, of: Callable[[Run], Any]
    ) -> Any:
        """Return a number of a run, or a table of them; measure it if it has to be.

        A recipe or a measure that is left out has the number None, unless it was measured before.

        Args:
            name: the recipe.
            seed: the seed of the run.
            steps: the number of training steps.
            measure: the name of the measure with all that it depends on.
            of: returns it for the run.
        """
        key = Results.key(name, seed, steps)
        chosen = (not self.only or name in self.only) and self.text in measure
        if chosen and self.results.get(key, measure) is None:
            run, start = self.run(name, seed, steps), time.perf_counter()
            value = of(run)
            seconds = time.perf_counter() - start
            batch = run.settings["training"]["batch"]
            training = training_seconds(self.folder(name, seed, steps), steps, batch)
            self.results.add(key, measure, value, seconds, training)
            print(f"{key}: {measure}: {_short(value)}", flush=True)
        return self.results.get(key, measure)

    def note(self, name: str, seed: int, steps: int, of: Callable[[], dict[str, Any]]) -> None:
        """Add numbers by measure that need none of the recipes, unless they are there."""
        key = Results.key(name, seed, steps)
        if key in self.results.numbers:
            return
        start = time.perf_counter()
        for measure, value in of().items():
            self.results.add(key, measure, value, time.perf_counter() - start)
            print(f"{key}: {measure}: {_short(value)}", flush=True)
            start = time.perf_counter()


def training_seconds(folder: Path, steps: int, batch: int) -> float:
    """Return the seconds that a run took up to a number of steps, by its log."""
    total, before = 0.0, 0
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        if before < line["step"] <= steps:
            total += (line["step"] - before) * batch / line["images_per_second"]
            before = line["step"]
    return total


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else text[:200] + " ..."


def _kept(folder: Path, steps: int) -> Path:
    """Return the checkpoint that a run keeps at a number of steps."""
    return folder / "kept" / f"step-{steps:08d}.pt"


def _keep(checkpoint: Path | None, kept: Path) -> None:
    """Keep a checkpoint under another name, without a copy where links are possible."""
    if checkpoint is None:
        raise ValueError(f"{kept}: expected a checkpoint, got none")
    kept.parent.mkdir(exist_ok=True)
    with suppress(OSError):
        os.link(checkpoint, kept)
        return
    shutil.copyfile(checkpoint, kept)


@dataclass(frozen=True)
class Finding:
    """A claim as it was tested: a difference between runs, and the sign that it should have.

    Args:
        claim: the claim.
        measure: what was measured.
        a: the first run, and its mean over seeds.
        b: the second.
        found: the interval of a - b, None if it has not been measured on two seeds.
        claimed: the sign of a - b by the claim.
        steps: the number of training steps, 0 for none.
        digits: the digits to print.
    """

    claim: str
    measure: str
    a: tuple[str, float]
    b: tuple[str, float]
    found: Interval | None
    claimed: int
    steps: int = 0
    digits: int = 3


def compare(
    results: Results,
    claim: str,
    measure: str,
    a: tuple[str, str],
    b: tuple[str, str],
    claimed: int,
    *,
    value: Callable[[Any], float] = float,
    value_b: Callable[[Any], float] | None = None,
    steps: int | None = None,
    labels: tuple[str, str] | None = None,
    digits: int = 3,
) -> Finding:
    """Return the finding of a comparison of two measures, at the most steps with enough seeds.

    Args:
        results: the numbers.
        claim: the claim.
        measure: what is measured, for readers.
        a: a recipe and the name of its measure.
        b: another; the difference is a - b, by seed.
        claimed: the claimed sign of the difference.
        value: makes a number of a measure, by default itself.
        value_b: the same of b, by default that of a.
        steps: the number of training steps, by default the largest at which both have two seeds.
        labels: names of a and b, by default the recipes.
        digits: the digits to print.
    """
    names = labels or (a[0], b[0])
    for at in reversed(results.common_steps(a, b)) if steps is None else [steps]:
        first, second = results.seeds(a[0], at, a[1]), results.seeds(b[0], at, b[1])
        common = first.keys() & second.keys()
        if len(common) > 1:
            x = {seed: value(first[seed]) for seed in sorted(common)}
            y = {seed: (value_b or value)(second[seed]) for seed in sorted(common)}
            means = interval(x.values()).mean, interval(y.values()).mean
            return Finding(claim, measure, (names[0], means[0]), (names[1], means[1]),
                           difference(x, y), claimed, at, digits)  # fmt: skip
    nothing = float("nan")
    return Finding(claim, measure, (names[0], nothing), (names[1], nothing), None, claimed,
                   steps or 0, digits)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim of papers, and how to test it.

    Args:
        name: the name of its files.
        title: a heading.
        papers: the papers, by arXiv number.
        seeds: the number of seeds at the small scale.
        steps: the numbers of training steps at the small scale.
        full_steps: those at the full scale.
        measure: measures everything, at seeds and steps.
        findings: the findings of the numbers.
        draw: the figure of the numbers.
        others: comparisons that the papers do not make, which check what explains the findings.
    """

    name: str
    title: str
    papers: tuple[str, ...]
    seeds: int
    steps: tuple[int, ...]
    full_steps: tuple[int, ...]
    measure: Callable[[Lab, Iterable[int], tuple[int, ...]], None]
    findings: Callable[[Results], list[Finding]]
    draw: Callable[[Results], Figure]
    others: Callable[[Results], list[Finding]] | None = None

    def main(self, doc: str | None, argv: list[str] | None = None) -> None:
        """Measure what is missing, draw the figure and print the findings."""
        options = self.parser(doc).parse_args(argv)
        torch.set_num_threads(options.threads)
        results = Results(self.path(options.results, options.scale), self.settings(options))
        lab = Lab(
            results, options.runs, options.scale, options.device, options.only, options.measure
        )  # fmt: skip
        seeds, steps = self.budget(options)
        self.measure(lab, seeds, steps)
        save(self.draw(results), results.path.with_suffix(".png"))
        for finding in (*self.findings(results), *(self.others(results) if self.others else ())):
            print(describe(finding))
        print(f"-> {results.path}")

    def parser(self, doc: str | None) -> argparse.ArgumentParser:
        """Return the parser of the command line."""
        parser = argument_parser(doc)
        add = parser.add_argument
        add("--scale", choices=recipes.SCALES, default="small", help="the size of the networks")
        add("--seeds", type=positive_int, default=self.seeds, help="the number of seeds")
        add("--first-seed", type=int, default=0, help="the first of them")
        add("--steps", type=positive_int, nargs="+", help="numbers of training steps at which to "
            "measure, in order; by default those of the scale")  # fmt: skip
        add("--only", nargs="+", default=(), choices=[*recipes.RECIPES], metavar="RECIPE",
            help="the recipes to train and measure, all of the claim by default")  # fmt: skip
        add(
            "--measure",
            default="",
            metavar="TEXT",
            help="only measures with this text in their names, as they are in the JSON file",
        )
        add("--device", type=device, default="cpu", help="where to compute")
        add("--threads", type=positive_int, default=1,
            help="threads of a CPU; one gives the same bits on every run")  # fmt: skip
        add("--runs", type=Path, default=Path("runs/claims"), help="the folder of all runs")
        add("--results", type=Path, default=Path("outputs/claims"), help="the folder of numbers")
        return parser

    def budget(self, options: argparse.Namespace) -> tuple[range, tuple[int, ...]]:
        """Return the seeds and the numbers of training steps of a command line."""
        steps = options.steps or (self.steps if options.scale == "small" else self.full_steps)
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        return seeds, tuple(sorted(steps))

    def path(self, folder: Path, scale: str) -> Path:
        """Return the file of the numbers."""
        return folder / (f"{self.name}.json" if scale == "small" else f"{self.name}-{scale}.json")

    def settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return what all numbers of a file have in common."""
        return {"claim": self.name, "scale": options.scale}


def describe(finding: Finding) -> str:
    """Return a finding in a line."""
    if finding.found is None:
        return f"{finding.claim}: not measured"
    found, digits = finding.found, finding.digits
    (a, x), (b, y) = finding.a, finding.b
    return (f"{finding.claim}: {finding.measure}: {a} {x:.{digits}f}, {b} {y:.{digits}f}, "
            f"difference {found.mean:+.{digits}f} ± {found.half:.{digits}f}, {found.count} seeds: "
            f"{verdict(found, finding.claimed)}")  # fmt: skip
