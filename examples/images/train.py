"""Train a score model on images, with one process or many.

    python examples/images/train.py --data glyphs --preset tiny-glyphs --out runs/glyphs
    torchrun --standalone --nproc-per-node 8 examples/images/train.py --data ... --out ...

A run that was stopped by ctrl-C or SIGTERM, or killed, goes on from its newest checkpoint when the
same command is given again. A step depends on its number and the seed alone: the times and noise
of every image come from a generator of its own, so that neither the number of processes nor
restarts change what is learned.
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
from records import Log, write_grid
from torch import Tensor, nn

from diffusionkit import (
    PowerEMA,
    clipped_step,
    drop_conditions,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from diffusionkit.data import Batch, EndlessBatches, ImageData, glyphs, open_images
from diffusionkit.random import seeded
from diffusionkit.training import CheckpointFolder, StopSignals

MAY_CHANGE = ("preset", "data.source", "training.steps", "run.")
DRAWS, RANKS, SNAPSHOTS = 2, 3, 4  # the last number of seeds: what they are for
SKIPPED = 50  # steps in a row without a finite gradient, after which training stops


class Training:
    """A run: the parts of its settings, its place among the processes, and its step."""

    def __init__(self, settings: presets.Settings, out: Path, place: Place) -> None:
        """Build everything; go on from the newest checkpoint if there is one."""
        self.settings, self.out, self.place, self.step = settings, out, place, 0
        self.run, self.seed = settings["run"], settings["training"]["seed"]
        self.batch = settings["training"]["batch"]
        if self.batch % place.world_size:
            raise ValueError(f"training.batch: expected a multiple of the {place.world_size} "
                             f"processes, got {self.batch}")  # fmt: skip
        self.data = open_data(settings)
        torch.manual_seed(self.seed)  # the same weights in all processes
        self.parts = parts = presets.build(settings)
        self.model, self.dequantizer = parts.model.to(place.device), parts.dequantizer
        if self.dequantizer is not None:
            self.dequantizer.to(place.device)
            # A flow sets its scales in its first call: on the same images in all processes.
            images = torch.stack([self.data[i][0] for i in range(min(64, len(self.data)))])
            self.dequantizer(images.to(place.device), generator=seeded(self.seed, 0, DRAWS))
        if parts.augmentation is not None:
            self.model.data_range = None  # augmented images may overshoot it
        self.sharded = self.run["shard"] and place.world_size > 1
        network = spread(parts.network, place, shard=self.run["shard"], compile=self.run["compile"])
        self.network = self.model.network = network
        self.model.train()
        inside = {id(p) for p in network.parameters()}
        modules = [part for part in (self.model, self.dequantizer) if part is not None]
        parameters = list(nn.ModuleList(modules).parameters())
        self.outside = [p for p in parameters if id(p) not in inside]
        self.optimizer = presets.optimizer(settings, parameters)
        self.scheduler = presets.scheduler(settings, self.optimizer)
        self.average = presets.average(settings, self.model)
        self.checkpoints = CheckpointFolder(out / "checkpoints", keep=self.run["keep"])
        torch.manual_seed(seeded(self.seed, place.rank, RANKS).initial_seed())  # dropout
        self.resume()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, beside the model."""
        stateful = {"scheduler": self.scheduler}
        if self.outside and self.dequantizer is not None:
            stateful["dequantizer"] = self.dequantizer
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
        extra = {"settings": self.settings, "data": self.data.fingerprint}
        if self.place.first or self.sharded:
            save_checkpoint(path, self.model, **self.state(), step=self.step, extra=extra)
            if isinstance(self.average, PowerEMA):
                self.average.save(self.out / "averages")
        self.checkpoints.keep_last(self.step)

    def points(self, images: Tensor, positions: list[int]) -> tuple[Tensor, Tensor | None, Any]:
        """Return data, log q of their dequantization and the generators that drew it."""
        generators = [seeded(self.seed, position, DRAWS) for position in positions]
        if self.dequantizer is not None:
            drawn = self.dequantizer(images, generator=generators)
            return drawn.x, drawn.log_prob if self.outside else None, generators
        low, high = self.settings["data"]["range"]
        return low + images.float() * ((high - low) / 255), None, generators

    def losses(self, batch: Batch, part: slice) -> Tensor:
        """Return the losses of a part of a batch, each drawn by its own generator."""
        x, log_q, generators = self.points(batch.images[part], batch.positions[part].tolist())
        given: dict[str, Any] = {}
        if self.parts.augmentation is not None:
            x, given["condition"] = self.parts.augmentation(x, generator=generators)
        classes = self.settings["data"]["classes"]
        if classes and batch.class_labels is not None:
            dropped = self.settings["training"]["label_dropout"]
            labels = batch.class_labels[part]
            given["class_labels"] = drop_conditions(labels, classes, dropped, generator=generators)
            given["reference_class_labels"] = batch.reference_class_labels
        if batch.reference is not None:
            first = self.step * self.batch
            ahead = range(first, first + len(batch.reference))
            given["reference"] = self.points(batch.reference, list(ahead))[0]
        given = {name: value for name, value in given.items() if value is not None}
        objective: Any = self.parts.objective
        precision = torch.bfloat16 if self.run["precision"] == "bfloat16" else torch.float32
        with torch.autocast(x.device.type, precision, enabled=precision == torch.bfloat16):
            if log_q is None:
                loss: Tensor = objective(self.model, x, generator=generators, **given)
                return loss
            # With learned dequantization the loss is the bound itself, in nats per dimension.
            nats = objective.nats(self.model, x, generator=generators, **given)
            return (nats + log_q) / x[0].numel()  # type: ignore[no-any-return]

    def backward(self, batch: Batch) -> float:
        """Add up the gradients of the mean loss of all processes; return this one's share of it."""
        size = self.run["micro_batch"] or len(batch.images)
        total, starts = torch.zeros((), device=self.place.device), range(0, len(batch.images), size)
        for start in starts:
            with accumulated(self.network, last=start == starts[-1]):
                share = self.losses(batch, slice(start, start + size)).sum() / self.batch
                # Processes average their gradients; their shares of the mean are to be added.
                (share * self.place.world_size).backward()  # type: ignore[no-untyped-call]
                total += share.detach()
        average_gradients(self.outside, self.place)
        return float(total)

    def steps(self, stop: StopSignals) -> Iterator[dict[str, float]]:
        """Take steps until the last one, a signal, or an error of the disk; yield their results."""
        training = self.settings["training"]
        batches = EndlessBatches(
            self.data, self.batch, seed=self.seed, start=self.step,
            flip=self.settings["data"]["flip"], reference_size=training["reference_size"],
            workers=self.run["workers"], pin_memory=self.place.device.type == "cuda",
        )  # fmt: skip
        skipped, source = 0, iter(batches)
        while self.step < training["steps"]:
            loss = self.backward(next(source).to(self.place.device))
            mine = torch.tensor([loss, stop.received is not None], dtype=torch.float64)
            loss, stops = self.place.sum(mine.to(self.place.device)).tolist()
            report = clipped_step(self.optimizer, training["clip"])
            self.scheduler.step()
            self.step += 1
            skipped = skipped + 1 if report.skipped else 0
            if not skipped:
                self.average.update(self.model)
            if skipped == SKIPPED:
                raise SystemExit(
                    f"stopped at step {self.step}: the gradients of the last {SKIPPED} steps were "
                    "not finite. Go on from the last checkpoint with a lower optimizer.lr, a "
                    "longer training.warmup, or run.precision=float32"
                )
            rate = self.optimizer.param_groups[0]["lr"]
            yield {"loss": loss, "gradient": report.norm, "lr": rate, "stops": stops}

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
                if not stopping and (ends or self.step % run["snapshot_every"] == 0):
                    self.snapshot()
                if ends or self.step % run["save_every"] == 0:
                    self.save()
                if stopping:
                    self.say("stopped by a signal; the same command goes on from here")
                    return
        self.say("done")

    @torch.no_grad()
    def snapshot(self, count: int = 64) -> None:
        """Draw a grid of samples of the averaged model, always from the same seeds."""
        average, data, place = self.average, self.settings["data"], self.place
        if isinstance(average, PowerEMA):
            average = next(iter(average.averages.values()))
        images = torch.zeros((count, *self.data.shape), dtype=torch.int32, device=place.device)
        # Samples are shared out; those of a sharded model, which all must call alike, are not.
        own = (
            torch.arange(count)
            if self.sharded
            else torch.arange(place.rank, count, place.world_size)
        )
        applied = average.applied(self.model) if self.sharded else None
        with applied or contextlib.nullcontext(average.model) as model:
            model.eval()
            given = {}
            if data["classes"]:
                given["class_labels"] = (own % data["classes"]).to(place.device)
            generators = [seeded(self.seed, number, SNAPSHOTS) for number in own.tolist()]
            draw = presets.sampler(self.settings, model)
            x = draw(
                (len(own), *self.data.shape), generator=generators, device=place.device, **given
            )
        self.model.train()
        low, high = data["range"]
        images[own] = ((x - low) / (high - low) * 255).round().clamp(0, 255).int()
        if not self.sharded:
            images = place.sum(images)
        if place.first:
            path = self.out / "snapshots" / f"step-{self.step:08d}.png"
            write_grid(images.byte().cpu(), path)

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.place.first:
            print(f"step {self.step}: {text}", flush=True)


