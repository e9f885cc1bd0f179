"""Descriptions of parts: the class, by name, and the constructor arguments of each.

A description is a tree of JSON values in which tensors are kept as they are:

- ``{"class": "VPSDE", "arguments": {"beta_min": 0.1, ...}}`` is an object,
- ``{"function": "my_label"}`` a registered function,
- ``{"same": "model.sde"}`` the object that is described at that place,
- ``[...]`` a tuple; ``{"list": [...]}``, ``{"dict": {...}}``, ``{"float": "inf"}`` what they say.

Arguments are read from attributes named as the parameters of the constructor, which a dataclass
has, or from a dictionary `config` of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar, overload

import numpy as np
from torch import Tensor, nn

from .distributed._wrappers import bare_class, unwrapped

Part = TypeVar("Part", bound=Callable[..., Any])

_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_PACKAGE = __name__.partition(".")[0]
_NAME = re.compile(r"[A-Za-z_][\w./-]*")
_REGISTERED: dict[str, Any] = {}
_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@overload
def register_part(part: Part, *, name: str | None = None) -> Part: ...


@overload
def register_part(part: None = None, *, name: str | None = None) -> Callable[[Part], Part]: ...


def register_part(part: Any = None, *, name: str | None = None) -> Any:
    """Register a class or a function of your own, so that `save_model` can name it in a file.

    A file holds names and never code, so `load_model` finds a class only where the module that
    registers it has been imported. The arguments of its constructor are read from attributes named
    as its parameters, which a dataclass has, or from a dictionary ``config`` of them. Registering a
    class again, as a notebook does, replaces it.

    Args:
        part: a process, score model, network, noise label or other class, or a function; None to
            use this as a decorator with a name.
        name: the name in files, by default that of the class or function.

    Returns:
        The part, or a decorator.

    Raises:
        TypeError: if part is not a class or a function, or name not a string.
        ValueError: if the name is not an identifier, or is that of another part.

    >>> import torch
    >>> from diffusionkit import ForwardSDE
    >>> from diffusionkit.checkpoints import register_part
    >>> @register_part
    ... class CosineSDE(ForwardSDE):
    ...     T = 0.99
    ...
    ...     def marginal(self, t):
    ...         angle = 0.5 * torch.pi * t
    ...         return torch.cos(angle), torch.sin(angle)
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if part is None:
        return lambda decorated: _register(decorated, name)
    return _register(part, name)


def _register(part: Any, name: str | None) -> Any:
    if not isinstance(part, (type, *_FUNCTIONS)):
        raise TypeError(f"part: expected a class or a function, got {type(part).__name__}")
    name = part.__name__ if name is None else name
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected a name such as my_label, got {name!r}")
    if (other := _REGISTERED.get(name, part)) is not part and _origin(other) != _origin(part):
        raise ValueError(
            f"name: expected one that is not taken, got {name!r}, that of {_origin(other)}; "
            "pass another name="
        )
    _REGISTERED[name] = part
    return part


def _origin(part: Any) -> str:
    """Return where a class or a function is defined."""
    return f"{part.__module__}.{part.__qualname__}"


def registered(name: str) -> Any:
    """Return the registered class or function of a name, or None."""
    return _REGISTERED.get(name)


def name_of(part: Any) -> str | None:
    """Return the name of a class or a function in files, None if it has none."""
    name = next((name for name, other in _REGISTERED.items() if other is part), None)
    if name is None and str(getattr(part, "__module__", "")).partition(".")[0] == _PACKAGE:
        name = part.__name__
    return name


@dataclasses.dataclass
class Description:
    """The description of a part, and what it was made from.

    Args:
        tree: the description; of classes without a name in files, only plain arguments.
        found: the classes and functions, by the place in the tree.
        modules: the modules among the parts, by the place in the tree.
        problems: why a part could not be built again from the tree, one text for each reason.
    """

    tree: Any = None
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def describe(part: object) -> Description:
    """Return the description of a part, without the wrappers of torch around modules.

    Args:
        part: any object.
    """
    description = Description()
    description.tree = _Describer(description).value(part, "")
    return description


