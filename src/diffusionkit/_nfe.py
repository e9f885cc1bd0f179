"""The number of function evaluations: calls of score models, wherever they are made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch

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


def counted(predict: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """Wrap a model's predict so that a call counts as one, unless it calls other models.

    A wrapper of models, such as guidance, counts as the evaluations it makes. The predictions are
    checked.
    """

    @functools.wraps(predict)
    def wrapper(*args: Any, **cond: Any) -> Any:
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
