"""The times of a sampler's grid, which carry schedule values as floats.

A sampler takes a whole batch through the same times. Everything that depends on the times alone is
therefore computed once for the grid, in float64, and attached to the time tensors as floats. A step
then needs no schedule arithmetic and no kernel launches for it, and a float multiplies a state
faster than a tensor (B,) does. Only this module knows of the attachment; users' code gets tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ._batch_times import kernel_at
from ._checks import check_state, check_times
from ._coefficients import Coefficient
from ._schedules import home, schedule_dtype


class _SDE(Protocol):
    T: float

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


Function = Callable[[Tensor, Tensor], tuple[Coefficient, ...]]


class Grid:
    """The schedule on a grid, and values that parts computed for all of its times.

    Args:
        sde: the process.
        alpha: the scales of the data (N + 1,).
        sigma: the standard deviations of the noise (N + 1,).
    """

    __slots__ = ("_functions", "alpha", "sde", "sigma")

    def __init__(self, sde: object, alpha: Tensor, sigma: Tensor) -> None:
        self.sde, self.alpha, self.sigma = sde, alpha, sigma
        self._functions: dict[object, tuple[Function, list[Any]]] = {}

    def values(self, function: Function) -> list[Any]:
        """Return the values of a function of alpha and sigma at all times, as floats."""
        # A bound method is a new object at each access; its owner is not.
        key = id(getattr(function, "__self__", function)), getattr(function, "__name__", "")
        found = self._functions.get(key)
        if found is None:
            n = len(self.alpha)
            values = function(self.alpha, self.sigma)
            columns = [v.expand(n) if isinstance(v, Tensor) else v for v in values]
            rows = by_row(columns, None, n, None)
            # The function keeps its owner alive, so that the id is not reused.
            found = self._functions[key] = function, rows
        return found[1]


class GridPoint:
    """The schedule at a time of a grid.

    Args:
        grid: the grid.
        index: the index of the time in it.
        time: the time.
        alpha: the scale of the data.
        sigma: the standard deviation of the noise.
    """

    __slots__ = ("_tables", "alpha", "grid", "index", "kernel", "sigma", "time")

    kernel: tuple[Tensor, Tensor]  # alpha and sigma as tensors, each (B,)

    def __init__(self, grid: Grid, index: int, time: float, alpha: float, sigma: float) -> None:
        self.grid, self.index = grid, index
        self.time, self.alpha, self.sigma = time, alpha, sigma
        self._tables: dict[object, tuple[object, Any]] = {}

    def store(self, owner: object, others: Sequence[GridPoint], value: Any) -> None:
        """Store a value that a part computed for this time and others."""
        # The entry keeps its owner alive, so that the id is not reused.
        self._tables[id(owner), *[other.time for other in others]] = owner, value

    def look_up(self, owner: object, others: Sequence[GridPoint]) -> Any:
        """Return the value that a part stored for this time and others, or None."""
        found = self._tables.get((id(owner), *[other.time for other in others]))
        return None if found is None else found[1]


def grid_point(t: Tensor, sde: object) -> GridPoint | None:
    """Return the schedule of a process at a time of a grid, or None for any other tensor."""
    point: GridPoint | None = getattr(t, "_grid_point", None)
    return point if point is not None and point.grid.sde is sde else None


def grid_points(sde: object, times: Sequence[Tensor]) -> list[GridPoint] | None:
    """Return the schedule at times of a grid, or None if one of them is another tensor."""
    points = [point for point in (grid_point(t, sde) for t in times) if point is not None]
    return points if len(points) == len(times) else None


def exact_times(points: Sequence[GridPoint], device: torch.device) -> Tensor:
    """Return the times (N + 1,) of points of a grid, in float64 where the device has it."""
    return torch.tensor([point.time for point in points], dtype=torch.float64).to(
        device, schedule_dtype(device)
    )


def grid_times(sde: _SDE, grid: Tensor, like: Tensor) -> Sequence[Tensor]:
    """Return the times of a grid (N + 1,) as tensors (B,) for a state, each with its grid point.

    The tensors have the state's dtype, at least float32, so that arithmetic with them does not
    promote the state; the values of their grid points are exact.
    """
    here = home(sde)
    grid = grid.to(here, schedule_dtype(here))
    values = sde.marginal(grid)
    for name, value in zip(("alpha", "sigma"), values, strict=True):
        if not bool(torch.isfinite(value).all()):
            worst, bad = (float(v[~torch.isfinite(value)][0]) for v in (grid, value))
            raise ValueError(f"marginal: expected finite values, got {name}({worst:g}) = {bad:g}")
    kinds = torch.promote_types(like.dtype, torch.float32), *[schedule_dtype(like.device)] * 2
    columns = [column.detach() for column in (grid, *values)]
    tensors = (
        column.to(like.device, kind).unsqueeze(1).expand(-1, len(like)).unbind(0)
        for column, kind in zip(columns, kinds, strict=True)
    )
    floats = (column.tolist() for column in columns)
    owner = Grid(sde, *columns[1:])
    times = []
    for index, (t, alpha, sigma, *numbers) in enumerate(zip(*tensors, *floats, strict=True)):
        point = GridPoint(owner, index, *numbers)
        point.kernel = alpha, sigma
        for tensor in (t, alpha, sigma):
            tensor._grid_point = point
        times.append(t)
    return times


def copy_grid_point(t: Tensor, copy: Tensor) -> Tensor:
    """Return a copy of a time tensor with the grid point of the original, if it has one."""
    if (point := getattr(t, "_grid_point", None)) is not None:
        copy._grid_point = point  # type: ignore[attr-defined]
    return copy


def grid_rows(t: Tensor, samples: Tensor) -> Tensor:
    """Return the times (n,) of samples (n,) out of times t (B,), with the grid point of t."""
    rows = t[samples]
    if (point := getattr(t, "_grid_point", None)) is not None:
        own = GridPoint(point.grid, point.index, point.time, point.alpha, point.sigma)
        alpha, sigma = (value[:1].expand(len(rows)) for value in point.kernel)
        own.kernel = alpha, sigma
        tensors: Sequence[Any] = (rows, alpha, sigma)
        for tensor in tensors:
            tensor._grid_point = own
    return rows


def schedule(sde: _SDE, t: Tensor) -> tuple[Coefficient, Coefficient]:
    """Return alpha and sigma in float64: floats at a time of a grid, else tensors (B,)."""
    point = grid_point(t, sde)
    return kernel_at(sde, t) if point is None else (point.alpha, point.sigma)


def kernel(sde: _SDE, x: Tensor, t: Tensor) -> tuple[Coefficient, Coefficient]:
    """Return the `schedule` at times t (B,) of a state x (B, *D), or raise if they do not fit."""
    _checked(sde, x, t)
    return schedule(sde, t)


def kernel_tensors(sde: _SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma for a state x (B, *D), each (B,)."""
    point = _checked(sde, x, t)
    return kernel_at(sde, t) if point is None else point.kernel


