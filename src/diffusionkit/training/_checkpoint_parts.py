"""The objects whose states a checkpoint holds: their protocol, and checks of states for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._checks import check_part
from .._files import CheckpointError
from .._weights import is_finite
from ..distributed._random_states import check_generators
from ..distributed._sharded import placed_state
from ..distributed._wrappers import bare_state, bare_tensors
from ._optimizer_state import fitted_optimizer
from ._weights_of_file import fitted, weight_problems
from .ema import EMA
from .power_ema import PowerEMA

_RATES = ("base_lrs", "_last_lr")


def check_arguments(
    ema: object, optimizer: object, stateful: object, generators: object, extra: object
) -> None:
    """Raise a TypeError unless the arguments of `save_checkpoint` have the right types."""
    if ema is not None and not isinstance(ema, (EMA, PowerEMA)):
        raise TypeError(f"ema: expected an EMA or a PowerEMA, got {type(ema).__name__}")
    if optimizer is not None:
        check_part(optimizer, Optimizer, "optimizer")
    check_generators(generators)
    for name, parts in (("stateful", stateful), ("extra", extra)):
        if parts is None:
            continue
        if not isinstance(parts, Mapping) or not all(isinstance(key, str) for key in parts):
            got = f"keys {list(parts)}" if isinstance(parts, Mapping) else type(parts).__name__
            raise TypeError(f"{name}: expected a mapping by names, got {got}")
        for key, part in parts.items():
            if name == "stateful" and not has_state(part):
                raise TypeError(
                    f"stateful[{key!r}]: expected an object with state_dict and load_state_dict, "
                    f"got {type(part).__name__}"
                )


def has_state(part: object) -> bool:
    """Whether an object has a state to save, and is not a class."""
    methods = (getattr(part, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(part, type) and all(map(callable, methods))


def objective_parts(objective: object) -> dict[str, Any]:
    """Return the parts of an objective that have a state, by the names of its attributes."""
    if objective is None or isinstance(objective, type):
        return {}
    if has_state(objective):
        return {"objective": objective}
    names = [*getattr(objective, "__dict__", {}), *getattr(type(objective), "__slots__", ())]
    parts = {str(name): getattr(objective, name, None) for name in names}
    return {name: part for name, part in parts.items() if has_state(part)}


def parameter_names(model: nn.Module, *others: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of all parameters of a model and of other modules, by their ids."""
    modules = {"": model, **{f"{n}.": m for parts in others for n, m in parts.items()}}
    names: dict[int, str] = {}
    for prefix, module in modules.items():
        if isinstance(module, nn.Module):
            for name, tensor in bare_tensors(module).items():
                names.setdefault(id(tensor), prefix + name)
    return names


def averages_of(ema: EMA | PowerEMA | None) -> dict[Any, EMA]:
    """Return the averages in an `EMA`, under None, or in a `PowerEMA`, by their lengths."""
    if isinstance(ema, PowerEMA):
        return dict(ema.averages)
    return {} if ema is None else {None: ema}


def check_finite_weights(what: str, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise a ValueError if weights to save are not finite; no load would take them."""
    if problems := weight_problems(state, _buffers(model), state):
        message = f"{what}: {problems[0]}"
        raise ValueError(message)


def _buffers(model: nn.Module) -> set[str]:
    return {n for n, x in bare_tensors(model).items() if not isinstance(x, nn.Parameter)}


def fitted_model(path: str, what: str, model: nn.Module, state: Any) -> dict[str, Any]:
    """Return weights of a file for a model, checked and placed as its own; see `fitted`."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: {what}: expected weights, got {type(state).__name__}")
    own = bare_state(model)
    found = placed_state(fitted(path, what, own, _buffers(model), state), own)
    if (versions := getattr(state, "_metadata", None)) is not None:
        return _with_versions(found, versions)
    return found


class _Weights(dict[str, Any]):
    """Weights with the versions of their modules, for torch."""

    _metadata: Any


def _with_versions(weights: dict[str, Any], versions: Any) -> dict[str, Any]:
    result = _Weights(weights)
    result._metadata = versions
    return result


def saved_state(part: Any) -> Any:
    """Return the state of an object as files hold it."""
    if isinstance(part, EMA):
        return {"model": bare_state(part.model), "updates": part.updates}
    if isinstance(part, PowerEMA):
        return {length: saved_state(average) for length, average in part.averages.items()}
    return part.state_dict()


def load_state(part: Any, state: Any) -> None:
    """Load a state as files hold it, once checked, into an object."""
    if isinstance(part, EMA):
        part.restore(state["model"], state["updates"])
    elif isinstance(part, PowerEMA):
        for length, average in part.averages.items():
            load_state(average, state[length])
    else:
        part.load_state_dict(state)


