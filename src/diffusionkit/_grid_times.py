"""The times of a sampler's grid, which carry schedule values as floats.

A sampler takes a whole batch through the same times. Everything that depends on the times alone is
therefore computed once for the grid, in float64, and attached to the time tensors as floats. A step
then needs no schedule arithmetic and no kernel launches for it, and a float multiplies a state
faster than a tensor (B,) does. Only this module uses the attachment; users' code gets tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ._batch_times import kernel_at, known_at
from ._checks import check_state, check_times, readable
from ._coefficients import Coefficient
from ._kept import fixed
from ._schedules import home, schedule_dtype


class _SDE(Protocol):
    T: float

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


Label = Callable[[Any, Tensor], Tensor]


class Grid:
    """The schedule on a grid, and values that parts computed for all of its times.

    Args:
        sde: the process.
        times: the times (N + 1,).

    Raises:
        ValueError: if alpha or sigma is not finite at one of them.
    """

    __slots__ = ("_kept", "_methods", "_numbers", "alpha", "sde", "sigma", "times")

    def __init__(self, sde: _SDE, times: Tensor) -> None:
        here = home(sde)
        times = times.to(here, schedule_dtype(here))
        values = sde.marginal(times)
        for name, value in zip(("alpha", "sigma"), values, strict=True):
            if not bool(torch.isfinite(value).all()):
                worst, bad = (float(v[~torch.isfinite(value)][0]) for v in (times, value))
                raise ValueError(
                    f"marginal: expected finite values, got {name}({worst:g}) = {bad:g}"
                )
        self.sde = sde
        self.times, self.alpha, self.sigma = (v.detach() for v in (times, *values))
        columns = (self.times, self.alpha, self.sigma)
        self._numbers = list(zip(*(column.tolist() for column in columns), strict=True))
        self._kept: dict[object, tuple[object, Any]] = {}
        self.forget_models()

    def forget_models(self) -> None:
        """Forget the values of models' methods."""
        self._methods: dict[object, tuple[object, list[Any]]] = {}

    def times_for(self, like: Tensor) -> list[Tensor]:
        """Return the times as tensors (B,) for a state (B, *D), each with its grid point."""
        wide = schedule_dtype(like.device)
        kinds = torch.promote_types(like.dtype, torch.float32), wide, wide
        columns = [
            column.to(like.device, kind)
            for column, kind in zip((self.times, self.alpha, self.sigma), kinds, strict=True)
        ]
        tensors = (c.unsqueeze(1).expand(-1, len(like)).unbind(0) for c in columns)
        times, labels = [], LabelTable(columns[0], len(like))
        for index, (numbers, *own) in enumerate(zip(self._numbers, *tensors, strict=True)):
            point = GridPoint(self, index, *numbers)
            t, alpha, sigma = own
            point.kernel, point.labels, point.batch = (alpha, sigma), labels, len(like)
            for tensor in own:
                tensor._grid_point = point
            times.append(t)
        return times

    def keep(self, owner: object, name: object, make: Callable[[], Any]) -> Any:
        """Return what a part makes under a name, made once if the part is `fixed`."""
        if not fixed(owner):
            return make()
        # The entry keeps its owner alive, so that the id is not reused.
        key = id(owner), name
        if key not in self._kept:
            self._kept[key] = owner, make()
        return self._kept[key][1]

    def serves(self, sde: object, times: Tensor) -> bool:
        """Return whether the values are still those of a process on a grid."""
        return self.sde is sde and fixed(sde) and torch.equal(self.times, times)

    def values(self, owner: object, name: str) -> list[Any]:
        """Return the values of a method of alpha and sigma at all times, as floats."""
        key = id(owner), name
        found = self._methods.get(key)
        if found is None:
            n = len(self.alpha)
            values = getattr(owner, name)(self.alpha, self.sigma)
            columns = [v.expand(n) if isinstance(v, Tensor) else v for v in values]
            rows = by_row(columns, None, n, None)
            # The entry keeps the owner alive, so that the id is not reused.
            found = self._methods[key] = owner, rows
        return found[1]


class LabelTable:
    """The noise labels of models at all times of a grid, for states of one kind.

    Args:
        times: the times (N + 1,) as a state's steps get them, in its dtype and on its device.
        batch: the number of samples.
    """

    __slots__ = ("_rows", "batch", "inner", "times")

    def __init__(self, times: Tensor, batch: int) -> None:
        self.times, self.batch = times, batch
        self.inner: list[Sequence[Tensor]] = []  # times within the steps of the grid
        self.forget_models()

    def forget_models(self) -> None:
        """Forget all labels."""
        self._rows: dict[object, tuple[Label, Sequence[Tensor] | None]] = {}

    def rows(self, label: Label, sde: object, dtype: torch.dtype) -> Sequence[Tensor] | None:
        """Return the labels (B,) at each time in a dtype, or None if they cannot be tabulated."""
        key = id(label), dtype
        found = self._rows.get(key)
        if found is None:
            table = self._tabulated(label, sde)
            rows = None if table is None else table.detach().to(dtype).unsqueeze(1)
            unbound = None if rows is None else rows.expand(-1, self.batch).unbind(0)
            found = self._rows[key] = label, unbound  # it keeps the label alive, and so its id
        return found[1]

    def _tabulated(self, label: Label, sde: object) -> Tensor | None:
        own, n = getattr(label, "elementwise", None), len(self.times)
        if n < 3 or own is False or (own is None and not readable(self.times)):
            return None
        # Never as many times as samples, so that a label that depends on the samples does not fit.
        times = self.times if n != self.batch else torch.cat([self.times, self.times[-1:]])
        try:
            table = label(sde, times)
            if not isinstance(table, Tensor) or table.shape != times.shape:
                return None
            if own is None:
                # A label of the first time or of the mean differs among other times.
                part = label(sde, times[1:-1].flip(0)).flip(0)
                if not torch.allclose(part, table[1:-1], rtol=1e-5, atol=0.0, equal_nan=True):
                    return None
        except Exception:  # in a step it gets the times that it expects, or raises again
            return None
        return table[:n]


