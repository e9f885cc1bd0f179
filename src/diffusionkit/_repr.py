"""Representations of objects by the arguments that they were made with, without their weights."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .distributed._wrappers import bare_class, unwrapped

_WIDTH = 88  # of a line, before the arguments have one each
_ITEMS = 8  # of a sequence or a tensor
_DEPTH = 4  # of containers in containers
_TEXT = 200  # characters of any other value

Parameter = inspect.Parameter


class Described:
    """A class whose representation is its constructor's call: `PCSampler(EpsModel(...), ...)`.

    The arguments are the attributes of their names. Attributes that are None, True or False by
    default are left out where they are. Weights are never shown.

    Modules call `described` themselves: `fully_shard` cannot replace the class of a module whose
    first base is another than nn.Module.
    """

    __slots__ = ()

    @override
    def __repr__(self) -> str:
        return described(self)


def described(part: object, **others: Any) -> str:
    """Return the representation of an object by the arguments that it was made with.

    Args:
        part: the object. The arguments are its attributes of their names.
        others: values of arguments that are no attributes, and further values. Without any, the
            modules in a module are shown too.
    """
    kind = bare_class(part)
    fields: list[str] = []
    values: list[object] = []
    positional = True
    for parameter in _parameters(kind):
        name = parameter.name
        value = others.pop(name) if name in others else _attribute(part, name)
        default = parameter.default
        if value is Parameter.empty or (
            (default is None or isinstance(default, bool)) and value is default
        ):
            positional = False
            continue
        positional = positional and parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        if _is_plain(value):  # without a name only where it is all that there is to say
            positional = positional and not fields and default is Parameter.empty
        positional = positional and not isinstance(value, Tensor)
        text = shown(value)
        fields.append(text if positional else f"{name}={text}")
        values.append(value)
    if isinstance(part, nn.Module) and not others:
        others = dict(_children(part, values))
    fields += [f"{name}={shown(value)}" for name, value in others.items()]
    if isinstance(part, nn.Module) and (more := part.extra_repr()):
        fields.append(more)
    return call(kind.__name__, fields)


def call(name: str, fields: list[str]) -> str:
    """Return a call as text, on several lines if it is long."""
    line = f"{name}({', '.join(fields)})"
    if len(line) <= _WIDTH and "\n" not in line:
        return line
    inner = "".join("    " + field.replace("\n", "\n    ") + ",\n" for field in fields)
    return f"{name}(\n{inner})"


def configuration(network: nn.Module) -> list[str]:
    """Return the arguments of a network of the library that are not the defaults, as text."""
    config: Mapping[str, Any] = getattr(network, "config", {})
    defaults: dict[str, object] = {}
    for base in reversed(bare_class(network).__mro__):
        if "__init__" in vars(base):
            defaults |= {p.name: p.default for p in _parameters(base)}
    return [f"{name}={shown(v)}" for name, v in config.items() if not _same(v, defaults.get(name))]


def shown(value: object, *, depth: int = _DEPTH) -> str:
    """Return a value as text: no addresses, no weights, and little of what is long."""
    if isinstance(value, nn.Module):
        return _module(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if value is ...:
        return "..."
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, functools.partial):
        return f"partial({shown(value.func)}, ...)"
    if isinstance(value, (FunctionType, MethodType, BuiltinFunctionType)):
        return value.__name__.strip("<>")
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, Mapping):
        some = list(value.items())[:_ITEMS] if depth else []
        pairs = [f"{shown(k)}: {shown(v, depth=depth - 1)}" for k, v in some]
        return f"{{{', '.join(pairs + ['...'] * (len(value) > len(some)))}}}"
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        items = [shown(item, depth=depth - 1) for item in _first(value)] if depth else ["..."]
        text = ", ".join(items)
        if isinstance(value, list):
            return f"[{text}]"
        return f"({text},)" if len(value) == 1 else f"({text})"
    if type(value).__repr__ is object.__repr__:
        return f"{type(value).__name__}(...)"
    text = repr(value)
    if isinstance(value, str) and len(text) > _TEXT:
        return f"{text[:_TEXT]}..."
    own = type(value).__module__.startswith("diffusionkit")
    strange = " at 0x" in text or (len(text) > _TEXT and not own)
    return f"{type(value).__name__}(...)" if strange else text


def _module(module: nn.Module) -> str:
    inner = unwrapped(module)
    if inner is not module:
        return call(type(module).__name__, [shown(inner)])
    kind = bare_class(module)
    own: object = kind.__repr__
    of_torch = own is nn.Module.__repr__ or kind.__module__.startswith("torch.")
    if not of_torch or not module._modules:
        return repr(module) if kind is type(module) else f"{kind.__name__}(...)"
    if isinstance(getattr(module, "config", None), dict):
        return call(kind.__name__, configuration(module))
    return f"{kind.__name__}(...)"


def _tensor(x: Tensor) -> str:
    if x.device.type == "cpu" and x.numel() <= _ITEMS and x.layout is torch.strided:
        with torch.no_grad():
            return _numbers(x.detach().tolist())
    return f"tensor(shape={tuple(x.shape)})"


def _numbers(values: Any) -> str:
    if isinstance(values, list):
        return f"[{', '.join(map(_numbers, values))}]"
    return f"{values:g}" if isinstance(values, float) else str(values)


def _first(values: Any) -> list[Any]:
    """Return the first items of a collection, and an ellipsis if there are more."""
    items = list(values)
    return items if len(items) <= _ITEMS else [*items[: _ITEMS // 2], ...]


def _parameters(kind: type) -> list[inspect.Parameter]:
    try:
        found = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _attribute(part: object, name: str) -> Any:
    """Return the attribute of a name, or of the same name with an underscore."""
    for attribute in (name, f"_{name}"):
        with contextlib.suppress(Exception):  # a user's property may raise any
            value = getattr(part, attribute)
            if not isinstance(value, MethodType):
                return value
    return Parameter.empty


def _children(part: nn.Module, values: list[Any]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a module that are in none of the values that are shown."""
    known = {id(m) for value in values if isinstance(value, nn.Module) for m in value.modules()}
    for name, child in part.named_children():
        if id(child) not in known:
            yield name, child


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple, list))


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and _is_plain(value) and bool(value == default)