def _checked(sde: _SDE, x: Tensor, t: Tensor) -> GridPoint | None:
    """Return the grid point of t, or None; raise unless t is (B,) times of a state x (B, *D)."""
    check_state(x)
    point = grid_point(t, sde)
    if point is None or len(t) != len(x):
        check_times(t, sde.T, x.shape[0], x)
    return point


def noise_at(t: Tensor) -> float:
    """Return sigma at a time of a grid."""
    point: GridPoint = t._grid_point  # type: ignore[attr-defined]
    return point.sigma


def floats(alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
    """Return alpha and sigma (B,) as floats if they are those at a time of a grid."""
    point: GridPoint | None = getattr(alpha, "_grid_point", None)
    return (alpha, sigma) if point is None else (point.alpha, point.sigma)


def evaluate(function: Function, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, ...]:
    """Return the values of a method of alpha and sigma, elementwise functions of the two.

    For alpha and sigma at a time of a grid the method is called once for the whole grid, with
    tensors, and the values are floats.
    """
    point: GridPoint | None = getattr(alpha, "_grid_point", None)
    if point is None:
        return function(alpha, sigma)
    row: tuple[Coefficient, ...] = point.grid.values(function)[point.index]
    return row


def by_row(table: Any, sde: Any, n: int, like: Any) -> list[Any]:
    """Return the n rows of a table, with floats for its tensors (n,).

    Args:
        table: a tensor (n,), a sequence or dataclass of tables, or a constant, the same in every
            row. A dataclass lists the fields that are times in `times`; they become grid times.
        sde: the process of those times.
        n: the number of rows.
        like: a time or a state (B, ...), for their number, dtype and device.
    """
    if isinstance(table, Tensor):
        rows: list[Any] = table.tolist()
        return rows
    if isinstance(table, (list, tuple)):
        columns = [by_row(column, sde, n, like) for column in table]
        return [tuple(column[k] for column in columns) for k in range(n)]
    if not is_dataclass(table):
        return [table] * n
    times = getattr(table, "times", ())
    values = {field.name: getattr(table, field.name) for field in fields(table)}
    parts = [
        grid_times(sde, value, like) if name in times else by_row(value, sde, n, like)
        for name, value in values.items()
    ]
    kind: Any = type(table)
    return [kind(*row) for row in zip(*parts, strict=True)]
