"""Train a score model on images, with one process or many.

    python examples/images/train.py --data glyphs --preset tiny-glyphs --out runs/glyphs
    torchrun --standalone --nproc-per-node 8 examples/images/train.py --data ... --out ...

A run that was stopped by ctrl-C or SIGTERM, or killed, resumes from its newest checkpoint when the
same command is run again. A step depends only on its number and the seed: the times and noise of
every image come from its own generator, so that neither the number of processes nor restarts change
what is learned.
"""

import argparse
import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import presets
import torch
from launch import Place, accumulated, average_gradients, launched, spread
from losses import Losses
from records import Log, differences
from registry import Settings
from sources import HELP
from torch import Tensor, nn

from diffusionkit import (
    PowerEMA,
    clipped_step,
    load_checkpoint,
    normalize_weights,
    read_checkpoint,
    save_checkpoint,
)
from diffusionkit.data import Batch, EndlessBatches, save_grid
from diffusionkit.distributed import check_same_weights, gather_random_states, seed_ranks
from diffusionkit.random import seeded
from diffusionkit.training import CheckpointFolder, StopSignals

SNAPSHOTS = 4  # tells generators of samples from others of the same seed
SKIPPED = 50  # steps in a row without a finite gradient, after which training stops


class DataError(Exception):
    """Images that cannot be read."""


