"""Presets: small TOML files of plain values, and the parts of the library that they name.

A preset has the sections [data], [process], [network], [model], [objective], [optimizer],
[training], [average], [sampler] and [run], and may have [augmentation] and [dequantization]. A
table with a name, such as `name = "VPSDE"` or `name = "DDPMpp.cifar10"`, is a call of that class
or named constructor; its other keys are arguments, and tables among them are built first. Only
the names in registry.py can be called.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from registry import Settings, call, check_type, checked, unknown
from sources import open_source
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import diffusionkit as dk
from diffusionkit.data import ImageData

FOLDER = Path(__file__).parent / "presets"

# The values of the plain sections, with their defaults; those without one are given by presets.
PLAIN: dict[str, dict[str, Any]] = {
    "data": {
        "source": "",  # files, or a built-in set of sources.py, from --data
        "size": 32,
        "channels": 3,
        "classes": 0,  # number of classes that the network is conditioned on
        "labels": "script",  # of glyphs
        "flip": False,
        "range": [-1.0, 1.0],
    },
    "training": {
        "batch": 128,  # over all ranks and micro-batches
        "steps": 1_300_000,
        "warmup": 0,  # steps of linear warm-up of the learning rate
        "decay_after": 0,  # steps after which it falls with their root, as in EDM2; 0: never
        "normalize": False,  # weights of magnitude one before each step, for EDM2's networks
        "clip": math.inf,  # the largest norm of the gradient
        "loss_scale": 1.0,  # a factor of the loss, which matters to clipping alone
        "reference_size": 0,  # number of reference data of StableTarget
        "learn": "model",  # or "dequantizer": its likelihood bound, with the model left as it is
        "start_from": "",  # a checkpoint of which the averaged model is the start
        "label_dropout": 0.0,  # the share of class labels replaced by the null label, `classes`
        "seed": 0,
    },
    "run": {
        "precision": "float32",  # or "bfloat16"
        "micro_batch": 0,  # per rank; 0: all at once
        "shard": False,
        "compile": False,
        "activation_checkpointing": False,
        "workers": 0,
        "log_every": 50,
        "snapshot_every": 1000,
        "save_every": 1000,
        "keep": 3,  # number of checkpoints
    },
}

# The smallest and the largest value of a number; those of OPEN are not allowed themselves.
LIMITS: dict[str, tuple[float, float]] = {
    "data.size": (1, math.inf),
    "data.channels": (1, math.inf),
    "data.classes": (0, math.inf),
    "training.batch": (1, math.inf),
    "training.steps": (1, math.inf),
    "training.warmup": (0, math.inf),
    "training.decay_after": (0, math.inf),
    "training.clip": (0, math.inf),
    "training.loss_scale": (0, math.inf),
    "training.reference_size": (0, math.inf),
    "training.label_dropout": (0, 1),
    "training.seed": (0, 2**63 - 1),
    "run.micro_batch": (0, math.inf),
    "run.workers": (0, math.inf),
    "run.log_every": (1, math.inf),
    "run.snapshot_every": (1, math.inf),
    "run.save_every": (1, math.inf),
    "run.keep": (1, math.inf),
}
OPEN = ("training.clip", "training.loss_scale")
CHOICES = {"run.precision": ("float32", "bfloat16"), "training.learn": ("model", "dequantizer")}
OPTIONAL = ("augmentation", "dequantization")
SECTIONS = ("data", "process", "network", "model", "objective", *OPTIONAL, "optimizer",
            "training", "average", "sampler", "run")  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The parts of a training run that a preset describes."""

    settings: Settings
    sde: dk.ForwardSDE
    network: nn.Module
    model: dk.ScoreModel
    objective: Any
    augmentation: Any = None
    dequantizer: Any = None


@dataclass(frozen=True)
class Run:
    """A trained model: its settings, parts, averaged model in evaluation mode, and step."""

    settings: Settings
    parts: Parts
    model: dk.ScoreModel
    step: int


