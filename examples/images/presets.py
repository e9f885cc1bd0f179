"""Presets: small TOML files of plain values, and the parts of the library that they name.

A preset has the sections [data], [process], [network], [model], [objective], [optimizer],
[training], [average], [sampler] and [run], and may have [augmentation] and [dequantization]. A
table with a name, such as `name = "VPSDE"` or `name = "DDPMpp.cifar10"`, is a call of that class
or named constructor; its other keys are arguments, and tables among them are built first. Only
the names in ALLOWED can be called.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import diffusionkit as dk
from diffusionkit import networks
from diffusionkit.data import ImageData, glyphs, open_images

try:
    from diffusionkit.data import EDMAugmentation

    AUG: tuple[type, ...] = (EDMAugmentation,)
except ImportError:
    AUG = ()

Settings: TypeAlias = dict[str, Any]
FOLDER = Path(__file__).parent / "presets"

# The values of the plain sections, with their defaults; those without one are given by presets.
PLAIN: dict[str, dict[str, Any]] = {
    "data": {
        "source": "",  # folder, .zip, .npz or "glyphs", from --data
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

# The classes that a section, or a table within one, may name; also their named constructors.
_TIMES = (dk.UniformTimes, dk.StratifiedTimes, dk.ImportanceTimes, dk.LogNormalTimes,
          dk.DiscreteTimes, dk.LossSecondMomentTimes)  # fmt: skip
_GRIDS = (dk.UniformGrid, dk.LogSNRGrid, dk.QuadraticGrid, dk.KarrasGrid, dk.ChainGrid)
ALLOWED: dict[str, tuple[type, ...]] = {
    "process": (dk.VPSDE, dk.SubVPSDE, dk.VESDE, dk.EDMSDE, dk.LogSNRSDE, dk.LearnedSDE,
                dk.DDPMChain, dk.SMLDChain),
    "network": (networks.NCSNpp, networks.DDPMpp, networks.DDPMUNet, networks.ADMUNet),
    "model": (dk.EpsModel, dk.X0Model, dk.VModel, dk.RawScoreModel, dk.ScaledScoreModel,
              dk.EDMModel),
    "objective": (dk.ScoreMatching, dk.HybridLoss, dk.VLB),
    "augmentation": AUG,
    "dequantization": (dk.UniformDequantizer, dk.VariationalDequantizer),
    "optimizer": (torch.optim.Adam, torch.optim.AdamW),
    "average": (dk.EMA, dk.PowerEMA),
    "sampler": (dk.PCSampler, dk.ProbabilityFlow),
    "label": (dk.TimeLabel, dk.StepLabel, dk.SigmaLabel, dk.LogSigmaLabel, dk.IndexLabel),
    "weighting": (dk.SimpleWeighting, dk.LikelihoodWeighting, dk.EDMWeighting, dk.MinSNRWeighting),
    "target": (dk.DenoisingTarget, dk.StableTarget),
    "times": _TIMES,
    "decoder": (dk.GaussianDecoder,),
    "predictor": (dk.Ancestral, dk.ReverseDiffusion, dk.EulerMaruyama, dk.Euler, dk.DDIM, dk.Heun,
                  dk.StochasticHeun, dk.DPMSolver2M, dk.DPMSolver2MSDE, dk.DPMSolver2S,
                  dk.DPMSolver3M, dk.UniPC, dk.DEIS, dk.LMS),
    "corrector": (dk.Langevin, dk.AnnealedLangevin),
    "grid": _GRIDS,
    "clip_x0": (dk.Clip, dk.DynamicThreshold),
}  # fmt: skip
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
            raise _unknown("preset", str(name), names())
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
            raise _unknown(f"--set {change}", section, SECTIONS)
        inner = settings
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set {change}: expected a table at {table}, got {inner!r}")
        inner[last] = _value(text.strip(), change)
    for section in settings:
        if section not in ("preset", *SECTIONS):
            raise _unknown("preset", section, SECTIONS)
    checked = {"preset": settings.get("preset", "")}
    for section in SECTIONS:
        if section in PLAIN:
            checked[section] = _plain(section, settings.get(section, {}))
        elif section in settings:
            checked[section] = _named(section, section, settings[section])
        elif section not in OPTIONAL:
            raise ValueError(f"preset: expected a section [{section}], got none")
    return checked


def _value(text: str, change: str) -> Any:
    """Return a TOML value; a bare word is a string, since shells remove quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z][\w./-]*", text):
            return text
        raise ValueError(f"--set {change}: expected a TOML value, got {text!r}") from error


