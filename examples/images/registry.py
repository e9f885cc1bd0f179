"""The classes of the library that a preset may name, and calls of them from tables of values."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch

import diffusionkit as dk
from diffusionkit import networks
from diffusionkit.data import EDMAugmentation

Settings: TypeAlias = dict[str, Any]

# By the section or the argument that names them; also their named constructors.
ALLOWED: dict[str, tuple[type, ...]] = {
    "process": (dk.VPSDE, dk.SubVPSDE, dk.VESDE, dk.EDMSDE, dk.FlowMatchingSDE, dk.LogSNRSDE,
                dk.LearnedSDE, dk.DDPMChain, dk.SMLDChain),
    "network": (networks.NCSNpp, networks.DDPMpp, networks.DDPMUNet, networks.ADMUNet,
                networks.EDM2UNet, networks.DiT),
    "model": (dk.EpsModel, dk.X0Model, dk.VModel, dk.VelocityModel, dk.RawScoreModel,
              dk.ScaledScoreModel, dk.EDMModel),
    "label": (dk.TimeLabel, dk.StepLabel, dk.SigmaLabel, dk.LogSigmaLabel, dk.IndexLabel),
    "objective": (dk.ScoreMatching, dk.HybridLoss, dk.VLB),
    "weighting": (dk.SimpleWeighting, dk.LikelihoodWeighting, dk.EDMWeighting, dk.MinSNRWeighting,
                  dk.VelocityWeighting),
    "target": (dk.DenoisingTarget, dk.StableTarget),
    "times": (dk.UniformTimes, dk.StratifiedTimes, dk.ImportanceTimes, dk.LogNormalTimes,
              dk.LogitNormalTimes, dk.ModeTimes, dk.ShiftedTimes, dk.DiscreteTimes,
              dk.LossSecondMomentTimes),
    "decoder": (dk.GaussianDecoder,),
    "augmentation": (EDMAugmentation,),
    "dequantization": (dk.UniformDequantizer, dk.VariationalDequantizer),
    "optimizer": (torch.optim.Adam, torch.optim.AdamW),
    "average": (dk.EMA, dk.PowerEMA),
    "decay": (dk.HalfLife,),
    "sampler": (dk.PCSampler, dk.ProbabilityFlow),
    "predictor": (dk.Ancestral, dk.ReverseDiffusion, dk.EulerMaruyama, dk.Euler, dk.DDIM, dk.Heun,
                  dk.StochasticHeun, dk.DPMSolver2M, dk.DPMSolver2MSDE, dk.DPMSolver2S,
                  dk.DPMSolver2SAncestral, dk.DPMSolver3M, dk.DPMSolver3MSDE, dk.SASolver, dk.UniPC,
                  dk.DEIS, dk.LMS, dk.AdaptiveSDE),
    "corrector": (dk.Langevin, dk.AnnealedLangevin),
    "grid": (dk.UniformGrid, dk.LogSNRGrid, dk.QuadraticGrid, dk.KarrasGrid, dk.ChainGrid,
             dk.ShiftedGrid),
    "clip_x0": (dk.Clip, dk.DynamicThreshold),
}  # fmt: skip
_OWN = {"sampler": {"clip_x0": None}}  # keys of a section that are not arguments of its class
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
          list: "a list"}  # fmt: skip


def unknown(where: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error of an unknown name, with the nearest known ones."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, 3, 0.5) or known
    return ValueError(f"{where}: expected one of {', '.join(nearest)}, got {name!r}")


def check_type(where: str, value: Any, default: Any) -> None:
    """Raise unless a value has the type of the default; a number may be whole."""
    kind = type(default)
    right = type(value) is kind or (kind is float and type(value) is int)
    if kind in _KINDS and not right:
        raise TypeError(f"{where}: expected {_KINDS[kind]}, got {value!r}")


def checked(where: str, kind: str, table: Any) -> Settings:
    """Return a table with a name; a name alone stands for a table without arguments.

    Raises:
        ValueError: if a class or an argument is not known.
        TypeError: if a value has another type than the argument's default.
    """
    table = {"name": table} if isinstance(table, str) else table
    known = _arguments(_factory(where, kind, table)) | _OWN.get(kind, {})
    result = {"name": table["name"]}
    for key, value in table.items():
        if key not in ("name", *known):
            raise unknown(f"[{where}] {table['name']}", key, known)
        if key in ALLOWED and isinstance(value, (dict, str)):
            result[key] = checked(f"{where}.{key}", key, value)
        elif key != "name":
            if isinstance(value, dict):
                raise TypeError(f"[{where}] {key}: expected a plain value, got {value!r}")
            check_type(f"[{where}] {key}", value, known[key])
            result[key] = value
    return result


def call(where: str, table: Settings, given: Mapping[str, Any]) -> Any:
    """Return the object of a checked table; it gets those values given that are its arguments."""
    factory = _factory(where, where.rpartition(".")[2], table)
    known = _arguments(factory)
    arguments = {name: value for name, value in given.items() if name in known}
    for key, value in table.items():
        if isinstance(value, dict):
            arguments[key] = call(f"{where}.{key}", value, given)
        elif key != "name":
            arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[{where}] {table['name']}: {error}") from error


def _factory(where: str, kind: str, table: Any) -> Callable[..., Any]:
    """Return the class or named constructor of a table."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise TypeError(f"[{where}]: expected a table with a name, got {table!r}")
    known: dict[str, Callable[..., Any]] = {}
    for cls in ALLOWED[kind]:
        known[cls.__name__] = cls
        for name, method in inspect.getmembers(cls, inspect.ismethod):
            if not name.startswith("_"):
                known[f"{cls.__name__}.{name}"] = method
    if table["name"] not in known:
        raise unknown(f"[{where}] name", table["name"], known)
    return known[table["name"]]


def _arguments(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments that a class or named constructor takes, with their defaults."""
    cls: Any = factory if isinstance(factory, type) else getattr(factory, "__self__", None)
    inits = [c.__init__ for c in cls.__mro__ if "__init__" in vars(c)]
    found: dict[str, Any] = {}
    for function in [*([] if factory is cls else [factory]), *inits]:
        parameters = inspect.signature(function).parameters.values()
        named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        found = named | found
        if len(named) == len(parameters):  # none are passed on
            break
    return {name: default for name, default in found.items() if name != "self"}