class Training:
    """A run: the parts of its settings, its place among the processes, and its step."""

    def __init__(self, settings: Settings, out: Path, place: Place) -> None:
        """Build everything; go on from the newest checkpoint if there is one."""
        self.settings, self.out, self.place, self.step = settings, out, place, 0
        self.run, self.seed = settings["run"], settings["training"]["seed"]
        self.batch = settings["training"]["batch"]
        if self.batch % place.world_size:
            raise ValueError(f"training.batch: expected a multiple of the {place.world_size} "
                             f"processes, got {self.batch}")  # fmt: skip
        self.data = presets.open_data(settings)
        torch.manual_seed(self.seed)  # the same weights in all processes
        self.parts = parts = presets.build(settings)
        presets.start(settings, parts.model)
        self.model: Any = parts.model.to(place.device)
        self.losses = Losses(parts, place.device.type)
        self.rehearse()
        if (learned := self.losses.learned) is not None:
            # A flow sets its scales in its first call: on the same images in all processes.
            images = torch.stack([self.data[i][0] for i in range(min(64, len(self.data)))])
            learned.to(place.device)(images.to(place.device), generator=seeded(self.seed))
        self.sharded = self.run["shard"] and place.world_size > 1
        self.network = spread(parts.network, place, shard=self.sharded, compile=self.run["compile"])
        self.model.network = self.network
        self.model.train()
        inside = {id(p) for p in self.network.parameters()}
        modules = [part for part in (self.model, learned) if part is not None]
        parameters = list(nn.ModuleList(modules).parameters())
        self.outside = [p for p in parameters if id(p) not in inside]
        self.optimizer = presets.optimizer(settings, parameters)
        self.scheduler = presets.scheduler(settings, self.optimizer)
        self.average = presets.average(settings, self.model)
        self.checkpoints = CheckpointFolder(out / "checkpoints", keep=self.run["keep"])
        seed_ranks(self.seed)  # dropout differs between processes
        self.resume()
        check_same_weights(self.model)
        training = settings["training"]
        self.batches = EndlessBatches(
            self.data, self.batch, seed=self.seed, start=self.step,
            flip=settings["data"]["flip"], reference_size=training["reference_size"],
            workers=self.run["workers"], pin_memory=place.device.type == "cuda",
        )  # fmt: skip

    @torch.no_grad()
    def rehearse(self) -> None:
        """Evaluate the model once and make the sampler: what does not fit is found before training.

        Raises:
            ValueError: if classes, the size of the images or the sampler do not fit.
            TypeError: if the network takes other conditions.
        """
        data, training = self.settings["data"], self.settings["training"]
        classes, known = data["classes"], len(self.data.classes)
        if classes and (classes < known or self.data.class_labels is None):
            raise ValueError(f"[data] classes: expected {known}, as the data have, got {classes}")
        if classes > known:
            self.say(f"[data] classes is {classes}, but the data have {known}")
        if training["label_dropout"] and not classes:
            raise ValueError("[training] label_dropout: expected 0 without [data] classes, "
                             f"got {training['label_dropout']}")  # fmt: skip
        if training["learn"] == "dequantizer" and self.losses.learned is None:
            raise ValueError("[training] learn: expected model without a [dequantization] that "
                             "learns, got dequantizer")  # fmt: skip
        given: dict[str, Any] = {}
        if classes:
            given["class_labels"] = torch.zeros(1, dtype=torch.int64, device=self.place.device)
        if self.parts.augmentation is not None:
            given["condition"] = torch.zeros(1, 9, device=self.place.device)
        x = torch.zeros(1, *self.data.shape, device=self.place.device)
        try:
            self.model.eval().predict(x, x.new_full((1,), self.parts.sde.T), **given)
        except (TypeError, ValueError) as error:
            shape = tuple(self.data.shape)
            raise type(error)(f"[network]: expected one for images {shape}: {error}") from error
        presets.sampler(self.settings, self.model)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, beside the model."""
        stateful: dict[str, Any] = {"scheduler": self.scheduler}
        if self.losses.learned is not None:
            stateful["dequantizer"] = self.losses.learned
        return {"ema": self.average, "optimizer": self.optimizer, "stateful": stateful,
                "objective": self.parts.objective}  # fmt: skip

    def resume(self) -> None:
        """Load the newest checkpoint that is whole, if there is one, after comparing settings."""
        if (path := self.checkpoints.newest()) is None:
            return
        saved = read_checkpoint(path).extra
        if changes := differences(saved["settings"], self.settings):
            raise ValueError(f"{path}: expected the settings of this run, got others; choose "
                             "another --out, or give back\n  " + "\n  ".join(changes))  # fmt: skip
        if saved["data"] != self.data.fingerprint:
            raise ValueError(f"{path}: expected the data that it was trained on, got data that "
                             "have changed since; choose another --out")  # fmt: skip
        self.step = load_checkpoint(path, self.model, **self.state()).step
        self.say(f"goes on from {path}")

    def save(self) -> None:
        """Write a checkpoint, and remove the oldest."""
        path = self.checkpoints.path(self.step)
        given = self.state() | {"random_states": gather_random_states(), "step": self.step}
        given["extra"] = {"settings": self.settings, "data": self.data.fingerprint}
        check_same_weights(self.model)
        if self.place.first or self.sharded:
            save_checkpoint(path, self.model, **given)
            if isinstance(self.average, PowerEMA):
                self.average.save(self.out / "averages")
        self.checkpoints.keep_last(self.step)

    def backward(self, batch: Batch) -> Tensor:
        """Add up the gradients of the mean loss of all processes; return this one's share of it."""
        size, count = self.run["micro_batch"] or self.batch, len(batch.images)
        scale = self.settings["training"]["loss_scale"]
        total, starts = torch.zeros((), device=self.place.device), range(0, count, size)
        for start in starts:
            with accumulated(self.network, last=start == starts[-1]):
                losses = self.losses(batch, slice(start, start + size), self.step * self.batch)
                share = losses.sum() / self.batch
                # Processes average their gradients; their shares of the mean are to be added.
                (share * self.place.world_size * scale).backward()
                total += share.detach()
        average_gradients(self.outside, self.place)
        return total

    def steps(self, stop: StopSignals) -> Iterator[dict[str, float]]:
        """Take steps until the last one, a signal, or an error of the disk; yield their results."""
        training = self.settings["training"]
        skipped, source = 0, iter(self.batches)
        while self.step < training["steps"]:
            if training["normalize"]:
                normalize_weights(self.model)
            loss = self.backward(self.read(source).to(self.place.device))
            # Signals may reach processes at different steps: all stop after the same one.
            shares = torch.stack([loss, torch.full_like(loss, stop.received is not None)])
            mean, stops = self.place.sum(shares).tolist()
            report = clipped_step(self.optimizer, training["clip"])
            self.step += 1
            skipped = skipped + 1 if report.skipped else 0
            if not skipped:
                self.scheduler.step()
                self.average.update(self.model)
            if skipped == SKIPPED:
                raise FloatingPointError(
                    f"the gradients of the last {SKIPPED} steps were not finite; try a lower "
                    "optimizer.lr or a longer training.warmup in another --out, or go on from the "
                    "last checkpoint with run.precision=float32"
                )
            rate = self.optimizer.param_groups[0]["lr"]
            yield {"loss": mean, "gradient": report.norm, "skipped": float(report.skipped),
                   "lr": rate, "stops": stops}  # fmt: skip

    def read(self, source: Iterator[Batch]) -> Batch:
        """Return the next batch; files that cannot be read end the run."""
        try:
            return next(source)
        except ValueError as error:
            raise DataError(
                f"{error}. Repair or remove such files, which open_images(...).check() lists, and "
                "train in another --out; training.start_from=CHECKPOINT keeps what was learned"
            ) from error

    def train(self) -> None:
        """Take all steps; log, draw and save at intervals."""
        steps, run = self.settings["training"]["steps"], self.run
        log = Log(self.out, self.step, steps, self.batch) if self.place.first else None
        with StopSignals() as stop:
            for result in self.steps(stop):
                stopping = result.pop("stops") > 0
                ends = stopping or self.step == steps
                if log is not None:
                    log.add(self.step, result, write=ends or self.step % run["log_every"] == 0)
                if ends or self.step % run["save_every"] == 0:
                    self.save()
                if not stopping and (ends or self.step % run["snapshot_every"] == 0):
                    self.snapshot()
                if stopping:
                    self.say("stopped by a signal; the same command goes on from here")
                    return
        self.say("done")

    @torch.no_grad()
    def snapshot(self) -> None:
        """Draw a grid of samples of the averaged model, always from the same seeds."""
        average, data, place = self.average, self.settings["data"], self.place
        count = max(64, place.world_size)
        if isinstance(average, PowerEMA):
            average = next(iter(average.averages.values()))
        # Samples are shared out, but those of a sharded model, which all processes call alike.
        own = torch.arange(count)
        own = own if self.sharded else own[place.rank :: place.world_size]
        applied = average.applied(self.model) if self.sharded else None
        with applied or contextlib.nullcontext(average.model) as model:
            averaged: Any = model
            draw = presets.sampler(self.settings, averaged.eval())
            given: dict[str, Any] = {"device": place.device}
            given["generator"] = [seeded(self.seed, i, SNAPSHOTS) for i in own.tolist()]
            if data["classes"]:
                given["class_labels"] = (own % data["classes"]).to(place.device)
            try:
                x, problem = draw((len(own), *self.data.shape), **given), None
            except ValueError as error:  # samples that are not finite are no reason to stop
                x, problem = torch.zeros(len(own), *self.data.shape, device=place.device), error
        self.model.train()
        failed = place.sum(torch.tensor(float(problem is not None), device=place.device))
        if failed:
            self.say(f"no snapshot: {problem or 'it failed in another process'}")
            return
        low, high = data["range"]
        images = torch.zeros((count, *self.data.shape), dtype=torch.int32, device=place.device)
        images[own] = ((x - low) / (high - low) * 255).round().clamp(0, 255).int()
        if not self.sharded:
            images = place.sum(images)
        if place.first:
            path = self.out / "snapshots" / f"step-{self.step:08d}.png"
            save_grid(images.byte().cpu(), path)

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.place.first:
            print(f"step {self.step}: {text}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--preset", required=True, help="a name, or the path of a .toml file; "
                        f"names: {', '.join(presets.names())}")  # fmt: skip
    parser.add_argument("--data", help=f"{HELP}; the preset's by default")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change a setting of the preset; may be repeated")  # fmt: skip
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    with launched() as place:
        run(options, place)


def run(options: argparse.Namespace, place: Place) -> None:
    """Train one network in this process; what uses the process group is freed at the return."""
    try:
        changes = [*options.set]
        if options.data is not None:
            changes.append(f"data.source={json.dumps(options.data)}")
        settings = presets.load(options.preset, changes)
        if place.first:
            print(presets.show(settings), flush=True)
        training = Training(settings, options.out, place)
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from error
    try:
        training.train()
    except DataError as error:
        raise SystemExit(f"train.py: stopped at step {training.step}: {error}") from error
    except (OSError, FloatingPointError) as error:
        raise SystemExit(
            f"train.py: stopped at step {training.step}: {error}. Earlier checkpoints are "
            "whole; the same command goes on from the last one"
        ) from error


if __name__ == "__main__":
    main()