def _unknown(where: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error of an unknown name, with the nearest known ones."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, 3, 0.5) or known
    return ValueError(f"{where}: expected one of {', '.join(nearest)}, got {name!r}")


def _plain(section: str, values: Any) -> Settings:
    """Return a section of plain values, defaults included."""
    if not isinstance(values, dict):
        raise TypeError(f"[{section}]: expected a table, got {values!r}")
    for key, value in values.items():
        if key not in PLAIN[section]:
            raise _unknown(f"[{section}]", key, PLAIN[section])
        _check_type(f"[{section}] {key}", value, PLAIN[section][key])
        if (choice := CHOICES.get(f"{section}.{key}")) and value not in choice:
            raise ValueError(f"[{section}] {key}: expected {' or '.join(choice)}, got {value!r}")
    return PLAIN[section] | values


def _check_type(where: str, value: Any, default: Any) -> None:
    """Raise unless a value has the type of the default; a whole number may be a float."""
    kind = next((kind for kind in (bool, int, float, str, list) if type(default) is kind), None)
    accepted = {None: object, float: (int, float)}.get(kind, kind)
    if not isinstance(value, accepted) or (type(value) is bool) > (kind in (bool, None)):
        expected = {bool: "true or false", int: "a whole number", float: "a number",
                    str: "text", list: "a list"}[kind]  # fmt: skip
        raise TypeError(f"{where}: expected {expected}, got {value!r}")


def _named(where: str, kind: str, table: Any) -> Settings:
    """Return a table with a name; a name alone stands for a table without arguments."""
    table = {"name": table} if isinstance(table, str) else table
    arguments = _arguments(_factory(where, kind, table))
    checked = {}
    for key, value in table.items():
        if key in ALLOWED and not (kind == "average" and isinstance(value, (int, float))):
            value = _named(f"{where}.{key}", key, value)
        elif key not in ("name", *arguments):
            raise _unknown(f"[{where}] {table['name']}", key, arguments)
        elif isinstance(value, dict):
            raise TypeError(f"[{where}] {key}: expected a plain value, got a table")
        elif key != "name":
            _check_type(f"[{where}] {key}", value, arguments[key])
        checked[key] = value
    return checked


def _factory(where: str, kind: str, table: Any) -> Callable[..., Any]:
    """Return the class or named constructor of a table."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise TypeError(f"[{where}]: expected a table with a name, got {table!r}")
    known: dict[str, Callable[..., Any]] = {}
    for cls in ALLOWED[kind]:
        known[cls.__name__] = cls
        for method, call in inspect.getmembers(cls, inspect.ismethod):
            if not method.startswith("_"):
                known[f"{cls.__name__}.{method}"] = call
    if table["name"] not in known:
        raise _unknown(f"[{where}] name", table["name"], known)
    return known[table["name"]]


def _arguments(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments that a class or named constructor takes, with their defaults."""
    cls = factory if isinstance(factory, type) else factory.__self__  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    for call in (factory, *(c.__init__ for c in cls.__mro__ if "__init__" in vars(c))):
        parameters = inspect.signature(call).parameters.values()
        named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        found = named | found
        if len(named) == len(parameters):  # no **options
            break
    return {name: default for name, default in found.items() if name != "self"}


def _call(where: str, table: Settings, given: Mapping[str, Any], kind: str = "") -> Any:
    """Return the object of a table; of the values given it gets those that it has arguments for."""
    factory = _factory(where, kind or where, table)
    accepted = _arguments(factory)
    arguments = {name: value for name, value in given.items() if name in accepted}
    for key, value in table.items():
        if isinstance(value, dict):
            arguments[key] = _call(f"{where}.{key}", value, given, key)
        elif key != "name":
            arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[{where}] {table['name']}: {error}") from error


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
        sde = _call("process", settings["process"], {})
        objective = _call("objective", settings["objective"], shape)
    network = _call("network", settings["network"], options)
    wrapped = {"network": network, "sde": sde, "data_range": (low, high)}
    augmentation, dequantizer = (
        _call(name, settings[name], shape) if name in settings else None for name in OPTIONAL
    )
    if settings["training"]["learn"] == "dequantizer":
        network.requires_grad_(False)
    model = _call("model", settings["model"], wrapped)
    return Parts(settings, sde, network, model, objective, augmentation, dequantizer)


def start(settings: Settings, model: nn.Module) -> None:
    """Load the averaged weights of the checkpoint that training starts from, if there is one."""
    if path := settings["training"]["start_from"]:
        model.load_state_dict(restore(path).model.state_dict())


def optimizer(settings: Settings, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Return the optimizer of settings."""
    made: torch.optim.Optimizer = _call("optimizer", settings["optimizer"], {"params": parameters})
    return made


def scheduler(settings: Settings, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return the schedule of the learning rate: a linear warm-up, then a constant."""
    return dk.linear_warmup(optimizer, max(1, settings["training"]["warmup"]))


def average(settings: Settings, model: nn.Module) -> dk.EMA | dk.PowerEMA:
    """Return the average of a model's weights."""
    given = {"model": model, "batch_size": settings["training"]["batch"]}
    made: dk.EMA | dk.PowerEMA = _call("average", settings["average"], given)
    return made


def sampler(settings: Settings, model: dk.ScoreModel, **changes: Any) -> Any:
    """Return the sampler of settings, a callable (shape, generator=...), with other arguments."""
    table = _named("sampler", "sampler", settings["sampler"] | changes)
    low, high = settings["data"]["range"]
    given = {"low": low, "high": high, "chain": model.sde}
    if (limit := table.pop("clip_x0", None)) is not None:
        model = dk.DenoisedModel(model, _call("sampler.clip_x0", limit, given, "clip_x0"))
    made = _call("sampler", table, given | {"model": model})
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
    """Return the images that settings name; only glyphs have a part for tests."""
    data = settings["data"]
    if data["source"] == "glyphs":
        return glyphs(part, size=data["size"], labels=data["labels"])
    return open_images(data["source"], size=data["size"], channels=data["channels"])
