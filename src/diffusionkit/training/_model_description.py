"""Descriptions of score models: process, parameterization, noise label and network.

Parts that are functions are compared by their values at a few times, whatever they are called: a
process by alpha and sigma, a parameterization by its two coefficients, a label by the labels. What
they were made with, and what networks were made with, is their `describe`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._parts import describe, is_plain
from .._schedules import schedule_dtype
from ..distributed._wrappers import bare_class, bare_tensors, unwrapped
from ..interfaces import ForwardSDE, ScoreModel

# Times relative to T; at none of them a label that is a whole number jumps.
_TIMES = (0.0123, 0.0737, 0.2137, 0.4391, 0.6613, 0.8887, 0.9719)
_TOLERANCE = 1e-5
# Settings of networks that do not change what they predict.
_FREE = ("dropout", "checkpointing")


def described(model: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return descriptions of the parts of a model, each with the values that it computes.

    Args:
        model: the model.
        state: the state dict with which learned parts, such as a learned process, are evaluated;
            by default that of the model.
    """
    model = unwrapped(model)
    if not isinstance(model, ScoreModel):
        return {"network": _part(model)}
    sde = _with_state(model.sde, "sde.", state)
    about = {
        "sde": _part(sde, lambda: [*_values(sde.marginal, _times(sde)), float(sde.T)]),
        "parameterization": _part(model, lambda: _parameterization(model, sde)),
    }
    if callable(label := getattr(model, "label", None)):
        own = _with_state(label, "label.", state)
        about["label"] = _part(own, lambda: _values(lambda t: own(sde, t), _times(sde)))
    for name in ("variance", "data_range"):
        if (value := getattr(model, name, None)) is not None and is_plain(value):
            about[name] = {"name": str(value), "values": None}
    for name, inner in model.named_children():
        if isinstance(unwrapped(inner), ScoreModel):
            about[name] = described(inner)
        elif name == "network":
            about[name] = _part(unwrapped(inner))
    return about


def difference(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    """Return the first difference of two descriptions, as the text of an error, or None.

    Parts that only one of them has are not compared.

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
        same = _same_settings(mine["settings"], theirs["settings"])
        return mine["class"] == theirs.get("class") and same
    return bool(mine["name"] == theirs.get("name"))


def _same_settings(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    known = [n for n in mine if theirs.get(n) is not None and mine[n] is not None]
    return all(_equal(mine[n], theirs[n]) for n in known if not any(free in n for free in _FREE))


def _equal(a: Any, b: Any) -> bool:
    """Return whether two values in descriptions are equal, up to what predictions depend on."""
    a, b = (x["list"] if isinstance(x, Mapping) and "list" in x else x for x in (a, b))
    if all(isinstance(x, Mapping) and isinstance(x.get("arguments"), Mapping) for x in (a, b)):
        return a.get("class") == b.get("class") and _same_settings(a["arguments"], b["arguments"])
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a.cpu() == b.cpu()).all())
    return bool(a == b)


def _close(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        isinstance(y, float) and math.isclose(x, y, rel_tol=_TOLERANCE, abs_tol=1e-12)
        for x, y in zip(a, b, strict=True)
    )


def _part(part: Any, values: Callable[[], list[float]] | None = None) -> dict[str, Any]:
    """Describe a part by the values that it computes, if it does, and by its arguments."""
    try:
        with torch.no_grad():
            numbers = [math.nan] if values is None else values()
        found = numbers if all(map(math.isfinite, numbers)) else None
    except Exception:  # a user's part may raise any; then its arguments are compared
        found = None
    arguments = describe(part).tree.get("arguments", {})
    if isinstance(part, ScoreModel):  # whose parts have descriptions of their own
        arguments = {n: x for n, x in arguments.items() if not isinstance(x, Mapping)}
    return {
        "name": _title(part, arguments),
        "class": bare_class(part).__name__,
        "settings": arguments,
        "values": found,
    }


def _title(part: Any, settings: Mapping[str, Any]) -> str:
    """Return the representation of a part, without an address in memory."""
    classes = type(part).__mro__[:-1]  # without object
    plain = isinstance(part, nn.Module) or not any("__repr__" in vars(c) for c in classes)
    if callable(part) and not isinstance(part, nn.Module) and hasattr(part, "__qualname__"):
        return "a function"
    given = {n: x for n, x in settings.items() if x is not None and not isinstance(x, Tensor)}
    arguments = ", ".join(f"{name}={_text(value)}" for name, value in given.items())
    text = f"{bare_class(part).__name__}({arguments})" if plain else repr(part)
    return text if len(text) <= 300 else text[:297] + "..."


def _text(value: Any) -> str:
    """Return an argument in a description as text."""
    if isinstance(value, Mapping) and isinstance(inner := value.get("arguments"), Mapping):
        given = ", ".join(f"{name}={_text(x)}" for name, x in inner.items() if x is not None)
        return f"{value.get('class')}({given})"
    return repr(value)


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
    own = getattr(model, "sigma_data", None)
    ones = torch.ones_like(alpha).unsqueeze(1).expand(-1, len(own) if isinstance(own, tuple) else 1)
    scaled = model.scale_input(ones, alpha, sigma).unbind(1)
    return _values(model.parameterization, alpha, sigma) + _values(lambda: scaled)
