"""Times of a sampler's grid, whose schedule values are known as floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ._schedules import home, schedule_dtype


class _SDE(Protocol):
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


class Instant:
    """What is known, as plain floats, of a time tensor whose entries are all equal.

    A sampler moves a whole batch through the same times. Their coefficients are computed once
    for the grid and travel with the time tensors, so that a step costs no schedule arithmetic
    and no kernel launches for it; a float also multiplies a state faster than a tensor (B,) does.
    """

    __slots__ = ("alpha", "notes", "sde", "sigma", "time")

    def __init__(self, sde: object, time: float, alpha: float, sigma: float) -> None:
        """Keep the kernel of a process at a time."""
        self.sde, self.time, self.alpha, self.sigma = sde, time, alpha, sigma
        self.notes: dict[object, Any] = {}  # what parts have worked out for this time


def instant(t: Tensor, sde: object) -> Instant | None:
    """Return what is known of a time tensor for a process, or None."""
    known: Instant | None = getattr(t, "_instant", None)
    return known if known is not None and known.sde is sde else None


def tabulated(sde: object, times: Sequence[Tensor]) -> tuple[list[Instant], Tensor] | None:
    """Return what is known of the times of a grid, and the grid (N + 1,); None if one is not."""
    known = [one for one in (instant(t, sde) for t in times) if one is not None]
    if len(known) < len(times):
        return None
    grid = torch.tensor([one.time for one in known], dtype=torch.float64)
    return known, grid.to(times[0].device, schedule_dtype(times[0].device))


def noise_at(t: Tensor) -> float:
    """Return sigma at a time of `instants`."""
    known: Instant = t._instant  # type: ignore[attr-defined]
    return known.sigma


def grid_times(sde: _SDE, grid: Tensor, like: Tensor) -> Sequence[Tensor]:
    """Return the times of a grid (N + 1,) as tensors (B,), fit for a state, that know their kernel.

    They are in the state's dtype, at least float32, so that a part which multiplies by them
    does not change it; what they know is exact.
    """
    here = home(sde)
    grid = grid.to(here, schedule_dtype(here))
    values = sde.marginal(grid)
    for name, value in zip(("alpha", "sigma"), values, strict=True):
        if not isinstance(value, Tensor) or value.shape != grid.shape:
            raise ValueError(
                f"marginal: expected {name} as a tensor of the shape of t, {tuple(grid.shape)}, "
                f"got {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
            )
        if not bool(torch.isfinite(value).all()):
            worst = float(grid[~torch.isfinite(value)][0])
            raise ValueError(f"marginal: expected finite values, got {name}({worst:g}) that is not")
    columns = (column.tolist() for column in (grid, *values))
    dtype = torch.promote_types(like.dtype, torch.float32)
    times = grid.to(like.device, dtype).unsqueeze(1).expand(-1, len(like)).unbind(0)
    for t, *known in zip(times, *columns, strict=True):
        t._instant = Instant(sde, *known)
    return times
