"""Score models from their descriptions: classes with a name, built from plain arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import control, models, networks, sde
from .._files import CheckpointError, check_weights
from .._parts import place, registered
from .._weights import FLOATS, fill, is_finite, laid_out
from ..interfaces import ScoreModel

_NUMBERS = ("inf", "-inf", "nan")
_REGISTER = "from diffusionkit.checkpoints import register_part"


def part_named(name: object) -> Any:
    """Return the class or function that a file calls by a name, or None."""
    if not isinstance(name, str):
        return None
    return _own_classes().get(name) or registered(name)


@cache
def _own_classes() -> dict[str, type]:
    """Return our classes that models are made of: processes, models, networks, operators."""
    parts = [getattr(room, name) for room in (sde, models, networks) for name in room.__all__]
    guided = [getattr(control, name) for name in control.__all__]
    parts += [part for part in guided if isinstance(part, type) and issubclass(part, nn.Module)]
    parts += [p for p in guided if isinstance(p, type) and issubclass(p, control.LinearOperator)]
    parts.append(control.AdaptiveProjection)
    return {p.__name__: p for p in parts if isinstance(p, type) and not inspect.isabstract(p)}


def unknown(name: str) -> str:
    """Return how to make a class or a function known to files, for an error."""
    return (
        f"{name}; if it is your own, decorate it with @register_part ({_REGISTER}) in a module "
        "that is imported before the file is read"
    )


def built_model(path: str, tree: Any, tensors: Mapping[str, Tensor], state: Any) -> ScoreModel:
    """Build a score model from its description and load its weights, strictly.

    Networks of ours take no more memory than the file has tensors for. The random state of torch
    is left as it is.

    Args:
        path: the file, for errors.
        tree: the description.
        tensors: the tensors that it names.
        state: the state dict.

    Raises:
        CheckpointError: if the description is not one, names an unknown class, or does not fit
            the state.
    """
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path}: expected weights that are tensors, got other values")
    kind = part_named(tree.get("class")) if isinstance(tree, Mapping) else None
    with torch.random.fork_rng(devices=[]):
        try:
            model = _Builder(path, tensors, state).value(tree, "")
        except RecursionError as error:
            raise CheckpointError(f"{path}: expected a description, got one too deep") from error
    if not isinstance(model, ScoreModel):
        got = type(model).__name__ if kind is None else kind.__name__
        raise CheckpointError(f"{path}: expected a score model, got {got}")
    _check(path, "model", model, state)
    _assign(model, state)
    return model


class _Builder:
    def __init__(
        self, path: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        self.path, self.tensors, self.state = path, tensors, state
        self.made: dict[str, Any] = {}

    def value(self, node: Any, at: str) -> Any:
        """Return the value of a node of a description."""
        if node is None or isinstance(node, (bool, int, float, str, Tensor)):
            return node
        if isinstance(node, list):
            return tuple(self.value(item, place(at, str(i))) for i, item in enumerate(node))
        keys = sorted(node) if isinstance(node, dict) else []
        if keys == ["arguments", "class"] and isinstance(node["arguments"], dict):
            return self._object(node["class"], node["arguments"], at)
        content = node[keys[0]] if len(keys) == 1 else None
        if keys == ["function"]:
            return self._function(content, at)
        if keys == ["list"] and isinstance(content, list):
            return [self.value(item, place(at, str(i))) for i, item in enumerate(content)]
        if keys == ["dict"] and isinstance(content, dict):
            return {key: self.value(item, place(at, key)) for key, item in content.items()}
        if keys == ["float"] and content in _NUMBERS:
            return float(str(content))
        table = {"same": self.made, "tensor": self.tensors}.get(keys[0] if keys else "")
        if len(keys) == 1 and table is not None and isinstance(content, str) and content in table:
            return table[content]
        raise self._error(at, f"expected a description of a value, got {node!s:.200}")

    def _function(self, name: Any, at: str) -> Any:
        function = part_named(name)
        if function is None or isinstance(function, type):
            raise self._error(at, f"expected a registered function, got {unknown(repr(name))}")
        return function

    def _object(self, name: Any, arguments: dict[str, Any], at: str) -> Any:
        kind = part_named(name)
        if not isinstance(kind, type):
            raise self._error(
                at,
                f"expected a class of diffusionkit or a registered one, got {unknown(repr(name))}",
            )
        values = {key: self.value(x, place(at, key)) for key, x in arguments.items()}
        try:
            self.made[at] = self._part(kind, values, at)
        except CheckpointError:
            raise
        except Exception as error:  # a user's constructor may raise any
            raise self._error(at, f"expected arguments of {name}, got {error}") from error
        return self.made[at]

    def _part(self, kind: type, arguments: dict[str, Any], at: str) -> Any:
        ours = _own_classes().get(kind.__name__) is kind
        if not ours or not issubclass(kind, nn.Module) or issubclass(kind, ScoreModel):
            return kind(**arguments)
        start = f"{at}." if at else ""
        own = {n.removeprefix(start): x for n, x in self.state.items() if n.startswith(start)}
        if kind.__name__ not in networks.__all__:
            self._check_counts(arguments, own, at)
            module = kind(**arguments)
        else:
            module = laid_out(self.path, partial(kind, **arguments), own)
        _check(self.path, at or "model", module, own)
        if any(x.is_meta for x in module.state_dict().values()):
            fill(module, own)
        else:
            _assign(module, own)
        return module

    def _check_counts(
        self, arguments: Mapping[str, Any], own: Mapping[str, Tensor], at: str
    ) -> None:
        """Raise if a module would have more numbers than its weights in the file."""
        numbers = sum(x.numel() for x in own.values())
        for name, value in arguments.items():
            if type(value) is int and value > numbers:
                raise self._error(place(at, name), f"expected at most {numbers}, got {value}")

    def _error(self, at: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {at or 'model'}: {text}")


def _check(path: str, what: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise unless a file has the tensors of a module, of the same kinds, and they hold numbers."""
    check_weights(path, what, module, state)
    for name, mine in module.state_dict(keep_vars=True).items():
        problem = value_problem(state[name], isinstance(mine, nn.Parameter))
        if problem is None and mine.is_floating_point() != state[name].is_floating_point():
            problem = f"expected {mine.dtype}, got {state[name].dtype}"
        if problem is not None:
            raise CheckpointError(f"{path}: {what}: {name}: {problem}")


def value_problem(value: object, parameter: bool) -> str | None:
    """Return why a value cannot be a parameter or a buffer in a file, or None."""
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if value.layout != torch.strided or value.is_meta:
        return f"expected a dense tensor with values, got {value.layout} on {value.device}"
    if not value.is_floating_point():
        return None
    if value.dtype not in FLOATS:
        return f"expected floating-point numbers of 16 to 64 bits, got {value.dtype}"
    if parameter and not is_finite(value):
        return "expected finite numbers, got NaN or infinity"
    return "expected numbers, got NaN" if bool(value.isnan().any()) else None


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module the tensors of a file, dtypes included."""
    for name, mine in module.state_dict(keep_vars=True).items():
        value = state[name]
        if mine.data_ptr() != value.data_ptr() or mine.dtype != value.dtype:
            mine.data = value.to(mine.device)  # tied tensors stay tied
