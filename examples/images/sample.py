"""Draw images from a model that train.py trained, with one process or many.

    python examples/images/sample.py runs/glyphs --count 1000 --out samples.zip
    torchrun --standalone --nproc-per-node 8 examples/images/sample.py runs/glyphs --count ...

Image i depends on the seed and i alone, so that any number of processes gives the same file, byte
for byte. Images are kept in a folder next to OUT until all are complete: a run that was stopped or
killed resumes when the same command is run again. A picture of the first images, and a .json file
with the settings of the run, have the name of OUT. The sampler is that of the preset unless
changed:

    --set sampler.steps=50                        another setting of it
    --sampler DDIM --set sampler.steps=50         another predictor, on times of its own
    --sampler '{name = "ProbabilityFlow", rtol = 1e-4}'
"""

import argparse
import hashlib
import importlib
import itertools
import json
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import presets
import torch
from launch import Place, launched
from registry import ALLOWED, Settings
from torch import Tensor

from diffusionkit import ClassifierFreeGuidance, ProbabilityFlow
from diffusionkit.data import save_grid, save_images
from diffusionkit.metrics import load_shards, sample_to_shards
from diffusionkit.random import seeded
from diffusionkit.training import CheckpointFolder

CLASSES = 1  # the last number of seeds: what they are for
GRID = 64  # images in the picture of the first ones


class Samples:
    """The samples of a command: its model and sampler, the files, and what identifies them."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        """Load the model."""
        self.options, self.place, self.out = options, place, options.out
        if self.out.suffix not in (".zip", ".npz", ".npy", ""):
            raise ValueError(f"--out: expected a .zip, .npz, .npy or a folder, got {self.out}")
        self.parts, self.about, self.picture = (
            self.out.with_name(self.out.stem + end) for end in (".parts", ".json", ".png")
        )
        importlib.import_module("PIL")  # which writes pictures; not only when all is drawn
        run = presets.restore(checkpoint(options.run), place.device)
        self.settings = with_sampler(run.settings, options.sampler, options.set)
        data = self.settings["data"]
        self.shape = (data["channels"], data["size"], data["size"])
        model: Any = run.model
        self.classes = chosen_classes(options.classes, data["classes"])
        if options.guidance is not None:
            if not self.classes or not self.settings["training"]["label_dropout"]:
                raise ValueError("--guidance: expected a model trained with training.label_dropout "
                                 "> 0, which can do without classes, got another")  # fmt: skip
            null = {"class_labels": data["classes"]}
            model = ClassifierFreeGuidance(model, options.guidance, null=null)
        sampler = presets.sampler(self.settings, model)
        self.sampler = sampler.sample if isinstance(sampler, ProbabilityFlow) else sampler
        digest = hashlib.blake2b(digest_size=16)
        for tensor in run.model.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.identity = {
            "preset": self.settings["preset"],
            "step": run.step,
            "weights": digest.hexdigest(),
            "sampler": self.settings["sampler"],
            "precision": self.settings["run"]["precision"],
            "classes": self.classes,
            "guidance": options.guidance,
            "noise": place.device.type if options.device_noise else "cpu",
        }

    def labels(self, generators: Sequence[torch.Generator]) -> Tensor | None:
        """Return the class labels of samples: each depends on its seed, not on its noise."""
        if not self.classes:
            return None
        seeds = [seeded(generator.initial_seed() >> 1, CLASSES) for generator in generators]
        return torch.tensor([
            self.classes[int(torch.randint(len(self.classes), (), generator=seed))]
            for seed in seeds
        ])  # fmt: skip

    def draw(self, n: int, generators: list[torch.Generator]) -> Tensor:
        """Return samples (n, C, H, W), each from its own generator."""
        device = self.place.device
        labels = self.labels(generators)
        given: dict[str, Any] = {} if labels is None else {"class_labels": labels.to(device)}
        if self.options.device_noise:
            seeds = [generator.initial_seed() for generator in generators]
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        bfloat16 = self.settings["run"]["precision"] == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            x: Tensor = self.sampler((n, *self.shape), generator=generators, device=device, **given)
        return x

    def finished(self) -> bool:
        """Return whether these samples are there already; raise if others are."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        wanted = json.loads(json.dumps(self.identity))
        wanted |= {"count": self.options.count, "seed": self.options.seed}
        try:
            there = json.loads(self.about.read_bytes())
            there = there["settings"] | {name: there[name] for name in ("count", "seed")}
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.out}: expected a new file, got one that is no result of this "
                             "program; choose another --out") from None  # fmt: skip
        other = [f"{key} {there.get(key)!r}" for key in wanted if there.get(key) != wanted[key]]
        if other:
            raise ValueError(f"{self.out}: expected the samples of this command, got those of "
                             f"{', '.join(other)}; choose another --out")  # fmt: skip
        return True

    def run(self) -> None:
        """Draw what is missing; the first process then writes the result."""
        options = self.options
        if self.finished():
            self.say(f"{self.out} is complete")
            return
        data_range = tuple(self.settings["data"]["range"])
        self.say(f"draws {options.count} images of {self.shape}")
        sample_to_shards(
            self.draw,
            options.count,
            self.parts,
            batch_size=options.batch,
            seed=options.seed,
            data_range=data_range,
            settings=self.identity,
        )
        self.place.sum(torch.zeros(1, device=self.place.device))  # all have seen that all is there
        if self.place.first:
            self.write()

    def write(self) -> None:
        """Write the result: the samples last, so that their presence shows that it is complete."""
        count, seed = self.options.count, self.options.seed
        labels = self.labels([seeded(seed, i) for i in range(count)])
        few = torch.cat([*itertools.islice(load_shards(self.parts), GRID)])[:GRID]
        if self.shape[0] in (1, 3):
            save_grid(few, self.picture)
        shutil.copyfile(self.parts / "settings.json", self.about)
        labels = None if self.out.suffix == ".npy" else labels
        save_images(load_shards(self.parts), self.out, class_labels=labels)
        shutil.rmtree(self.parts)
        self.say(f"wrote {self.out}, {self.about.name} and {self.picture.name}")

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.place.first:
            print(text, flush=True)


