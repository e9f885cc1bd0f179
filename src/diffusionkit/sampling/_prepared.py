"""Tables of a sampler's grid, kept between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._grid_times import Grid, forget_models
from .._kept import fixed
from .._precision import at_least_float32
from .._tracing import traced
from ..interfaces import ForwardSDE, Predictor
from ._route import Route
from .grids import resolve_grid
from .wrapped import innermost


class PreparedGrid:
    """The times of a sampler and all that its parts tabulated there.

    They are kept if neither process nor predictor can change, and then serve every run with the
    same times; runs with as many samples, of the same dtype on the same device, also share the time
    tensors. What depends on the model is forgotten when a run begins. A copy is empty. The tables
    of a wrapped predictor are those of the innermost one.
    """

    __slots__ = ("_bound", "_grid", "_predictor", "_resolved")

    _grid: Grid | None
    _bound: tuple[tuple[object, ...], Sequence[Tensor]] | None
    _resolved: tuple[tuple[object, ...], Tensor] | None

    def __init__(self) -> None:
        self._grid = self._bound = self._resolved = None
        self._predictor: Predictor | None = None

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedGrid, ()

    def resolved(
        self, grid: Any, predictor: Predictor | None, sde: ForwardSDE, steps: int
    ) -> Tensor:
        """Return the decreasing times (N + 1,) of a grid, by default the predictor's."""
        key = grid, predictor, sde, steps, sde.T, sde.t_stop
        if (last := self._resolved) is not None and all(map(_same, key, last[0])):
            return last[1]
        lasting = fixed(grid) and fixed(sde) and (grid is not None or _lasting(predictor))
        if grid is None and predictor is not None:
            grid = predictor.default_grid(sde, steps)
        times = resolve_grid(grid, sde, steps)
        self._resolved = (key, times) if lasting else None
        return times

    def times(
        self, sde: ForwardSDE, predictor: Predictor | None, route: Route, like: Tensor
    ) -> Sequence[Tensor]:
        """Return the times of a route for a state (B, *D), for which the predictor is prepared."""
        if traced():
            return _prepared(sde, Grid(sde, route.times), predictor, route, like)
        with torch.inference_mode(False), torch.no_grad():
            grid, key = self._grid, _kind(like, route)
            last = self._predictor is predictor
            if grid is None or not last or not grid.serves(sde, route.times):
                grid = Grid(sde, route.times)
                self._bound = None
            if (bound := self._bound) is not None and bound[0] == key:
                forget_models(bound[1])
                return bound[1]
            times = _prepared(sde, grid, predictor, route, like)
            if _lasting(predictor):
                self._grid, self._predictor, self._bound = grid, predictor, (key, times)
            return times


def _prepared(
    sde: ForwardSDE, grid: Grid, predictor: Predictor | None, route: Route, like: Tensor
) -> Sequence[Tensor]:
    """Return the times of a route for a state, with the predictor's tables."""
    times = grid.times_for(like)
    if predictor is not None:
        for run in route.runs:
            predictor.prepare(sde, [times[k] for k in run])
    return times


def _lasting(predictor: Predictor | None) -> bool:
    """Return whether what a predictor tabulates is never out of date."""
    return fixed(innermost(predictor))


def _kind(like: Tensor, route: Route) -> tuple[object, ...]:
    """Return what time tensors are made for."""
    dtype = at_least_float32(like[:0]).dtype
    return type(like), dtype, like.device, len(like), list(route.runs)


def _same(value: object, last: object) -> bool:
    """Return whether a part or a number is that of the last run."""
    return value is last or (isinstance(value, (int, float)) and value == last)
