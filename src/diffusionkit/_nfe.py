"""The number of function evaluations: calls of score models, wherever they are made."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor

from ._batch_conditions import for_batch

Check = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]

# A context variable, so that samplers in several threads count their own evaluations.
_current: ContextVar[EvaluationCounter | None] = ContextVar("counter", default=None)


class EvaluationCounter:
    """Counts the evaluations made inside `with counter:`, which may be entered many times.

    Attributes:
        evaluations: the number of evaluations so far.
    """

    __slots__ = ("_before", "_token", "evaluations")

    def __init__(self) -> None:
        self.evaluations = 0

    def __enter__(self) -> EvaluationCounter:
        self._before = self.evaluations
        self._token: Token[EvaluationCounter | None] = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        outer = _current.get()
        if outer is not None:  # a sampler that runs inside another's step
            outer.evaluations += self.evaluations - self._before


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Do not count evaluations inside, which belong to one that is counted already."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def counted(predict: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """Wrap a model's predict so that a call counts as one, unless it calls other models.

    A wrapper of models, such as guidance, counts as the evaluations it makes. A condition that is
    given once is expanded to the batch, and the predictions are checked.
    """
    positional = _names(predict)

    @functools.wraps(predict)
    def wrapper(*args: Any, **cond: Any) -> Any:
        if cond and len(args) > 1:
            _check_names(args, cond, positional)
            if isinstance(x := args[1], Tensor) and x.ndim:
                cond = for_batch(cond, x.shape[0])
        counter = None if torch.compiler.is_compiling() else _current.get()
        if counter is None:
            prediction = predict(*args, **cond)
            check(prediction, args, cond)
            return prediction
        before = counter.evaluations
        prediction = predict(*args, **cond)
        if counter.evaluations == before:
            counter.evaluations += 1
        check(prediction, args, cond)
        return prediction

    wrapper._counted = True  # type: ignore[attr-defined]
    return wrapper


def _names(predict: Callable[..., Any]) -> list[str | None]:
    """Return the names of parameters, None for those that are positional-only."""
    try:
        parameters = inspect.signature(predict).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return []
    return [p.name if p.kind is p.POSITIONAL_OR_KEYWORD else None for p in parameters]


def _check_names(args: tuple[Any, ...], cond: dict[str, Any], positional: list[str | None]) -> None:
    """Raise if a condition has the name of a parameter that the call passes by position."""
    for name in positional[: len(args)]:
        if name in cond:
            raise TypeError(
                f"{type(args[0]).__name__}.predict: expected positional-only parameters, since a "
                f"condition is called {name!r}, got others; write "
                "def predict(self, x, t, /, **cond)"
            )


def counts(cls: type, check: Check) -> type:
    """Return a class of score models whose predict, its own or inherited, counts evaluations.

    Args:
        cls: the class.
        check: takes a prediction, and the positional and keyword arguments of a call.
    """
    predict = cls.predict  # type: ignore[attr-defined]
    abstract = getattr(predict, "__isabstractmethod__", False)
    if not abstract and not hasattr(predict, "_counted"):
        cls.predict = counted(predict, check)  # type: ignore[attr-defined]
    return cls
