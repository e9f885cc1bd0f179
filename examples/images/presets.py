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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import diffusionkit as dk
from diffusionkit import networks

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
    """Return settings with changes "section.key=value", after checking all names."""
    settings = copy.deepcopy(settings)
    for section, defaults in PLAIN.items():
        settings[section] = defaults | settings.get(section, {})
    for change in changes:
        key, equals, text = change.partition("=")
        *tables, last = key.strip().split(".")
        if not equals or not tables:
            raise ValueError(f"--set: expected section.key=value, got {change!r}")
        if tables[0] not in SECTIONS:
            raise _unknown(f"--set {change}", tables[0], SECTIONS)
        inner = settings
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set {change}: expected a table at {table}, got {inner!r}")
        inner[last] = _value(text.strip(), change)
    _check(settings)
    return {name: settings[name] for name in ("preset", *SECTIONS) if name in settings}


def _value(text: str, change: str) -> Any:
    """Return a TOML value; a bare word is a string, since shells remove quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z][\w.-]*", text):
            return text
        raise ValueError(f"--set {change}: expected a TOML value, got {text!r}") from error


def _unknown(where: str, name: str, known: Iterable[str]) -> ValueError:
    nearest = difflib.get_close_matches(name, known := sorted(known), 3, 0.5)
    hint = f"nearest: {', '.join(nearest)}" if nearest else ", ".join(known)
    return ValueError(f"{where}: expected a known name ({hint}), got {name!r}")


def _check(settings: Settings) -> None:
    """Check the names of sections and keys, and the types of plain values."""
    for section in settings:
        if section not in ("preset", *SECTIONS):
            raise _unknown("preset", section, SECTIONS)
    for section in SECTIONS:
        if section in PLAIN:
            _check_plain(section, settings[section])
        elif section in settings:
            _check_call(section, section, settings[section])
        elif section not in OPTIONAL:
            raise ValueError(f"preset: expected a section [{section}], got none")


def _check_plain(section: str, values: Settings) -> None:
    for key, value in values.items():
        if key not in PLAIN[section]:
            raise _unknown(f"[{section}] {key}", key, PLAIN[section])
        kind = type(PLAIN[section][key])
        if kind is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not kind:
            got = f"{type(value).__name__} {value!r}"
            raise TypeError(f"[{section}] {key}: expected {kind.__name__}, got {got}")
    if section == "run" and values["precision"] not in ("float32", "bfloat16"):
        got = values["precision"]
        raise ValueError(f"[run] precision: expected float32 or bfloat16, got {got!r}")


def _check_call(where: str, kind: str, table: Any) -> None:
    factory = _factory(where, kind, table)
    for key, value in table.items():
        if key not in ("name", *_arguments(factory), *_OWN.get(kind, ())):
            raise _unknown(f"[{where}] {table['name']}", key, _arguments(factory))
        if isinstance(value, dict):
            _check_call(f"{where}.{key}", key, value)


# Keys of a section that are not arguments of its class.
_OWN = {"sampler": ("clip_x0",)}


def _factory(where: str, kind: str, table: Any) -> Callable[..., Any]:
    """Return the class or named constructor of a table."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise ValueError(f"[{where}]: expected a table with a name, got {table!r}")
    known: dict[str, Callable[..., Any]] = {}
    for cls in ALLOWED.get(kind, ()):
        known[cls.__name__] = cls
        for method, call in inspect.getmembers(cls, inspect.ismethod):
            if not method.startswith("_"):
                known[f"{cls.__name__}.{method}"] = call
    if table["name"] not in known:
        raise _unknown(f"[{where}] name", table["name"], known)
    return known[table["name"]]


