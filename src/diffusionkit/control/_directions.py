"""The memory of guidance directions, which a predictor opens around its step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

Averages = Mapping[nn.Module, Tensor]

# A context variable, so that samplers in several threads have their own.
_current: ContextVar[Memory | None] = ContextVar("memory", default=None)


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
            direction = torch.add(direction, before, alpha=self.factor)
        if owner not in self._seen:
            self._seen.add(owner)
            self.after[owner] = direction
        return direction


@contextmanager
def remembering(before: Averages, factor: float) -> Iterator[Memory]:
    """Let guidance inside use, and update, averages of directions."""
    memory = Memory(before, factor)
    token = _current.set(memory)
    try:
        yield memory
    finally:
        _current.reset(token)


def averaged(owner: nn.Module, direction: Tensor) -> Tensor:
    """Return the direction (B, *D) of a guided model with momentum, where there is any."""
    memory = None if torch.compiler.is_compiling() else _current.get()
    return direction if memory is None else memory.averaged(owner, direction)
