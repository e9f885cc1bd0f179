"""The order in which a sampler visits times: down a grid, and back up where segments repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ..interfaces import ForwardSDE
from .restart import Restart, check_restarts
from .time_travel import TimeTravel

Travel: TypeAlias = TimeTravel | Restart | Sequence[Restart]


@dataclass(frozen=True)
class Route:
    """A run's moves between times.

    Args:
        times: the times (M,), first those of the grid.
        moves: pairs of indices of times; a move to a later time is one of the forward process.
        runs: descending sequences of indices, for predictors to prepare; the grid is the last.
        noise: the standard deviation of the noise at the end of moves to later times, over that
            of the forward process; 1 where it is not given.
    """

    times: Tensor
    moves: Sequence[tuple[int, int]]
    runs: Sequence[Sequence[int]]
    noise: dict[int, float]


def planned(travel: Travel | None, sde: ForwardSDE, grid: Tensor, first: int = 0) -> Route:
    """Return the route of a run from a point of a grid (N + 1,).

    Raises:
        ValueError: if a segment is longer than the grid, or an interval outside its noise.
        TypeError: if travel is of another kind.
    """
    last = len(grid) - 1
    whole = range(last + 1)
    if travel is None or isinstance(travel, TimeTravel):
        if travel is not None and travel.jump > last:
            raise ValueError(
                f"time_travel: expected a jump of at most the grid's {last} steps, "
                f"got {travel.jump}"
            )
        travel = TimeTravel(jump=last, repeats=1) if travel is None else travel
        return Route(grid, travel.steps(first, last), [whole], {})
    times: list[Tensor] = [grid]
    runs: list[Sequence[int]] = []
    noise: dict[int, float] = {}
    again: dict[int, list[tuple[int, int]]] = {}
    for restart in check_restarts(travel):
        end, levels = restart.place(sde, grid)
        if levels[0] > grid[first]:
            continue
        start = sum(len(part) for part in times)
        run = [*range(start, start + restart.steps), end]
        times.append(levels[:-1])
        runs.append(run)
        noise[start] = restart.s_noise
        moves = [(end, start), *pairwise(run)]
        again.setdefault(end, []).extend(moves * restart.repeats)
    path: list[tuple[int, int]] = []
    for i in range(first, last):
        path += [(i, i + 1), *again.get(i + 1, [])]
    return Route(torch.cat(times), path, [*runs, whole], noise)