def place(path: str, name: str) -> str:
    """Return the place of an argument of the part at a place."""
    return f"{path}.{name}" if path else name


class _Describer:
    def __init__(self, result: Description) -> None:
        self.result = result
        self._places: dict[int, tuple[str, object]] = {}  # the objects are kept: ids are reused

    def value(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Tensor):
            return value.detach()
        if type(value) in (list, tuple):
            items = [self.value(item, place(path, str(i))) for i, item in enumerate(value)]
            return items if type(value) is tuple else {"list": items}
        if isinstance(value, Mapping) and all(type(key) is str for key in value):
            return {"dict": {key: self.value(x, place(path, key)) for key, x in value.items()}}
        if isinstance(value, (type, *_FUNCTIONS)):
            return self._function(value, path)
        return self._object(value, path)

    def _function(self, value: Any, path: str) -> dict[str, Any]:
        name = None if isinstance(value, type) else name_of(value)
        if name is None:
            kind = "class" if isinstance(value, type) else "function"
            self._problem(path, f"a registered function, got the {kind} {_origin(value)}")
        self.result.found[path] = value
        return {"function": name}

    def _object(self, value: Any, path: str) -> dict[str, Any]:
        value = unwrapped(value) if isinstance(value, nn.Module) else value
        if id(value) in self._places:
            return {"same": self._places[id(value)][0]}
        self._places[id(value)] = path, value
        if isinstance(value, nn.Module):
            self.result.modules[path] = value
        kind = bare_class(value)
        arguments, missing = _arguments(value, kind)
        self.result.found[path] = kind
        if (name := name_of(kind)) is None:
            self._problem(path, f"a class of diffusionkit or a registered one, got {_origin(kind)}")
            plain = {key: _plain(x) for key, x in arguments.items() if is_plain(x)}
            return {"class": kind.__name__, "arguments": plain}
        if missing:
            listed = ", ".join(f"{key!r}" for key in missing)
            self._problem(
                path,
                f"attributes named as the constructor's arguments, got {name} without {listed}",
            )
        described = {key: self.value(x, place(path, key)) for key, x in arguments.items()}
        return {"class": name, "arguments": described}

    def _problem(self, path: str, text: str) -> None:
        self.result.problems.append(f"{path or 'model'}: expected {text}")


def _arguments(part: Any, kind: type) -> tuple[dict[str, Any], list[str]]:
    """Return the constructor arguments of an object by name, and the names that were not found."""
    names, inherited = _parameters(kind)
    known = {*names, *(inherited or [])}
    config = None if "config" in known else getattr(part, "config", None)
    if isinstance(config, dict):
        # What a constructor with **options recorded is all that it was called with.
        return {str(n): x for n, x in config.items() if n in known or inherited is not None}, []
    listed = [*names, *(inherited or [])]
    found = {name: getattr(part, name) for name in listed if hasattr(part, name)}
    return found, [name for name in names if name not in found]


def _parameters(kind: type) -> tuple[list[str], list[str] | None]:
    """Return the names of a constructor's parameters, and those of its bases behind **options.

    The second are None if there are no **options.
    """
    names: list[str] = []
    inherited: list[str] | None = None
    for cls in kind.__mro__[:-1]:
        if "__init__" not in vars(cls):
            continue
        try:
            parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
        except (TypeError, ValueError):
            break
        own = [p.name for p in parameters if p.kind not in _UNNAMED]
        if inherited is None:
            names = own
        else:
            inherited += [name for name in own if name not in {*names, *inherited}]
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
        inherited = [] if inherited is None else inherited
    return names, inherited


def is_plain(value: Any, *, depth: int = 2) -> bool:
    """Return whether a value is a number, a string or a short list or tuple of them."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 64 and all(is_plain(v, depth=depth - 1) for v in value)
    return type(value) in (bool, int, float, str)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
