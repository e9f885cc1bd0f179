"""Work that the processes of a group share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ._group import gather_objects, rank_and_world_size

Item = TypeVar("Item")
Result = TypeVar("Result")


def share(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return function(item) for each item, in order, in every process.

    The items are dealt in turn, and every process makes the same number of calls: those without an
    item repeat the last one, since a sharded network must be called by all. All must call this with
    the same number of items.

    Raises:
        Exception: what the function raises.
        RuntimeError: if it raises in another process.
    """
    rank, world = rank_and_world_size()
    n = len(items)
    own: list[Result] = []
    error: Exception | None = None
    try:
        for first in range(0, n, world):
            result = function(items[min(first + rank, n - 1)])
            if first + rank < n:
                own.append(result)
    except Exception as problem:  # the other processes must not wait for this one
        error = problem
    message = None if error is None else f"{type(error).__name__}: {error}"
    everyone = gather_objects((own if error is None else [], message))
    if error is not None:
        raise error
    results: list[Any] = [None] * n
    for other, (part, failure) in enumerate(everyone):
        if failure is not None:
            raise RuntimeError(f"process {other} of {world} failed: {failure}")
        results[other::world] = part
    return results
