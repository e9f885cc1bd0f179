"""Training state in one file: written atomically, read without running code."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import check_count, check_flag, check_part, check_target_device
from .._files import CheckpointError, read_torch
from .._parts import describe
from .._writing import check_suffix, checked_path
from ..distributed._group import rank_and_world_size
from ..distributed._random_states import (
    check_by_rank,
    own_random_states,
    restore_random_states,
    saved_states,
    state_for,
    states_for,
)
from ..distributed._sharded import has_sharded, write_whole
from ..distributed._wrappers import bare_state, load_bare_state
from ..distributed.seeds import gather_random_states
from ._averaged_weights import check_own_weights
from ._checkpoint_parts import (
    averages_of,
    check_arguments,
    check_finite_weights,
    check_has_parts,
    fitted_averages,
    fitted_model,
    fitted_part,
    load_state,
    objective_parts,
    parameter_names,
    saved_state,
    unread_parts,
)
from ._model_description import described, difference
from ._optimizer_state import fitted_optimizer, load_optimizer, saved_optimizer
from ._payload import save_payload
from .ema import EMA
from .power_ema import PowerEMA

logger = logging.getLogger(__name__)

FORMAT = "diffusionkit.checkpoint"
VERSION = 4

_PARTS: dict[str, Any] = {
    "step": int,
    "world_size": int,
    "model": dict,
    "ema": dict | None,
    "optimizer": dict | None,
    "optimizer_type": str | None,
    "stateful": dict,
    "generators": dict,
    "random": dict,
    "extra": dict,
}
# What earlier versions did not have, and its value there.
_LATER: dict[str, tuple[Any, Any]] = {
    "about": (dict, {}),
    "objective": (dict, {}),
    "optimizer_names": (list | None, None),
    "optimizer_entries": (dict | None, None),
    "description": (dict | None, None),
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
    ema: EMA | PowerEMA | None = None,
    optimizer: Optimizer | None = None,
    objective: Any = None,
    step: int = 0,
    stateful: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    random_states: Sequence[Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the whole training state to a file.

    The file is complete and on disk before it replaces the previous one, so a crash leaves one or
    the other. The states of Python's, numpy's and torch's global random generators are stored too,
    those of this process or, with ``random_states``, of all: on a CPU a resumed run continues bit
    for bit. Weights have the names of the model without wrappers (torch.compile,
    DistributedDataParallel). A description of the model's process, parameterization, noise label
    and network is stored with them, as `diffusionkit.checkpoints.save_model` does.

    One process may call this alone. If weights are sharded, all must: their whole tensors, and the
    random states of all ranks, are gathered in the process that writes, one of those with the same
    path, and all return when the file is complete.

    Args:
        path: the file.
        model: the score model.
        ema: the average of its weights.
        optimizer: the optimizer.
        objective: the objective, whose parts may have a state, such as `LossSecondMomentTimes`.
        step: the number of steps taken.
        stateful: further objects with `state_dict` and `load_state_dict`, by name: a scheduler,
            a gradient scaler, `ReferenceBatches`.
        generators: the torch generators of your loop, by name.
        random_states: the random states of all ranks, from `gather_random_states`.
        extra: plain values and tensors to keep.

    Raises:
        ValueError: if a part holds values that cannot be read back, weights or moments are not
            finite, the model holds averaged weights, or the name is that of a safetensors file.
        TypeError: if a part has the wrong type.
        OSError: if the file cannot be written; the previous one is left as it was.
    """
    check_suffix(path)
    check_part(model, nn.Module, "model")
    check_count(step, "step", least=0)
    check_arguments(ema, optimizer, stateful, generators, extra)
    check_own_weights(model)
    parts, stateful = objective_parts(objective), stateful or {}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "about": described(model),
        "description": describe(model).tree,
        "model": bare_state(model),
        "ema": None if ema is None else saved_state(ema),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "objective": {name: saved_state(part) for name, part in parts.items()},
        "stateful": {name: saved_state(part) for name, part in stateful.items()},
        "extra": dict(extra or {}),
    }
    if random_states is None and has_sharded(content):
        random_states = gather_random_states(generators)
    content |= saved_states(random_states, generators or {}, *rank_and_world_size())

    def write(payload: dict[str, Any]) -> None:
        averages = payload["ema"]
        check_finite_weights("model", model, payload["model"])
        for length, average in averages_of(ema).items():
            name = "ema" if length is None else f"ema[{length}]"
            state = averages if length is None else averages[length]
            check_finite_weights(name, average.model, state["model"])
        names = parameter_names(model, parts, stateful)
        moments = saved_optimizer(optimizer, names, payload["optimizer"])
        save_payload(path, payload | moments)

    write_whole(path, content, write)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    ema: EMA | PowerEMA | None = None,
    optimizer: Optimizer | None = None,
    objective: Any = None,
    stateful: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    restore_random: bool = True,
    map_location: torch.device | str | None = "cpu",
) -> Checkpoint:
    """Load a file of `save_checkpoint` into objects, strictly: after an error none has changed.

    The process, parameterization, noise label and network of the model must be those of the file:
    processes and labels are compared by their values, networks by class and arguments. To use
    its weights in another model, load them into one like the file's and pass on its network.
    Moments of the optimizer are matched to parameters by name. A warning in the log lists the parts
    of the file that are not requested. Without an optimizer and random states, when training is not
    resumed, the message has the level of information.

    Args:
        path: the file.
        model: the score model.
        ema: the average of its weights.
        optimizer: the optimizer.
        objective: the objective, with the parts that it had.
        stateful: the further objects that were saved, by name.
        generators: the torch generators of your loop, by name.
        restore_random: whether to set the global random generators too.
        map_location: the device of the tensors before they are copied.

    Returns:
        The step and the stored ``extra``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged, not a checkpoint or one of another
            model, lacks a requested part, or has missing, extra, misshapen or invalid entries.
        ValueError: if the model holds averaged weights.
        TypeError: if a part has the wrong type.
    """
    file = checked_path(path)
    check_part(model, nn.Module, "model")
    check_arguments(ema, optimizer, stateful, generators, None)
    check_own_weights(model)
    check_flag(restore_random, "restore_random")
    check_target_device(map_location, "map_location")
    asked = {
        "ema": ema, "optimizer": optimizer, "objective": objective_parts(objective),
        "stateful": stateful or {}, "generators": generators or {},
    }  # fmt: skip
    state = _read(file, map_location)
    check_has_parts(file, state, asked)
    done: list[_Load] = []
    try:
        loads = _loads(file, model, state, asked, restore_random)
        for load in loads:
            done.append(load)
            load.into(load.after)
    except BaseException as error:
        for load in done:
            load.into(load.before)
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{file}: expected states that fit the objects given, "
            f"got {type(error).__name__}: {error}"
        ) from error
    if unread := list(unread_parts(state, asked)):
        level = logging.WARNING if optimizer is not None or restore_random else logging.INFO
        logger.log(level, "%s: not loaded, since not requested: %s", file, ", ".join(unread))
    return Checkpoint(step=state["step"], extra=state["extra"])