def fitted_averages(path: str, what: str, ema: EMA | PowerEMA, state: Any) -> dict[Any, Any]:
    """Return the state of averages in a file, after checking it."""
    kind = "EMA" if isinstance(state, dict) and "model" in state else "PowerEMA"
    if not isinstance(state, dict) or isinstance(ema, PowerEMA) != (kind == "PowerEMA"):
        raise CheckpointError(f"{path}: {what}: expected {type(ema).__name__}, got {kind}")
    if isinstance(ema, PowerEMA) and state.keys() != ema.averages.keys():
        raise CheckpointError(
            f"{path}: {what}: expected the lengths {list(ema.averages)}, got {list(state)}"
        )
    found = {}
    for length, average in averages_of(ema).items():
        name = what if length is None else f"{what}[{length}]"
        part = state if length is None else state[length]
        if not isinstance(part, dict) or part.keys() != {"model", "updates"}:
            got = list(part) if isinstance(part, dict) else type(part).__name__
            raise CheckpointError(f"{path}: {name}: expected model and updates, got {got}")
        if type(part["updates"]) is not int or part["updates"] < 0:
            raise CheckpointError(
                f"{path}: {name}: expected a number of updates, got {part['updates']!r}"
            )
        weights = fitted_model(path, name, average.model, part["model"])
        found[length] = {"model": weights, "updates": part["updates"]}
    return found if isinstance(ema, PowerEMA) else found[None]


def fitted_part(path: str, what: str, part: Any, state: Any) -> Any:
    """Return the state of an object in a file, checked as far as the object's kind is known."""
    if isinstance(part, (EMA, PowerEMA)):
        return fitted_averages(path, what, part, state)
    if isinstance(part, nn.Module):
        # The names of the module itself, which loads them.
        names = dict(zip(bare_state(part), part.state_dict(), strict=True))
        return {names[n]: x for n, x in fitted_model(path, what, part, state).items()}
    if isinstance(part, Optimizer):
        file = {"optimizer": state, "optimizer_type": type(part).__name__}
        return fitted_optimizer(path, part, {}, file)
    problem = _problem(part.state_dict(), state, isinstance(part, (LRScheduler, GradScaler)))
    if problem is not None:
        raise CheckpointError(f"{path}: {what}{problem}")
    return state


def _problem(own: Any, value: Any, strict: bool, name: str = "") -> str | None:
    """Return how a value differs in kind from the one that an object has now, or None.

    Args:
        own: the value that the object has.
        value: the value in the file.
        strict: whether integers are counts and cannot be negative.
        name: the place of the value.
    """
    if own is None or value is None:
        return None
    if (kind := _kind(own)) != (found := _kind(value)):
        return f"{name}: expected {kind}, got {found}"
    if isinstance(own, Mapping):
        pairs = [(f"{name}[{key!r}]", own[key], value[key]) for key in own if key in value]
    elif isinstance(own, (list, tuple)):
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(own, value, strict=False))]
    else:
        return _number_problem(own, value, strict, name)
    for place, mine, theirs in pairs:
        if (problem := _problem(mine, theirs, strict, place)) is not None:
            return problem
    return None


def _number_problem(own: Any, value: Any, strict: bool, name: str) -> str | None:
    if isinstance(own, Tensor):
        if value.layout != torch.strided or value.is_meta:
            return f"{name}: expected a dense tensor with values, got {value.layout} or meta"
        numbers = own.is_floating_point() and value.is_floating_point()
        if numbers and value.dtype.itemsize < 2:  # nothing can be computed with it
            return f"{name}: expected {own.dtype}, got {value.dtype}"
        return None if not numbers or is_finite(value) or not is_finite(own) else (
            f"{name}: expected finite numbers, got NaN or infinity"
        )  # fmt: skip
    if isinstance(own, (bool, str)):
        return None
    if isinstance(value, float) and math.isnan(value) and own == own:
        return f"{name}: expected a number, got {value}"
    rate = any(part in name for part in _RATES) and not 0 <= value < math.inf
    if strict and (rate or (isinstance(value, int) and value < 0 <= own)):
        return f"{name}: expected a finite number >= 0, got {value}"
    return None


def _kind(value: Any) -> str:
    kinds: dict[str, Any] = {
        "a truth value": bool,
        "a number": (int, float),
        "a string": str,
        "a dictionary": Mapping,
        "a list": (list, tuple),
        "a tensor": Tensor,
    }
    named = (name for name, kind in kinds.items() if isinstance(value, kind))
    return next(named, type(value).__name__)


def unread_parts(state: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the parts of a file that were not requested."""
    for name in ("ema", "optimizer"):
        if state[name] is not None and asked[name] is None:
            yield name
    for name in ("objective", "stateful", "generators"):
        yield from (f"{name}[{key!r}]" for key in state[name] if key not in asked[name])


def check_has_parts(path: str, state: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless a file has all requested parts."""
    for name in ("ema", "optimizer"):
        if asked[name] is not None and state[name] is None:
            raise CheckpointError(f"{path}: expected a checkpoint with {name}, got one without")
    for name in ("objective", "stateful", "generators"):
        if missing := sorted(set(asked[name]) - set(state[name])):
            got = sorted(map(str, state[name])) or "none"
            raise CheckpointError(f"{path}: expected {name} {missing}, got {got}")
