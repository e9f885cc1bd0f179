"""The state of an optimizer in a file: its moments matched to parameters by name, and checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .._files import CheckpointError
from .._weights import FLOATS, is_finite
from ..distributed._sharded import placed_state

# Of torch's optimizers: moments with the shape of their parameter, and numbers.
_PARTS = ("optimizer", "optimizer_type", "optimizer_names", "optimizer_entries")
_SQUARES = {
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "variance",
    "row_var", "col_var",
}  # fmt: skip
_MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg",
    "grad_avg", "acc_delta", "sum", "prev", "step_size", "ax", "variance",
}  # fmt: skip
_COUNTS = {"step", "n_iter", "func_evals"}
_NUMBERS = {"step", "eta", "mu", "mu_product"}
# Options on how a step is computed, not which step; those of the running optimizer apply.
_HOW = {"foreach", "fused", "capturable", "differentiable"}


def saved_optimizer(
    optimizer: Optimizer | None, names: Mapping[int, str], state: Any
) -> dict[str, Any]:
    """Return what a checkpoint stores of an optimizer, by part.

    Args:
        optimizer: the optimizer, if there is one.
        names: the names of parameters by their ids.
        state: its state, with whole tensors.

    Raises:
        ValueError: if a moment is misshapen or not finite.
    """
    if optimizer is None:
        return dict.fromkeys(_PARTS)
    try:
        _check_state(optimizer, names, state)
    except _Problem as problem:
        message = f"optimizer: {problem}"
        raise ValueError(message) from None
    all_names = [_names(group, names) for group in optimizer.param_groups]
    parts = (state, type(optimizer).__name__, all_names, _entries(state))
    return dict(zip(_PARTS, parts, strict=True))


def fitted_optimizer(
    path: str, optimizer: Optimizer, names: Mapping[int, str], file: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of an optimizer in a file, for `load_state_dict`, after checking it.

    Moments are matched to parameters by name, where the file has names.

    Args:
        path: the file, for the error.
        optimizer: the optimizer.
        names: the names of its parameters by their ids.
        file: the contents of the file.

    Raises:
        CheckpointError: if it is of another optimizer, of other parameters, or damaged.
    """
    state = file["optimizer"]
    try:
        _check_form(state)
        _check_kind(optimizer, file["optimizer_type"], state)
        if (entries := file.get("optimizer_entries")) is not None and entries != _entries(state):
            _check_entries(entries, _entries(state))
        state = _ordered(optimizer, names, file.get("optimizer_names"), state)
        _check_state(optimizer, names, state)
        groups = [
            _merged(f"group {number}", own, group)
            for number, (own, group) in enumerate(
                zip(optimizer.param_groups, state["param_groups"], strict=True)
            )
        ]
    except _Problem as problem:
        raise CheckpointError(f"{path}: optimizer: {problem}") from None
    return {"state": _placed(optimizer, state["state"]), "param_groups": groups}


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state, with the dtypes that it has; torch casts moments to those of the parameters."""
    optimizer.load_state_dict(dict(state))
    parameters = _parameters(optimizer)
    for number, entry in state["state"].items():
        if isinstance(number, int):
            held = optimizer.state[parameters[number]]
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.dtype != held[name].dtype:
                    held[name] = value.to(held[name].device, copy=True)


class _Problem(Exception):  # noqa: N818 - becomes the text of another error
    """A state that does not fit; its text becomes that of another error."""


def _wrong(what: str, expected: object, got: object) -> NoReturn:
    raise _Problem(f"{what}: expected {expected}, got {got}")


def _names(group: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    """Return the names of a group's parameters; those of no module are numbered."""
    unknown = iter(range(len(group["params"])))
    return [names.get(id(p)) or f"(unnamed {next(unknown)})" for p in group["params"]]


