"""The weights of a file: matched by name to those of a model, and checked before any is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._files import CheckpointError, listed
from .._weights import FLOATS, is_finite
from ..distributed._sharded import is_sharded

# Parts of names that wrappers of torch add.
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def fitted(
    path: str, what: str, own: Mapping[str, Any], buffers: set[str], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the weights of a file under the names of a model, after checking all of them.

    Args:
        path: the file, for the error.
        what: the part of the file, for the error.
        own: the state dict of the model without wrappers.
        buffers: the names in it that are of buffers.
        state: the state dict in the file.

    Raises:
        CheckpointError: if tensors are missing, extra, misshapen, of another dtype or not finite;
            it lists them.
    """
    state = _renamed(own, state)
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += weight_problems(own, buffers, state)
    if problems:
        raise CheckpointError(f"{path}: the {what} does not fit, {listed(problems)}")
    return dict(state)


def _renamed(own: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state without the names of wrappers, if it fits a model only so."""
    if own.keys() == state.keys() or not all(isinstance(name, str) for name in state):
        return state
    names = {_without_wrappers(name): name for name in own}
    found = {_without_wrappers(name): value for name, value in state.items()}
    if names.keys() != found.keys() or len(names) < len(own) or len(found) < len(state):
        return state
    return {name: found[bare] for bare, name in names.items()}


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def weight_problems(
    own: Mapping[str, Any], buffers: set[str], state: Mapping[str, Any]
) -> list[str]:
    """Return the problems of the weights that a model and a file have in common."""
    pairs = {
        name: (mine, state[name])
        for name, mine in own.items()
        if name in state and isinstance(mine, Tensor)
    }
    # A file may have another precision, but one for all weights that have one in the model.
    dtypes: dict[torch.dtype, list[torch.dtype]] = {}
    for mine, value in pairs.values():
        if isinstance(value, Tensor):
            dtypes.setdefault(mine.dtype, []).append(value.dtype)
    usual = {mine: max(sorted(set(d), key=str), key=d.count) for mine, d in dtypes.items()}
    problems = []
    for name, (mine, value) in pairs.items():
        problem = _problem(mine, value, usual.get(mine.dtype, mine.dtype), name in buffers)
        if problem is None and name.endswith("num_batches_tracked") and bool((value < 0).any()):
            problem = f"expected a count, got {int(value.min())}"
        if problem is not None:
            problems.append(f"{name}: {problem}")
    return problems


def _problem(mine: Tensor, value: Any, usual: torch.dtype, buffer: bool) -> str | None:
    if not isinstance(value, Tensor):
        return f"expected shape {tuple(mine.shape)}, got {type(value).__name__}"
    if value.shape != mine.shape:
        return f"expected shape {tuple(mine.shape)}, got {tuple(value.shape)}"
    if value.layout != torch.strided or value.is_meta:
        return f"expected a dense tensor with values, got {value.layout} on {value.device}"
    if not mine.is_floating_point():
        return None if value.dtype == mine.dtype else f"expected {mine.dtype}, got {value.dtype}"
    if value.dtype not in FLOATS:
        return f"expected floating-point numbers of 16 to 64 bits, got {value.dtype}"
    if value.dtype != usual:
        return f"expected {usual} like the other weights, got {value.dtype}"
    if is_finite(value) or (buffer and _is_infinite_alike(mine, value)):
        return None
    return "expected finite numbers, got NaN or infinity"


def _is_infinite_alike(mine: Tensor, value: Tensor) -> bool:
    """Whether a buffer is infinite only where the model's is, such as a mask of attention."""
    if is_sharded(mine):
        return False
    return bool((value.isfinite() | (value == mine.detach().to(value))).all())
