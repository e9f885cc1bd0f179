"""Overlapping windows of a field: their places, coordinates and blending weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from .._schedules import schedule_dtype

# What selects a window from fields (B, C, *field).
Place: TypeAlias = tuple[slice | Tensor, ...]


@dataclass(frozen=True, eq=False)
class AxisWindows:
    """The windows along one axis of a field.

    Args:
        size: the number of points of the field.
        patch: the number of points of a window.
        starts: the first points of the windows.
        weights: the weights (windows, patch) of their points, of sum 1 at each point of the field.
    """

    size: int
    patch: int
    starts: Sequence[int]
    weights: Tensor

    def part(self, start: int) -> slice | Tensor:
        """Return what selects the points of a window: a slice, or indices if it wraps around."""
        if start + self.patch <= self.size:
            return slice(start, start + self.patch)
        points = start + torch.arange(self.patch, device=self.weights.device)
        return points % self.size


def starts(size: int, patch: int, stride: int, *, periodic: bool, offset: int) -> list[int]:
    """Return the first points of windows at equal distances; the last is moved inwards.

    Args:
        size: the number of points of the field.
        patch: the number of points of a window.
        stride: the distance of the windows.
        periodic: whether windows wrap around the end.
        offset: the first point of one of the windows, from 0 to stride - 1.
    """
    if periodic:
        return [(start + offset) % size for start in range(0, size, stride)]
    return sorted({0, size - patch, *range(offset, size - patch, stride)})


def axis_windows(
    size: int,
    patch: int,
    overlap: int,
    margin: int,
    *,
    smooth: bool,
    periodic: bool,
    offset: int,
    like: Tensor,
) -> AxisWindows:
    r"""Return the windows along an axis.

    A point at distance i + 1/2 from an end of its window has the weight 0 for i < margin and

    .. math::
        \sin^2(\pi (i - \mathrm{margin} + 1/2) / (2 L)), \quad L = \mathrm{overlap} - 2\,
        \mathrm{margin}

    for the following L points if smooth, 1 otherwise; ends at an edge of the field are like the
    inside. The weights are divided by their sum over the windows.
    """
    first = starts(size, patch, patch - overlap, periodic=periodic, offset=offset)
    dtype = schedule_dtype(like.device)
    i = torch.arange(patch, device=like.device)
    ramp = (i >= margin).to(dtype)
    length = overlap - 2 * margin
    if smooth and length > 0:
        phase = (i - margin + 0.5).to(dtype).clamp(0, length) / length
        ramp = torch.sin(0.5 * math.pi * phase) ** 2
    at = torch.tensor(first, device=like.device)
    begins, ends = ramp.expand(len(first), -1), ramp.flip(0).expand(len(first), -1)
    if not periodic:
        begins = torch.where((at == 0)[:, None], 1.0, begins)
        ends = torch.where((at == size - patch)[:, None], 1.0, ends)
    points = (at[:, None] + i) % size
    raw = begins * ends
    total = raw.new_zeros(size).index_add(0, points.flatten(), raw.flatten())
    weights = (raw / total[points]).to(torch.promote_types(like.dtype, torch.float32))
    return AxisWindows(size, patch, first, weights)


@dataclass(frozen=True, eq=False)
class Window:
    """A window of the fields of consecutive samples.

    Args:
        samples: the indices of the samples in the batch.
        start: the first point along each axis.
        index: the index of the window along each axis.
        axes: the windows along each axis.
    """

    samples: range
    start: tuple[int, ...]
    index: tuple[int, ...]
    axes: Sequence[AxisWindows]

    @property
    def place(self) -> Place:
        """Return what selects the window from fields (B, C, *field)."""
        samples = slice(self.samples.start, self.samples.stop)
        parts = [axis.part(s) for axis, s in zip(self.axes, self.start, strict=True)]
        if all(isinstance(part, slice) for part in parts):
            return samples, slice(None), *parts
        last = len(parts) - 1
        points = [
            torch.arange(part.start, part.stop, device=axis.weights.device)
            if isinstance(part, slice)
            else part
            for part, axis in zip(parts, self.axes, strict=True)
        ]
        return samples, slice(None), *(p.view(-1, *(1,) * (last - k)) for k, p in enumerate(points))

    @property
    def weights(self) -> Tensor:
        """Return the weights (*patch) of the window's points."""
        last = len(self.axes) - 1
        out: Tensor | float = 1.0
        for k, (axis, i) in enumerate(zip(self.axes, self.index, strict=True)):
            out = out * axis.weights[i].view(-1, *(1,) * (last - k))
        return torch.as_tensor(out)


def windows(
    groups: Sequence[tuple[range, Sequence[AxisWindows]]], batch: int
) -> Iterator[list[Window]]:
    """Yield the windows of all samples, `batch` at a time.

    Args:
        groups: consecutive samples, and the windows along each axis of their fields.
        batch: how many windows of one sample each a list holds, all in all.
    """
    chunk: list[Window] = []
    room = batch
    for samples, axes in groups:
        for found in product(*(list(enumerate(axis.starts)) for axis in axes)):
            index, start = zip(*found, strict=True)
            first, last = samples.start, samples.stop
            while first < last:
                some = range(first, min(first + room, last))
                chunk.append(Window(some, start, index, axes))
                first, room = some.stop, room - len(some)
                if not room:
                    yield chunk
                    chunk, room = [], batch
    if chunk:
        yield chunk


def coordinates(
    start: Sequence[int], patch: Sequence[int], size: Sequence[int], like: Tensor
) -> Tensor:
    """Return the coordinates (d, *patch) of a window's points, (2 i + 1) / size - 1 for point i.

    Args:
        start: the first point along each axis.
        patch: the size of the window.
        size: the size of the field.
        like: a tensor, for the dtype and device.
    """
    axes = [
        (2 * ((s + torch.arange(p, device=like.device)) % n) + 1).to(like.dtype) / n - 1
        for s, p, n in zip(start, patch, size, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))