@dataclass
class _Load:
    """A state to load into an object, and the one that it has before."""

    into: Callable[[Any], Any]
    before: Any
    after: Any


def _loads(
    file: str,
    model: nn.Module,
    state: Mapping[str, Any],
    asked: Mapping[str, Any],
    restore_random: bool,
) -> list[_Load]:
    """Return what is to be loaded, after checking all of it."""
    rank, _ = rank_and_world_size()
    weights = fitted_model(file, "model", model, state["model"])
    if (problem := difference(described(model, weights), state["about"])) is not None:
        raise CheckpointError(f"{file}: {problem}")
    loads = []
    if (optimizer := asked["optimizer"]) is not None:
        names = parameter_names(model, asked["objective"], asked["stateful"])
        moments = fitted_optimizer(file, optimizer, names, state)
        loads.append(_Load(partial(load_optimizer, optimizer), optimizer.state_dict(), moments))
    for kind in ("objective", "stateful"):
        for name, part in asked[kind].items():
            after = fitted_part(file, f"{kind}[{name!r}]", part, state[kind][name])
            loads.append(_Load(partial(load_state, part), saved_state(part), after))
    try:
        for name, generator in asked["generators"].items():
            known = state["generators"][name]
            after = state_for(rank, state["step"], known, generator, f"generators[{name!r}]")
            loads.append(_Load(generator.set_state, generator.get_state(), after))
        if restore_random:
            after = states_for(rank, state["step"], state["random"])
            loads.append(_Load(restore_random_states, own_random_states(), after))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if (ema := asked["ema"]) is not None:
        averages = fitted_averages(file, "ema", ema, state["ema"])
        loads.append(_Load(partial(load_state, ema), saved_state(ema), averages))
    for load in loads:
        load.before = copy.deepcopy(load.before)
    own = bare_state(model)
    if not all(isinstance(value, torch.Tensor) for value in own.values()):
        own = copy.deepcopy(own)  # an extra state may be rejected; checked tensors are not
    return [*loads, _Load(partial(load_bare_state, model), own, weights)]


def _read(path: str, map_location: torch.device | str | None) -> dict[str, Any]:
    expected = "a checkpoint written by save_checkpoint"
    state = read_torch(path, expected=expected, map_location=map_location)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected {expected}, got another kind of file")
    version = state.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, got {version}")
    if version < 3 and isinstance(state.get("generators"), dict):
        # Earlier versions knew one process.
        generators = {name: {0: part} for name, part in state["generators"].items()}
        own = {"world_size": 1, "random": {0: state.get("random")}, "generators": generators}
        state = state | own
    if version == 1:
        logger.warning(
            "%s: a file of version 1 does not describe its process, parameterization, noise label "
            "and network, nor the names of the optimizer's parameters; they are not compared", path,
        )  # fmt: skip
    absent = list(_LATER) if version == 1 else ["description"] if version < VERSION else []
    state = {**{name: _LATER[name][1] for name in absent}, **state}
    kinds = _PARTS | {name: kind for name, (kind, _) in _LATER.items()}
    odd = [k for k, kind in kinds.items() if k not in state or not isinstance(state[k], kind)]
    if odd:
        raise CheckpointError(f"{path}: expected {expected}, got one with odd or missing: {odd}")
    if type(state["step"]) is not int or state["step"] < 0:
        raise CheckpointError(f"{path}: step: expected a number >= 0, got {state['step']}")
    try:
        check_count(state["world_size"], "world_size")
        check_by_rank(state["world_size"], state["random"], "random")
        for name, by_rank in state["generators"].items():
            check_by_rank(state["world_size"], by_rank, f"generators[{name!r}]")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return state
