"""Data sets as one tensor, draws from them, and means with standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from .._checks import as_item, check_finite, check_known, check_part, check_state, check_times
from .._schedules import exact, home, schedule_dtype
from ..interfaces import ForwardSDE
from ..random import rand


def as_tensor(data: Tensor | Iterable[Any]) -> Tensor:
    """Return a data set as one tensor (N, *D)."""
    if not isinstance(data, Tensor):
        if isinstance(data, Sized) and hasattr(data, "__getitem__"):
            parts = [_first(data[i]).unsqueeze(0) for i in range(len(data))]
        elif isinstance(data, Iterable):
            parts = [_first(batch) for batch in data]
        else:
            raise TypeError("data: expected a tensor, a data set or a loader of batches, "
                            f"got {type(data).__name__}")  # fmt: skip
        if not parts:
            raise ValueError("data: expected at least one item, got none")
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = [tuple(part.shape[1:]) for part in parts[:4]]
            raise ValueError(f"data: expected items of one shape, got {shapes}")
        data = torch.cat(parts)
    check_state(data, "data")
    check_known(data, "data")
    check_finite(data, "data")
    if data.ndim < 2:
        raise ValueError(f"data: expected shape (N, *D), got {tuple(data.shape)}")
    return data.detach()


def _first(item: Any) -> Tensor:
    first = item[0] if isinstance(item, (tuple, list)) and item else item
    first = as_item(first, "data")
    if first.ndim == 0:
        raise ValueError("data: expected items with dimensions, got a number")
    return first


def kernel(sde: ForwardSDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at times (K,), on the CPU."""
    check_part(sde, ForwardSDE, "sde")
    check_times(t, sde.T)
    with torch.no_grad():
        alpha, sigma = (c.cpu() for c in sde.marginal(exact(t).to(home(sde))))
    if len(t) == 0 or not bool((sigma > 0).all() and (alpha > 0).all()):
        raise ValueError("t: expected at least one time, with alpha > 0 and sigma > 0 at each, "
                         f"got alpha = {alpha.tolist()}, sigma = {sigma.tolist()}")  # fmt: skip
    return alpha, sigma


def check_generator(generator: torch.Generator | None) -> None:
    """Raise unless `generator` is a torch.Generator or None."""
    if generator is not None:
        check_part(generator, torch.Generator, "generator")


def draw_index(
    n: int, shape: Sequence[int], generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """Draw integers in [0, n), in a shape, on the device of `like`."""
    u = rand(shape, generator=generator, device=like.device, dtype=schedule_dtype(like.device))
    return (u * n).long().clamp_max(n - 1)


def draw_rows(data: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Draw rows of the data (N, *D) with replacement, (*shape, *D)."""
    return data[draw_index(len(data), shape, generator, data)]


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of rows (K, samples) and their standard errors, each (K,)."""
    return values.mean(1), values.std(1) / math.sqrt(values.shape[1])