def _entries(state: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the kinds of all values that an optimizer keeps, by parameter and name."""
    return {
        number: {name: _kind(value) for name, value in entry.items()}
        for number, entry in state["state"].items()
        if isinstance(entry, dict)
    }


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"list of {len(value)}" if isinstance(value, list) else type(value).__name__


def _check_form(state: Any) -> None:
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        got = list(state) if isinstance(state, dict) else type(state).__name__
        _wrong("state", "state and param_groups", got)
    moments, groups = state["state"], state["param_groups"]
    if not isinstance(moments, dict) or not isinstance(groups, list) or not groups:
        _wrong("state", "a dictionary and a list of groups", "others")
    numbers: list[Any] = []
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            _wrong(f"group {number}", "a dictionary with a list of params", "another value")
        numbers += group["params"]
    if numbers != list(range(len(numbers))) or any(type(n) is not int for n in numbers):
        _wrong("param_groups", "parameters numbered from 0", numbers[:8])
    for number, entry in moments.items():
        if isinstance(number, int) and not 0 <= number < len(numbers):
            _wrong("state", f"numbers of {len(numbers)} parameters", number)
        if isinstance(number, int) and not isinstance(entry, dict):
            _wrong(f"state of parameter {number}", "a dictionary", type(entry).__name__)


def _check_kind(optimizer: Optimizer, kind: Any, state: Mapping[str, Any]) -> None:
    def described(kind: Any, groups: list[dict[str, Any]]) -> str:
        return f"{kind} with groups of {[len(group['params']) for group in groups]} tensors"

    wanted = described(type(optimizer).__name__, optimizer.param_groups)
    if wanted != (got := described(kind, state["param_groups"])):
        raise _Problem(f"expected {wanted}, got {got}")


def _check_entries(wanted: Any, got: dict[Any, Any]) -> None:
    """Raise the first difference of a state from the list of its entries in the same file."""
    if not isinstance(wanted, dict) or wanted.keys() != got.keys():
        numbers = list(wanted) if isinstance(wanted, dict) else wanted
        _wrong("state", f"moments of parameters {numbers}", list(got))
    for number, kinds in wanted.items():
        if not isinstance(kinds, dict) or kinds.keys() != got[number].keys():
            _wrong(f"state of parameter {number}", list(kinds), list(got[number]))
        for name, kind in kinds.items():
            if kind != got[number][name]:
                _wrong(f"{name} of parameter {number}", kind, got[number][name])


def _ordered(
    optimizer: Optimizer, names: Mapping[int, str], stored: Any, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a state with the parameters of a file in the order of an optimizer's."""
    if stored is None:  # by torch, if the optimizer was made from named parameters
        stored = [group.get("param_names") for group in state["param_groups"]]
    if not isinstance(stored, list) or len(stored) != len(state["param_groups"]):
        _wrong("names", "those of each group", type(stored).__name__)
    moments = {n: entry for n, entry in state["state"].items() if not isinstance(n, int)}
    groups, start, moved = [], 0, False
    for number, (own, group, theirs) in enumerate(
        zip(optimizer.param_groups, state["param_groups"], stored, strict=True)
    ):
        mine = _names(own, names)
        theirs = mine if theirs is None else theirs
        if not isinstance(theirs, list) or len(theirs) != len(mine):
            _wrong(f"group {number}", f"{len(mine)} names", theirs)
        if sorted(mine) != sorted(map(str, theirs)) or len(set(mine)) < len(mine):
            absent = [name for name in mine if name not in theirs]
            other = [name for name in theirs if name not in mine]
            _wrong(f"group {number}", f"moments of {absent[:4]}", f"those of {other[:4]}")
        for place, name in enumerate(mine):
            source = start + theirs.index(name)
            moved = moved or source != start + place
            if source in state["state"]:
                moments[start + place] = state["state"][source]
        groups.append(group)
        start += len(mine)
    if moved and isinstance(optimizer, LBFGS):
        _wrong("parameters", "the order of the file, on which LBFGS depends", "another")
    return {"state": moments, "param_groups": groups}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_state(optimizer: Optimizer, names: Mapping[int, str], state: Mapping[str, Any]) -> None:
    """Raise unless all moments fit their parameters and all numbers are finite."""
    parameters = _parameters(optimizer)
    total = sum(p.numel() for p in parameters)
    known = [name for group in optimizer.param_groups for name in _names(group, names)]
    for number, entry in state["state"].items():
        if not isinstance(number, int):
            continue
        p = parameters[number]
        for name, value in entry.items():
            what = f"{name} of {known[number]}"
            if isinstance(optimizer, LBFGS):
                for part in _tensors(value):
                    if part.shape not in ((), (1,), (total,)):
                        _wrong(what, f"a number or {total} numbers", tuple(part.shape))
            else:
                _check_shape(what, name, value, p)
            _check_values(what, name, value, p)


def _check_shape(what: str, name: Any, value: Any, p: Tensor) -> None:
    shapes = dict.fromkeys(_MOMENTS, tuple(p.shape))
    if p.ndim > 1:
        shapes["row_var"] = (*p.shape[:-1], 1)
        shapes["col_var"] = (*p.shape[:-2], 1, p.shape[-1])
    if name in _NUMBERS:
        single = isinstance(value, Tensor) and value.numel() == 1 and value.ndim < 2
        if not single and type(value) not in (int, float):
            _wrong(what, "a number", _kind(value))
    elif name in shapes and (name, value) != ("momentum_buffer", None):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if got != shapes[name]:
            _wrong(what, f"shape {shapes[name]}", got)


def _check_values(what: str, name: Any, value: Any, p: Tensor) -> None:
    for part in _tensors(value):
        if part.layout != torch.strided or part.is_meta:
            _wrong(what, "a dense tensor with values", f"{part.layout} on {part.device}")
        if name in _MOMENTS | _SQUARES and part.dtype not in FLOATS and not p.is_complex():
            _wrong(what, "floating-point numbers of 16 to 64 bits", part.dtype)
        if (part.is_floating_point() or part.is_complex()) and not is_finite(part):
            _wrong(what, "finite numbers", "NaN or infinity")
        if name in _SQUARES | _COUNTS and not part.is_complex() and bool((part < 0).any()):
            _wrong(what, "numbers >= 0", float(part.min()))
    if type(value) in (int, float):
        if not math.isfinite(value):
            _wrong(what, "a finite number", value)
        if name in _COUNTS and value < 0:
            _wrong(what, "a number >= 0", value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _merged(what: str, own: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group in a file, checked against those of an optimizer's group."""
    merged = dict(group)
    for name, mine in own.items():
        if name in {"params", "param_names"}:
            continue
        if name in _HOW or (name not in group and (mine is None or isinstance(mine, bool))):
            merged[name] = mine
        elif name not in group:
            _wrong(what, name, "none")
        else:
            _check_option(f"{what}: {name}", mine, group[name])
    for name in set(group) - set(own) - {"param_names"}:
        _check_option(f"{what}: {name}", None, group[name])
    if "betas" in own and any(not 0 <= float(beta) < 1 for beta in merged["betas"]):
        _wrong(f"{what}: betas", "numbers in [0, 1)", merged["betas"])
    merged.pop("param_names", None)
    if "param_names" in own:
        merged["param_names"] = own["param_names"]
    return merged


def _check_option(what: str, mine: Any, value: Any) -> None:
    """Raise unless an option in a file is of the kind and the range of an optimizer's."""
    if isinstance(mine, bool) or isinstance(value, bool):
        if mine is not None and mine is not value:
            _wrong(what, mine, value)
    elif isinstance(mine, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(mine):
            _wrong(what, f"{len(mine)} values", value)
        for part, found in zip(mine, value, strict=True):
            _check_option(what, part, found)
    elif isinstance(mine, str):
        if not isinstance(value, str):
            _wrong(what, "a string", value)
    elif mine is None or isinstance(mine, (int, float, Tensor)):
        _check_number(what, mine, value)


def _check_number(what: str, mine: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in FLOATS:
            _wrong(what, "a number", _kind(value))
        value = value.item()
    if isinstance(value, (int, float)) and not math.isfinite(value):
        _wrong(what, "a finite number", value)
    if mine is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _wrong(what, "a number", _kind(value))
    if value < 0 <= float(mine):
        _wrong(what, "a number >= 0", value)


def _placed(optimizer: Optimizer, moments: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return moments that are sharded as their parameters are."""
    parameters: Sequence[Tensor] = _parameters(optimizer)
    placed = dict(moments)
    for number, entry in moments.items():
        if isinstance(number, int):
            p = parameters[number]
            like = {n: p for n, x in entry.items() if getattr(x, "shape", None) == p.shape}
            placed[number] = placed_state(entry, like)
    return placed
