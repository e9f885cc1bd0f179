"""The memory of guidance directions, which a predictor opens around its step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .._coefficients import add_scaled

Averages = Mapping[nn.Module, Tensor]

# A context variable, so that samplers in several threads have their own.
_current: ContextVar[Memory | None] = ContextVar("memory", default=None)
# The number of open memories in all threads, which compiled graphs have guards on.
_open = 0
_lock = threading.Lock()


class Memory:
    """The running averages of guidance directions, before and after a step.

    Args:
        before: the averages (B, *D) after the previous step, of each guided model.
        factor: the momentum.
    """

    def __init__(self, before: Averages, factor: float) -> None:
        self.before, self.factor = before, factor
        self.after = dict(before)
        self._seen: set[nn.Module] = set()

    def averaged(self, owner: nn.Module, direction: Tensor) -> Tensor:
        """Return a direction with momentum; the first of a step is remembered."""
        before = self.before.get(owner)
        if before is not None:
            direction = add_scaled(direction, before, self.factor)
        if owner not in self._seen:
            self._seen.add(owner)
            self.after[owner] = direction
        return direction


@contextmanager
def remembering(before: Averages, factor: float) -> Iterator[Memory]:
    """Let guidance inside use, and update, averages of directions."""
    memory = Memory(before, factor)
    token = _current.set(memory)
    _count(1)
    try:
        yield memory
    finally:
        _count(-1)
        _current.reset(token)


def _count(change: int) -> None:
    global _open
    with _lock:
        _open += change


def averaged(owner: nn.Module, direction: Tensor) -> Tensor:
    """Return the direction (B, *D) of a guided model with momentum, where there is any."""
    if not _open:
        return direction
    if torch.compiler.is_compiling():
        # Without fullgraph=True this then runs as it is, outside of the graph.
        raise ValueError(
            "predictor: expected guidance with momentum outside of a compiled graph, which has no "
            "memory, got it in one; compile the network"
        )
    memory = _current.get()
    return direction if memory is None else memory.averaged(owner, direction)
