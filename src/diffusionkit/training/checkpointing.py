"""Training state in one file: written atomically, read without running code."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pickle import PicklingError, UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from .._distributed import placed_state, whole
from .._files import CheckpointError, atomic_write, check_torch, check_weights, read_torch
from ._averaged_weights import check_own_weights
from .ema import EMA

FORMAT = "diffusionkit.checkpoint"
VERSION = 1

_PARTS: dict[str, Any] = {
    "step": int,
    "model": dict,
    "ema": dict | None,
    "optimizer": dict | None,
    "optimizer_type": str | None,
    "stateful": dict,
    "generators": dict,
    "random": dict,
    "extra": dict,
}


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint that are not loaded into objects.

    Args:
        step: the number of steps taken.
        extra: the ``extra`` of `save_checkpoint`.
    """

    step: int
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    ema: EMA | None = None,
    optimizer: Optimizer | None = None,
    step: int = 0,
    stateful: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the whole training state to a file.

    The file is written under a temporary name and renamed, so a crash leaves the previous
    checkpoint intact. The states of Python's, numpy's and torch's global random generators are
    stored too: on a CPU a resumed run continues bit for bit.

    Args:
        path: the file.
        model: the score model.
        ema: the average of its weights.
        optimizer: the optimizer.
        step: the number of steps taken.
        stateful: further objects with `state_dict` and `load_state_dict`, by name: a scheduler,
            a gradient scaler.
        generators: the torch generators of your loop, by name.
        extra: plain values and tensors to keep.

    Raises:
        ValueError: if a part holds values that cannot be read back safely.
    """
    check_own_weights(model)
    payload = whole(
        {
            "format": FORMAT,
            "version": VERSION,
            "step": int(step),
            "model": model.state_dict(),
            "ema": ema.state_dict() if ema is not None else None,
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
            "optimizer_type": type(optimizer).__name__ if optimizer is not None else None,
            "stateful": {name: part.state_dict() for name, part in (stateful or {}).items()},
            "generators": {name: g.get_state() for name, g in (generators or {}).items()},
            "random": _random_states(),
            "extra": dict(extra or {}),
        }
    )

    def write(file: BinaryIO) -> None:
        try:
            torch.save(payload, file)
            check_torch(file)
        except (UnpicklingError, PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                "checkpoint: expected tensors, numbers, strings, lists and dictionaries only, "
                f"got values that cannot be read back safely: {error}"
            ) from error

    atomic_write(path, write)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    ema: EMA | None = None,
    optimizer: Optimizer | None = None,
    stateful: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    restore_random: bool = True,
    map_location: torch.device | str | None = "cpu",
) -> Checkpoint:
    """Load a file of `save_checkpoint` into objects, strictly: after an error none has changed.

    Args:
        path: the file.
        model: the score model.
        ema: the average of its weights.
        optimizer: the optimizer.
        stateful: the further objects that were saved, by name.
        generators: the torch generators of your loop, by name.
        restore_random: whether to set the global random generators too.
        map_location: the device of the tensors before they are copied.

    Returns:
        The step and the stored ``extra``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or not a checkpoint, lacks a requested
            part, or has missing, extra or misshapen tensors.
    """
    check_own_weights(model)
    state = _read(path, map_location)
    stateful, generators = stateful or {}, generators or {}
    for name, wanted in (("ema", ema), ("optimizer", optimizer)):
        if wanted is not None and state[name] is None:
            raise CheckpointError(f"{path}: expected a checkpoint with {name}, got one without")
    for name, parts in (("stateful", stateful), ("generators", generators)):
        if missing := sorted(set(parts) - set(state[name])):
            raise CheckpointError(
                f"{path}: expected {name} {missing}, got {sorted(state[name]) or 'none'}"
            )
    loads: list[tuple[Callable[[Any], Any], Any, Any]] = []
    try:
        check_weights(path, "model", model, state["model"])
        if ema is not None:
            check_weights(path, "ema", ema.model, state["ema"]["model"])
        if optimizer is not None:
            _check_optimizer(path, optimizer, state)
            after = _placed_optimizer(optimizer, state["optimizer"])
            loads.append((optimizer.load_state_dict, optimizer.state_dict(), after))
        for name, part in stateful.items():
            loads.append((part.load_state_dict, part.state_dict(), state["stateful"][name]))
        for name, generator in generators.items():
            after = state["generators"][name].cpu()
            loads.append((generator.set_state, generator.get_state(), after))
        if restore_random:
            loads.append((_restore_random, _random_states(), state["random"]))
        loads = [(load, copy.deepcopy(before), after) for load, before, after in loads]
        for load, _, after in loads:
            load(after)
        # The weights come last: they were fully checked and cannot fail.
        if ema is not None:
            ema.load_state_dict(state["ema"])
        model.load_state_dict(placed_state(state["model"], model.state_dict()))
    except CheckpointError:
        raise
    except Exception as error:
        for load, before, _ in loads:
            load(before)
        raise CheckpointError(
            f"{path}: expected states that fit the objects given, "
            f"got {type(error).__name__}: {error}"
        ) from error
    return Checkpoint(step=state["step"], extra=state["extra"])


def _read(path: str | os.PathLike[str], map_location: torch.device | str | None) -> dict[str, Any]:
    expected = "a checkpoint written by save_checkpoint"
    state = read_torch(path, expected=expected, map_location=map_location)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected {expected}, got a foreign file")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, got {state.get('version')}")
    odd = [k for k, kind in _PARTS.items() if k not in state or not isinstance(state[k], kind)]
    if odd:
        raise CheckpointError(f"{path}: expected {expected}, got one with odd or missing: {odd}")
    return state


def _check_optimizer(
    path: str | os.PathLike[str], optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    def described(kind: str, groups: list[dict[str, Any]]) -> str:
        return f"{kind} with groups of {[len(group['params']) for group in groups]} tensors"

    wanted = described(type(optimizer).__name__, optimizer.param_groups)
    got = described(state["optimizer_type"], state["optimizer"]["param_groups"])
    if wanted != got:
        raise CheckpointError(f"{path}: optimizer: expected {wanted}, got {got}")


def _placed_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with the moments of each parameter sharded as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    moments = dict(state["state"])
    for n, p in zip(numbers, parameters, strict=True):
        if n in moments:
            like = {k: p for k, x in moments[n].items() if getattr(x, "shape", None) == p.shape}
            moments[n] = placed_state(moments[n], like)
    return {**state, "state": moments}


def _random_states() -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