def names() -> list[str]:
    """Return the names of the presets that come with this program."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str | Path, changes: Iterable[str] = ()) -> Settings:
    """Return the settings of a preset, by its name or path, with changes "section.key=value"."""
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
        if str(name) not in names():
            raise unknown("preset", str(name), names())
    try:
        settings: Settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected a TOML file, got {error}") from error
    return changed({"preset": path.stem} | settings, changes)


def changed(settings: Settings, changes: Iterable[str]) -> Settings:
    """Return settings with changes "section.key=value", after checking all names and types."""
    settings = copy.deepcopy(settings)
    for change in changes:
        key, equals, text = change.partition("=")
        *tables, last = key.strip().split(".")
        if not equals:
            raise ValueError(f"--set: expected section.key=value, got {change!r}")
        if (section := [*tables, last][0]) not in SECTIONS:
            raise unknown(f"--set {change}", section, SECTIONS)
        inner = settings
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set {change}: expected a table at {table}, got {inner!r}")
        inner[last] = _value(text.strip(), change)
    for section in settings:
        if section not in ("preset", *SECTIONS):
            raise unknown("preset", section, SECTIONS)
    result = {"preset": settings.get("preset", "")}
    for section in SECTIONS:
        if section in PLAIN:
            result[section] = _plain(section, settings.get(section, {}))
        elif section in settings:
            result[section] = checked(section, section, settings[section])
        elif section not in OPTIONAL:
            raise ValueError(f"preset: expected a section [{section}], got none")
    return result


def _value(text: str, change: str) -> Any:
    """Return a TOML value; a bare word is a string, since shells remove quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z][\w./-]*", text):
            return text
        raise ValueError(f"--set {change}: expected a TOML value, got {text!r}") from error


def _plain(section: str, values: Any) -> Settings:
    """Return a section of plain values, defaults included."""
    if not isinstance(values, dict):
        raise TypeError(f"[{section}]: expected a table, got {values!r}")
    for key, value in values.items():
        if key not in PLAIN[section]:
            raise unknown(f"[{section}]", key, PLAIN[section])
        check_type(f"[{section}] {key}", value, PLAIN[section][key])
        if (choice := CHOICES.get(f"{section}.{key}")) and value not in choice:
            raise ValueError(f"[{section}] {key}: expected {' or '.join(choice)}, got {value!r}")
        if limits := LIMITS.get(f"{section}.{key}"):
            _check_limits(f"[{section}] {key}", value, limits, f"{section}.{key}" in OPEN)
    if section == "data" and len(values.get("range", (0, 1))) != 2:
        raise ValueError(f"[data] range: expected [lowest, highest], got {values['range']}")
    return PLAIN[section] | values


def _check_limits(where: str, value: float, limits: tuple[float, float], above: bool) -> None:
    """Raise unless a number is within its limits, and above the lower one if that is not allowed.

    NaN is within none.
    """
    low, high = limits
    if not low <= value <= high or (above and value == low):
        sign, end = ">" if above else ">=", "" if high == math.inf else f" and <= {high}"
        raise ValueError(f"{where}: expected a number {sign} {low}{end}, got {value}")


def build(settings: Settings) -> Parts:
    """Build the parts of settings, the networks on torch's default device, "meta" included."""
    data = settings["data"]
    low, high = data["range"]
    shape = {"channels": data["channels"], "low": low, "high": high}
    options = {"channels": data["channels"]}
    if data["classes"]:  # and one more where labels are dropped
        options["num_classes"] = data["classes"] + (settings["training"]["label_dropout"] > 0)
    if settings["run"]["activation_checkpointing"]:
        options["activation_checkpointing"] = True
    with torch.device("cpu"):
        sde = call("process", settings["process"], {})
        objective = call("objective", settings["objective"], shape)
    network = call("network", settings["network"], options)
    wrapped = {"network": network, "sde": sde, "data_range": (low, high)}
    augmentation, dequantizer = (
        call(name, settings[name], shape) if name in settings else None for name in OPTIONAL
    )
    if settings["training"]["learn"] == "dequantizer":
        network.requires_grad_(False)
    model = call("model", settings["model"], wrapped)
    return Parts(settings, sde, network, model, objective, augmentation, dequantizer)


