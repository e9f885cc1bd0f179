"""Validation of score models: parts call `predict`, which wrappers of modules do not intercept."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ._checks import check_part
from .interfaces import ScoreModel

_CHANGING = ("torch.distributed.fsdp", "torch.distributed._composable")
_ADVICE = "wrap the network, not the score model"


def check_model(model: object) -> None:
    """Raise unless an object is a score model, and one that no wrapper has changed in vain.

    Wrappers of modules, and functions that change them in place, act on `forward`: mixed precision,
    sharding, gradients averaged over processes. Objectives and samplers call `predict`.

    Raises:
        TypeError: if it is none, was sharded itself, or has another `forward` than its class.
    """
    if torch.compiler.is_compiling():
        check_is_model(model)
        return
    kind: Any = type(model)
    if _is_sound(kind) and "forward" not in vars(model):
        return
    check_is_model(model)
    if (sharded := _sharded_class(kind)) is not None:
        raise TypeError(
            f"model: expected a score model whose network is sharded, got {sharded} that is "
            f"itself; {_ADVICE}: fully_shard(network), then EpsModel(network, sde)"
        )
    if "forward" in vars(model):
        raise TypeError(
            "model: expected a score model with the forward of its class, got "
            f"{type(model).__name__} with another one, set by accelerator.prepare or the like, "
            f"which is not called; {_ADVICE}: EpsModel(accelerator.prepare(network), sde)"
        )


def check_is_model(model: object) -> None:
    """Raise a TypeError with advice unless an object is a score model."""
    if isinstance(model, ScoreModel):
        return
    if isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a ScoreModel, got {type(model).__name__}; {_module_advice(model)}"
        )
    check_part(model, ScoreModel, "model")


def _module_advice(module: nn.Module) -> str:
    """Return how to get a score model from an average, a wrapper of one, or a network."""
    if isinstance(getattr(module, "model", None), ScoreModel):
        return "pass its model: ema.model"
    if isinstance(averages := getattr(module, "averages", None), dict) and averages:
        return f"pass the model of an average: ema.averages[{next(iter(averages))}].model"
    if any(isinstance(part, ScoreModel) for part in module.modules()):
        return f"{_ADVICE}: EpsModel(DistributedDataParallel(network), sde)"
    return "make one of a network: EpsModel(network, sde)"


@functools.cache
def _is_sound(kind: type) -> bool:
    """Return whether a class is one of score models as they were written."""
    return issubclass(kind, ScoreModel) and _sharded_class(kind) is None


@functools.cache
def _sharded_class(kind: type) -> str | None:
    """Return the name of a class of models if fully_shard or replicate have put another before."""
    changed = any(base.__module__.startswith(_CHANGING) for base in kind.__mro__)
    return kind.__bases__[-1].__name__ if changed else None
