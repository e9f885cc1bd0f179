"""Counting the evaluations of score models, wherever they are called from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch

_current: ContextVar[Tally | None] = ContextVar("tally", default=None)


class Tally:
    """Counts the evaluations made inside `with tally:`, which may be entered many times.

    Args:
        keep: whether the last prediction is kept, which keeps its memory too.

    Attributes:
        evaluations: the number of evaluations so far.
        last: the last prediction, if it is kept.
    """

    __slots__ = ("_before", "_token", "evaluations", "keep", "last")

    def __init__(self, *, keep: bool = False) -> None:
        """Start at none."""
        self.evaluations = 0
        self.keep, self.last = keep, None

    def __enter__(self) -> Tally:
        self._before = self.evaluations
        self._token: Token[Tally | None] = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        outer = _current.get()
        if outer is not None:  # a sampler that runs inside another's step
            outer.evaluations += self.evaluations - self._before


def counted(predict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model's predict so that a call counts as one, unless it called another model's.

    A wrapper, such as guidance, therefore counts as the evaluations it makes.
    """

    @functools.wraps(predict)
    def wrapper(*args: Any, **cond: Any) -> Any:
        tally = None if torch.compiler.is_compiling() else _current.get()
        if tally is None:
            return predict(*args, **cond)
        before = tally.evaluations
        prediction = predict(*args, **cond)
        if tally.evaluations == before:
            tally.evaluations += 1
        if tally.keep:
            tally.last = prediction
        return prediction

    return wrapper