def checkpoint(run: Path) -> Path:
    """Return a checkpoint file, or the newest whole one of a run's folder."""
    if run.is_file():
        return run
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if (newest := CheckpointFolder(folder).newest()) is None:
        raise ValueError(f"{run}: expected a checkpoint, or a folder with some, got none")
    return newest


def with_sampler(settings: Settings, sampler: str | None, changes: Sequence[str]) -> Any:
    """Return settings with another sampler, or changes of its settings and of the precision."""
    for change in changes:
        if not change.startswith(("sampler.", "run.precision")):
            raise ValueError(
                f"--set: expected sampler.KEY=VALUE or run.precision=..., got {change}"
            )
    if sampler is None:
        return presets.changed(settings, changes)
    if sampler.startswith("{"):
        try:
            table = tomllib.loads(f"sampler = {sampler}")["sampler"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"--sampler: expected a TOML table, got {sampler}: {error}") from error
    elif sampler in [cls.__name__ for cls in ALLOWED["sampler"]]:
        table = {"name": sampler}
    else:
        table = {"name": "PCSampler", "predictor": {"name": sampler}}
    return presets.changed(settings | {"sampler": table}, changes)


def chosen_classes(chosen: list[int] | None, count: int) -> list[int]:
    """Return the classes to draw from, all of them by default."""
    for number in chosen or []:
        if not 0 <= number < count:
            have = f"classes 0 to {count - 1}" if count else "no classes"
            raise ValueError(f"--class: expected a class of the model, which has {have}, "
                             f"got {number}")  # fmt: skip
    return sorted({*chosen}) if chosen else list(range(count))


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="the folder of a run (its newest checkpoint), or a checkpoint")
    add("--count", type=int, required=True, help="the number of images")
    add("--out", type=Path, required=True,
        help="a .zip of PNG files, .npz or .npy, or a new folder for PNG files")  # fmt: skip
    add("--seed", type=int, default=0, help="the seed of all images (default 0)")
    add("--batch", type=int, default=64, help="the number of images drawn at once (default 64)")
    add("--sampler", help="a predictor or sampler by its name, or a TOML table; see above")
    add("--set", action="append", default=[], metavar="sampler.KEY=VALUE",
        help="change a setting of the sampler, or run.precision; may be repeated")  # fmt: skip
    add("--class", dest="classes", type=int, action="append", metavar="N",
        help="the number of a class; may be repeated. Each image is of one of them, by default "
        "of any class, all equally likely")  # fmt: skip
    add("--guidance", type=float, metavar="SCALE", help="the scale of classifier-free guidance")
    add("--device-noise", action="store_true",
        help="draw noise on the GPU: faster for large images, but then CPUs and GPUs give "
        "different images")  # fmt: skip
    options = parser.parse_args(arguments)
    with launched() as place:
        try:
            Samples(options, place).run()
        except OSError as error:
            raise SystemExit(f"sample.py: {error}. What was drawn is kept: the same command "
                             "goes on") from error  # fmt: skip
        except (ValueError, TypeError, ImportError) as error:
            raise SystemExit(f"sample.py: {error}") from error


if __name__ == "__main__":
    main()