def _arguments(factory: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that a class or named constructor takes."""
    cls = factory if isinstance(factory, type) else factory.__self__  # type: ignore[attr-defined]
    found: set[str] = set()
    for call in (factory, *(c.__init__ for c in cls.__mro__ if "__init__" in vars(c))):
        parameters = inspect.signature(call).parameters.values()
        found |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _call(where: str, kind: str, table: Settings, given: Mapping[str, Any]) -> Any:
    """Return the object of a table; of the values given it gets those that it has arguments for."""
    factory = _factory(where, kind, table)
    accepted = _arguments(factory)
    arguments = {name: value for name, value in given.items() if name in accepted}
    for key, value in table.items():
        if isinstance(value, dict):
            arguments[key] = _call(f"{where}.{key}", key, value, given)
        elif key != "name":
            arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[{where}] {table['name']}: {error}") from error


def build(settings: Settings) -> Parts:
    """Build the parts of settings, the networks on torch's default device, "meta" included."""
    data, run = settings["data"], settings["run"]
    low, high = data["range"]
    given: dict[str, Any] = {"channels": data["channels"], "low": low, "high": high}
    of_network = {"channels": data["channels"]}
    if data["classes"]:
        of_network["num_classes"] = data["classes"] + (settings["training"]["label_dropout"] > 0)
    if run["activation_checkpointing"]:
        of_network["activation_checkpointing"] = True
    with torch.device("cpu"):
        sde = _call("process", "process", settings["process"], {})
        objective = _call("objective", "objective", settings["objective"], given)
    network = _call("network", "network", settings["network"], of_network)
    wrapped = {"network": network, "sde": sde, "data_range": (low, high)}
    made = {name: _call(name, name, settings[name], given) for name in OPTIONAL if name in settings}
    return Parts(
        settings=settings,
        sde=sde,
        network=network,
        model=_call("model", "model", settings["model"], wrapped),
        objective=objective,
        augmentation=made.get("augmentation"),
        dequantizer=made.get("dequantization"),
    )


def optimizer(settings: Settings, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Return the optimizer of settings."""
    made: torch.optim.Optimizer = _call(
        "optimizer", "optimizer", settings["optimizer"], {"params": parameters}
    )
    return made


def scheduler(settings: Settings, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return the schedule of the learning rate: a linear warm-up, then a constant."""
    return dk.linear_warmup(optimizer, max(1, settings["training"]["warmup"]))


def average(settings: Settings, model: nn.Module) -> dk.EMA | dk.PowerEMA:
    """Return the average of a model's weights."""
    made: dk.EMA | dk.PowerEMA = _call("average", "average", settings["average"], {"model": model})
    return made


def sampler(settings: Settings, model: dk.ScoreModel, **changes: Any) -> Any:
    """Return the sampler of settings, a callable (shape, generator=...), with other arguments."""
    table = settings["sampler"] | changes
    low, high = settings["data"]["range"]
    given = {"low": low, "high": high, "chain": model.sde}
    if (limit := table.pop("clip_x0", None)) is not None:
        model = dk.DenoisedModel(model, _call("sampler.clip_x0", "clip_x0", limit, given))
    return _call("sampler", "sampler", table, given | {"model": model})


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
    extra = dk.read_checkpoint(path).extra
    settings = extra.get("settings")
    if not isinstance(settings, dict) or "preset" not in settings:
        raise dk.CheckpointError(
            f"{path}: expected a checkpoint of train.py, which has settings, got one with "
            f"{', '.join(map(str, extra)) or 'none'}"
        )
    return settings


def restore(
    path: str | Path, device: torch.device | str = "cpu", changes: Sequence[str] = ()
) -> Run:
    """Rebuild the model of a checkpoint of train.py with its averaged weights."""
    settings = changed(saved_settings(path), changes)
    with torch.device(device):
        parts = build(settings)
    ema = average(settings, parts.model)
    file = dk.load_checkpoint(path, parts.model, ema=ema, restore_random=False)
    averaged = ema if isinstance(ema, dk.EMA) else next(iter(ema.averages.values()))
    model: Any = averaged.model
    return Run(settings, parts, model.eval().to(device), file.step)