def start(settings: Settings, model: nn.Module) -> None:
    """Load the averaged weights of the checkpoint that training starts from, if there is one."""
    if path := settings["training"]["start_from"]:
        model.load_state_dict(restore(path).model.state_dict())


def optimizer(settings: Settings, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Return the optimizer of settings."""
    made: torch.optim.Optimizer = call("optimizer", settings["optimizer"], {"params": parameters})
    return made


def scheduler(settings: Settings, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return the schedule of the learning rate: a linear warm-up, a constant, perhaps a decay."""
    training = settings["training"]
    warmup = max(1, training["warmup"])
    if steps := training["decay_after"]:
        return dk.inverse_sqrt_decay(optimizer, steps, warmup=warmup)
    return dk.linear_warmup(optimizer, warmup)


def average(settings: Settings, model: nn.Module) -> dk.EMA | dk.PowerEMA:
    """Return the average of a model's weights."""
    given = {"model": model, "batch_size": settings["training"]["batch"]}
    made: dk.EMA | dk.PowerEMA = call("average", settings["average"], given)
    return made


def sampler(settings: Settings, model: dk.ScoreModel, **changes: Any) -> Any:
    """Return the sampler of settings, a callable (shape, generator=...), with other arguments."""
    table = checked("sampler", "sampler", settings["sampler"] | changes)
    low, high = settings["data"]["range"]
    given = {"low": low, "high": high, "chain": model.sde}
    if (limit := table.pop("clip_x0", None)) is not None:
        model = dk.DenoisedModel(model, call("sampler.clip_x0", limit, given))
    made = call("sampler", table, given | {"model": model})
    return made.sample if isinstance(made, dk.ProbabilityFlow) else made


def show(settings: Settings) -> str:
    """Return settings as TOML."""
    lines = []
    for section, values in settings.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml(v)}" for key, v in values.items())]
        else:
            lines.append(f"{section} = {_toml(values)}")
    return "\n".join(lines).strip() + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, (bool, str)):
        return json.dumps(value)
    return repr(value)


def saved_settings(path: str | Path) -> Settings:
    """Return the settings in a checkpoint of train.py."""
    settings = dk.read_checkpoint(path).extra.get("settings")
    if not isinstance(settings, dict):
        raise dk.CheckpointError(f"{path}: expected a checkpoint of train.py, with settings, "
                                 "got one without")  # fmt: skip
    try:
        return changed(settings, ())
    except (TypeError, ValueError) as error:
        raise dk.CheckpointError(f"{path}: {error}") from error


def restore(
    path: str | Path, device: torch.device | str = "cpu", changes: Iterable[str] = ()
) -> Run:
    """Rebuild the model of a checkpoint of train.py with its averaged weights."""
    settings = changed(saved_settings(path), changes)
    parts = build(settings)
    ema, stateful = average(settings, parts.model), {}
    if isinstance(parts.dequantizer, nn.Module) and list(parts.dequantizer.parameters()):
        stateful["dequantizer"] = parts.dequantizer.to(device)
    step = dk.load_checkpoint(
        path, parts.model, ema=ema, stateful=stateful, restore_random=False
    ).step
    averaged = next(iter(ema.averages.values())) if isinstance(ema, dk.PowerEMA) else ema
    model: Any = averaged.model
    return Run(settings, parts, model.eval().to(device), step)


def open_data(settings: Settings, part: Literal["train", "test"] = "train") -> ImageData:
    """Return the images that settings name; only built-in sets have a part for tests."""
    data = settings["data"]
    found = open_source(
        data["source"], part, size=data["size"], channels=data["channels"], labels=data["labels"]
    )
    if found.shape[0] != data["channels"]:
        raise ValueError(
            f"[data] channels: expected {found.shape[0]} for {data['source']}, "
            f"got {data['channels']}"
        )
    return found
