"""Averaged weights: kept in at least float32, and lent to models."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from .._files import listed
from ..distributed._sharded import placed, placed_state
from ..distributed._wrappers import (
    bare_copy,
    bare_modules,
    bare_state,
    bare_tensors,
    load_bare_state,
)
from ._weight_pairs import WeightPairs, kept_dtype

logger = logging.getLogger(__name__)


class AveragedWeights:
    """The averages of a model's floating-point parameters, and copies of its other tensors.

    Args:
        model: the model, whose weights are the first averages.

    Attributes:
        model: a model with the averages, or modules that only hold them under their names, if the
            model cannot be copied.

    Raises:
        ValueError: if a parameter has no shape yet.
    """

    def __init__(self, model: nn.Module) -> None:
        current = bare_tensors(model)
        if lazy := [name for name, x in current.items() if is_lazy(x)]:
            raise ValueError(
                "model: expected parameters with a shape, "
                f"got {lazy[:4]} of a model that has not been called"
            )
        with torch.inference_mode(False):
            kept = {id(x): _kept(x) for x in current.values()}
        tensors = {name: kept[id(x)] for name, x in current.items()}
        try:
            self.model = bare_copy(model, tensors)
            held = bare_tensors(self.model)
            copied = {n: id(x) for n, x in held.items()} == {n: id(x) for n, x in tensors.items()}
        except Exception:  # modules that hold locks or process groups raise any
            copied = False
        if not copied:
            self.model = _holder(model, tensors)
        self.model.eval()
        self._pairs: WeakKeyDictionary[nn.Module, WeightPairs] = WeakKeyDictionary()

    def matching(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a model by name.

        Raises:
            ValueError: if names or shapes are not those of the averages.
        """
        tensors = bare_tensors(model)
        check_tensors("model", bare_tensors(self.model), tensors)
        return tensors

    def pairs(self, model: nn.Module) -> WeightPairs:
        """Return the tensors of a model, each with its average.

        Raises:
            ValueError: if names or shapes are not those of the averages.
        """
        found = self._pairs.get(model)
        if found is None or not found.hold():
            found = WeightPairs(model, self.model, self.matching(model))
            self._pairs[model] = found
        return found

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}  # a copy is that of no model yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model = state["model"]
        self._pairs = WeakKeyDictionary()

    @torch.no_grad()
    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the averages as `nn.Module.to` moves weights, but never to a narrower precision."""
        cast(Any, self.model)._apply(partial(_moved, fn))

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a state with the names and shapes of the averages, whole or sharded."""
        found = OrderedDict(placed_state(state, bare_state(self.model)))
        if versions := getattr(state, "_metadata", None):
            found._metadata = versions  # type: ignore[attr-defined]
        load_bare_state(self.model, found)

    @contextlib.contextmanager
    def lent_to(self, model: nn.Module) -> Iterator[None]:
        """Put the averages into a model, and its own weights back when the last block ends."""
        with _lock:
            loan = self._loan(self.matching(model))
            loan.blocks += 1
        try:
            with _lock:
                loan.begin(bare_tensors(self.model))
            yield
        finally:
            with _lock:
                loan.blocks -= 1
                if not loan.blocks:
                    loan.end(bare_tensors(model))

    def _loan(self, tensors: dict[str, Tensor]) -> _Loan:
        found = [_loans.get(id(x)) for x in tensors.values()]
        if found and found[0] and found[0].source is self and len({*map(id, found)}) == 1:
            return found[0]
        check_own_weights(tensors)
        return _Loan(self, tensors)


class _Loan:
    """Averages that replace a model's own weights."""

    def __init__(self, source: AveragedWeights, tensors: dict[str, Tensor]) -> None:
        with torch.inference_mode(False):
            own = {id(x): x.detach().clone() for x in tensors.values()}
        self.source, self.blocks = source, 0
        self._tensors = tensors
        self._own = {name: own[id(x)] for name, x in tensors.items()}
        self._versions: dict[str, int] | None = None
        _loans.update(dict.fromkeys(own, self))

    @torch.no_grad()
    def begin(self, averages: Mapping[str, Tensor]) -> None:
        if self._versions is None:
            _copy(averages, self._tensors)
            self._versions = _versions(self._tensors)

    @torch.no_grad()
    def end(self, tensors: Mapping[str, Tensor]) -> None:
        now, before = _versions(tensors), self._versions or {}
        for x in self._tensors.values():
            _loans.pop(id(x), None)
        _copy(self._own, {**self._tensors, **tensors})
        if changed := [name for name in before if now.get(name) != before[name]]:
            logger.warning(
                "the model's own weights are back; inside `with ema.applied(model)` something "
                "changed %s", ", ".join(changed[:4]),
            )  # fmt: skip


_lock = threading.RLock()
_loans: dict[int, _Loan] = {}  # by the ids of tensors, which a loan keeps alive


def check_own_weights(model: nn.Module | Mapping[str, Tensor]) -> None:
    """Raise if a model holds averaged weights, inside `with ema.applied(model)`."""
    if not _loans:
        return
    tensors = bare_tensors(model) if isinstance(model, nn.Module) else model
    if any(id(x) in _loans for x in tensors.values()):
        raise ValueError(
            "model: expected its own weights, got averaged ones; "
            "leave `with ema.applied(model)` first"
        )


class WeightsOnly(nn.Module):
    """The weights of a model that cannot be copied, under their names."""

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"{error}: these are {_NO_COPY}") from None

    @override
    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"ema.model: expected a model that can be copied, got {_NO_COPY}")


_NO_COPY = (
    "the weights of a model that cannot, such as one sharded by fully_shard; "
    "use `with ema.applied(model)`"
)


def _holder(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    root = WeightsOnly()
    for prefix, module in bare_modules(model):
        node: nn.Module = root
        for name in prefix.split(".")[:-1]:
            node = cast(nn.Module, node._modules.setdefault(name, WeightsOnly()))
        for name, x in module._parameters.items():
            node._parameters[name] = cast(Any, None if x is None else tensors[prefix + name])
        for name, buffer in module._buffers.items():
            node._buffers[name] = None if buffer is None else tensors[prefix + name]
        node._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return root


def _kept(x: Tensor) -> Tensor:
    value = x.detach().clone().to(kept_dtype(x))
    return nn.Parameter(value, requires_grad=False) if isinstance(x, nn.Parameter) else value


def _moved(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    there = fn(torch.empty(0, dtype=x.dtype, device=x.device))
    return x.to(there.device) if there.dtype.itemsize < x.dtype.itemsize else fn(x)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(placed(value, target[name]))


def _versions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        name: x._version
        for name, x in tensors.items()
        if isinstance(x, nn.Parameter) and not x.is_inference()
    }


def check_tensors(what: str, wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raise unless the tensors have the same names, shapes and kinds."""
    if wanted.keys() == got.keys() and all(_kind(x) == _kind(got[n]) for n, x in wanted.items()):
        return
    problems = [f"missing {name}" for name in wanted if name not in got]
    problems += [f"unexpected {name}" for name in got if name not in wanted]
    problems += [
        f"{name}: expected {_kind(x)}, got {_kind(got[name])}"
        for name, x in wanted.items()
        if name in got and _kind(x) != _kind(got[name])
    ]
    raise ValueError(f"{what}: expected the tensors of the averaged model, got {listed(problems)}")


def _kind(x: Any) -> Any:
    return (x.is_floating_point(), x.is_complex(), x.shape) if isinstance(x, Tensor) else None