def label_at(label: Label, sde: object, t: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return tabulated noise labels (B,) at times t (B,) of a grid, or None."""
    point: GridPoint | None = getattr(t, "_grid_point", None)
    if point is None or point.grid.sde is not sde or torch.compiler.is_compiling():
        return None
    rows = point.labels.rows(label, sde, dtype)
    if rows is None:
        return None
    row = rows[point.index]
    # A copy: a network may change its labels in place.
    return row.clone() if point.batch == point.labels.batch else row[:1].repeat(point.batch)


class GridPoint:
    """The schedule at a time of a grid.

    Args:
        grid: the grid.
        index: the index of the time in it.
        time: the time.
        alpha: the scale of the data.
        sigma: the standard deviation of the noise.
    """

    __slots__ = ("_tables", "alpha", "batch", "grid", "index", "kernel", "labels", "sigma", "time")

    kernel: tuple[Tensor, Tensor]  # alpha and sigma as tensors, each (B,)
    labels: LabelTable
    batch: int

    def __init__(self, grid: Grid, index: int, time: float, alpha: float, sigma: float) -> None:
        self.grid, self.index = grid, index
        self.time, self.alpha, self.sigma = time, alpha, sigma
        self._tables: dict[object, tuple[object, Any]] = {}

    def store(self, owner: object, others: Sequence[GridPoint], value: Any) -> None:
        """Store a value that a part computed for this time and others."""
        # The entry keeps its owner alive, so that the id is not reused.
        self._tables[id(owner), *[other.time for other in others]] = owner, value

    def step_to(self, owner: object, there: GridPoint) -> Any:
        """Return the value that a part stored for a step from here to another time, or None."""
        found = self._tables.get((id(owner), there.time))
        return None if found is None else found[1]

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


def exact_times(points: Sequence[GridPoint]) -> Tensor:
    """Return the times (N + 1,) of points of a grid in float64, where the process computes."""
    here = home(points[0].grid.sde)
    times = torch.tensor([point.time for point in points], dtype=torch.float64)
    return times.to(here, schedule_dtype(here))


def grid_times(sde: _SDE, grid: Tensor, like: Tensor) -> Sequence[Tensor]:
    """Return the times of a grid (N + 1,) as tensors (B,) for a state, each with its grid point.

    The tensors have the state's dtype, at least float32, so that arithmetic with them does not
    promote the state; the values of their grid points are exact.
    """
    return Grid(sde, grid).times_for(like)


def forget_models(times: Sequence[Tensor]) -> None:
    """Forget what models and labels tabulated at times of a grid: they may have changed since."""
    point: GridPoint = times[0]._grid_point  # type: ignore[attr-defined]
    point.grid.forget_models()
    point.labels.forget_models()
    for inner in point.labels.inner:
        forget_models(inner)


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
        own.kernel, own.labels, own.batch = (alpha, sigma), point.labels, len(rows)
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
    known = known_at(sde, t)  # at times that are validated, but not for this state
    if (
        known is not None
        and isinstance(x, Tensor)
        and x.dtype.is_floating_point
        and x.shape[:1] == t.shape
        and x.device == t.device
        and x.numel()
    ):
        return known.kernel
    point = _checked(sde, x, t)
    return kernel_at(sde, t) if point is None else point.kernel


def _checked(sde: _SDE, x: Tensor, t: Tensor) -> GridPoint | None:
    """Return the grid point of t, or None; raise unless t is (B,) times of a state x (B, *D)."""
    check_state(x)
    point = grid_point(t, sde)
    if point is None or point.batch != x.shape[0]:
        check_times(t, sde.T, x.shape[0], x)
    return point


def noise_at(t: Tensor) -> float:
    """Return sigma at a time of a grid."""
    point: GridPoint = t._grid_point  # type: ignore[attr-defined]
    return point.sigma


def with_values(
    owner: object, name: str, alpha: Tensor, sigma: Tensor
) -> tuple[Coefficient, Coefficient, tuple[Coefficient, ...]]:
    """Return alpha and sigma (B,) as floats if they are those at a time of a grid, and `evaluate`.

    Args:
        owner: the object that has the method.
        name: the method's name.
        alpha: the scale of the data (B,).
        sigma: the standard deviation of the noise (B,).
    """
    point: GridPoint | None = getattr(alpha, "_grid_point", None)
    if point is None:
        return alpha, sigma, getattr(owner, name)(alpha, sigma)
    return point.alpha, point.sigma, point.grid.values(owner, name)[point.index]


def evaluate(owner: object, name: str, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, ...]:
    """Return the values of a method of alpha and sigma, elementwise functions of the two.

    For alpha and sigma at a time of a grid the method is called once for the whole grid, with
    tensors, and the values are floats.
    """
    point: GridPoint | None = getattr(alpha, "_grid_point", None)
    if point is None:
        values: tuple[Coefficient, ...] = getattr(owner, name)(alpha, sigma)
        return values
    row: tuple[Coefficient, ...] = point.grid.values(owner, name)[point.index]
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
    inner = {name: grid_times(sde, values[name], like) for name in times}
    if (point := getattr(like, "_grid_point", None)) is not None:
        point.labels.inner.extend(inner.values())
    parts = [inner.get(name) or by_row(value, sde, n, like) for name, value in values.items()]
    kind: Any = type(table)
    return [kind(*row) for row in zip(*parts, strict=True)]