def open_data(settings: presets.Settings) -> ImageData:
    """Return the training images that settings name."""
    data = settings["data"]
    if data["source"] == "glyphs":
        return glyphs("train", size=data["size"], labels=data["labels"])
    return open_images(data["source"], size=data["size"], channels=data["channels"])


def differences(saved: Any, new: Any, name: str = "") -> list[str]:
    """Return how settings differ that may not change within a run, one line each."""
    if name and name.startswith(MAY_CHANGE):
        return []
    if isinstance(saved, dict) and isinstance(new, dict):
        prefix = f"{name}." if name else ""
        keys = [*saved, *(key for key in new if key not in saved)]
        lines = [differences(saved.get(key), new.get(key), prefix + key) for key in keys]
        return [line for part in lines for line in part]
    return [] if saved == new else [f"{name}: {saved!r} in the checkpoint, {new!r} here"]


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--preset", required=True, help="a name, or the path of a .toml file; "
                        f"names: {', '.join(presets.names())}")  # fmt: skip
    parser.add_argument(
        "--data", help='a folder, .zip, .npz, or "glyphs"; the preset\'s by default'
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change a setting of the preset; may be repeated")  # fmt: skip
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    with launched() as place:
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
        except OSError as error:
            raise SystemExit(
                f"train.py: stopped at step {training.step}: {error}. The checkpoints before are "
                "whole; the same command goes on from the last one"
            ) from error


if __name__ == "__main__":
    main()
