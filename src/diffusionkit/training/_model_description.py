"""Descriptions of score models: process, parameterization, noise label and network.

Parts that are functions are compared by their values at a few times, whatever they are called: a
process by alpha and sigma, a parameterization by its two coefficients, a label by the labels.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._schedules import schedule_dtype
from ..distributed._wrappers import bare_class, bare_tensors, unwrapped
from ..interfaces import ForwardSDE, ScoreModel

# Times relative to T; at none of them a label that is a whole number jumps.
_TIMES = (0.0123, 0.0737, 0.2137, 0.4391, 0.6613, 0.8887, 0.9719)
_TOLERANCE = 1e-5
# Settings of networks that do not change what they predict.
_FREE = ("dropout", "checkpointing")


def described(model: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a description of a model, made of names, numbers and strings.

    Args:
        model: the model.
        state: the state dict with which learned parts, such as a learned process, are evaluated;
            by default that of the model.
    """
    model = unwrapped(model)
    if not isinstance(model, ScoreModel):
        return {"network": _network(model)}
    sde = _with_state(model.sde, "sde.", state)
    about = {
        "sde": _part(sde, lambda: [*_values(sde.marginal, _times(sde)), float(sde.T)]),
        "parameterization": _part(model, lambda: _parameterization(model, sde)),
    }
    if callable(label := getattr(model, "label", None)):
        own = _with_state(label, "label.", state)
        about["label"] = _part(own, lambda: _values(lambda t: own(sde, t), _times(sde)))
    for name in ("variance", "data_range"):
        if (value := getattr(model, name, None)) is not None and _is_plain(value):
            about[name] = {"name": str(value), "values": None}
    for name, inner in model.named_children():
        if isinstance(unwrapped(inner), ScoreModel):
            about[name] = described(inner)
        elif name == "network":
            about[name] = _network(unwrapped(inner))
    return about


def difference(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    """Return the first difference of two descriptions, as the text of an error, or None.

    Parts that only one of them knows are not compared.

    Args:
        wanted: the description of the model to load into.
        got: the description in a file.
    """
    for name, mine in wanted.items():
        theirs = got.get(name)
        if not isinstance(theirs, Mapping):
            continue
        if "name" not in mine:  # a model within the model
            if (found := difference(mine, theirs)) is not None:
                return f"{name}.{found}"
        elif not _same(mine, theirs):
            other = theirs.get("name")
            same = " with other values" if other == mine["name"] else ""
            return f"{name}: expected {mine['name']}, got {other}{same}"
    return None


def _same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    values = mine.get("values"), theirs.get("values")
    if all(isinstance(value, list) for value in values):
        return _close(*values)
    if all(isinstance(part.get("settings"), Mapping) for part in (mine, theirs)):
        a, b = mine["settings"], theirs["settings"]
        common = [n for n in a if n in b and not any(free in n for free in _FREE)]
        return mine["class"] == theirs.get("class") and all(a[n] == b[n] for n in common)
    return bool(mine["name"] == theirs.get("name"))


def _close(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        isinstance(y, float) and math.isclose(x, y, rel_tol=_TOLERANCE, abs_tol=1e-12)
        for x, y in zip(a, b, strict=True)
    )


def _part(part: Any, values: Callable[[], list[float]]) -> dict[str, Any]:
    """Describe a part by values that it computes, if it does, and by its settings."""
    try:
        with torch.no_grad():
            numbers = values()
        found = numbers if all(map(math.isfinite, numbers)) else None
    except Exception:  # a user's part may raise any; then its settings are compared
        found = None
    settings = _settings(part)
    return {
        "name": _title(part, settings),
        "class": bare_class(part).__name__,
        "settings": settings,
        "values": found,
    }


def _network(network: nn.Module) -> dict[str, Any]:
    settings = _settings(network)
    return {
        "name": _title(network, settings),
        "class": bare_class(network).__name__,
        "settings": settings,
        "values": None,
    }


def _settings(part: Any) -> dict[str, Any]:
    """Return the plain values that a part was made with: attributes named as its arguments."""
    try:
        names = list(inspect.signature(bare_class(part)).parameters)
    except (TypeError, ValueError):
        names = []
    values = {name: getattr(part, name, None) for name in names}
    if isinstance(config := getattr(part, "config", None), dict):
        values = config
    return {str(n): _listed(v) for n, v in values.items() if v is not None and _is_plain(v)}


def _is_plain(value: Any, *, depth: int = 2) -> bool:
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 64 and all(_is_plain(v, depth=depth - 1) for v in value)
    return type(value) in (bool, int, float, str)


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, (list, tuple)) else value


def _title(part: Any, settings: Mapping[str, Any]) -> str:
    """Return the representation of a part, without an address in memory."""
    classes = type(part).__mro__[:-1]  # without object
    plain = isinstance(part, nn.Module) or not any("__repr__" in vars(c) for c in classes)
    if callable(part) and not isinstance(part, nn.Module) and hasattr(part, "__qualname__"):
        return "a function"
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    text = f"{bare_class(part).__name__}({arguments})" if plain else repr(part)
    return text if len(text) <= 300 else text[:297] + "..."


def _with_state(part: Any, prefix: str, state: Mapping[str, Any] | None) -> Any:
    """Return a part with its values in a state, if it has any."""
    if state is None or not isinstance(part, nn.Module) or not part.state_dict():
        return part
    own = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    try:
        part = copy.deepcopy(part)
        part.load_state_dict(own)
    except Exception:  # what does not fit is reported with the weights
        return part
    return part


def _device(part: Any) -> torch.device:
    tensors = bare_tensors(part) if isinstance(part, nn.Module) else {}
    return next((x.device for x in tensors.values()), torch.device("cpu"))


def _times(sde: ForwardSDE) -> Tensor:
    here = _device(sde)
    return torch.tensor(_TIMES, dtype=schedule_dtype(here), device=here) * sde.T


def _values(function: Callable[..., Any], *args: Any) -> list[float]:
    """Return the values of a function of times, or of several, each (B,) or a number."""
    found = function(*args)
    parts: Sequence[Any] = found if isinstance(found, tuple) else (found,)
    count = len(_TIMES)
    columns = [torch.as_tensor(part).detach().cpu().double().expand(count) for part in parts]
    return [float(number) for column in columns for number in column]


def _parameterization(model: Any, sde: ForwardSDE) -> list[float]:
    """Return the coefficients of a model's output and the scale of its network's input."""
    alpha, sigma = sde.marginal(_times(sde))
    scaled = model.scale_input(torch.ones_like(alpha).unsqueeze(1), alpha, sigma).squeeze(1)
    return _values(model.parameterization, alpha, sigma) + _values(lambda: scaled)
