"""Processes given by a table: one entry for each step, and what lies between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_times, check_transition
from .._schedules import schedule_dtype
from ..interfaces import ForwardSDE
from ._subsequence import subsequence


class Chain(ForwardSDE):
    """A process on [0, 1] through N steps: step i, counted from 0, sits at t = (i + 1) / N.

    What the steps add up is tabulated, its increments exactly, so that transitions keep every
    digit. Between two steps it grows linearly. At t = 0 are the data.

    Attributes:
        steps: the number N of steps.
    """

    def __init__(self, increments: Tensor) -> None:
        """Add up the increments of the steps (N,), all positive; the last may be infinite."""
        self.steps = len(increments)
        self._increments = increments
        self._sums = torch.cat([increments.new_zeros(1), increments.cumsum(0)])

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """The time of the first step."""
        return 1 / self.steps

    def time(self, step: Tensor | Sequence[int] | int) -> Tensor:
        """Return the times (i + 1) / N of steps i, of the same shape, in float64.

        Raises:
            TypeError: if the steps are not integers.
            ValueError: if one is outside 0 ... N - 1.
        """
        i = torch.as_tensor(step)
        if i.is_floating_point() or i.is_complex() or i.dtype == torch.bool:
            raise TypeError(f"step: expected integers, got {i.dtype}")
        if i.numel() and not (int(i.min()) >= 0 and int(i.max()) < self.steps):
            raise ValueError(
                f"step: expected integers 0 ... {self.steps - 1}, "
                f"got {int(i.min())} to {int(i.max())}"
            )
        return (i + 1).to(schedule_dtype(i.device)) / self.steps

    def step(self, t: Tensor) -> Tensor:
        """Return the steps (B,), int64, nearest to times t (B,).

        Raises:
            ValueError: if a time lies outside [0, T], or nearer to the data than to a step.
        """
        check_times(t, self.T)
        i = (t.detach() * self.steps).round().long() - 1
        if i.numel() and int(i.min()) < 0:
            raise ValueError(
                f"t: expected times of steps, from 1/{self.steps} to 1, got {float(t.min()):g}"
            )
        return i

    def subsequence(self, spec: str | int | Sequence[int]) -> list[int]:
        """Return a part of the steps, increasing: those that improved DDPM's code would take.

        Args:
            spec: "ddimN", every k-th step for the smallest k that gives N of them; or how many
                steps to take of each of so many equal sections, evenly spread from the first of
                the section to its last: "250", "10,15,20", 250 or [10, 15, 20].

        Raises:
            ValueError: if there are fewer steps than asked for, or no integer stride gives N.
            TypeError: if spec is of another type.

        Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672.

        >>> from diffusionkit import DDPMChain
        >>> DDPMChain.linear(1000).subsequence("ddim5"), DDPMChain.linear(1000).subsequence(5)
        ([0, 200, 400, 600, 800], [0, 250, 500, 749, 999])
        """
        return subsequence(spec, self.steps)

    def respaced(self, spec: str | int | Sequence[int]) -> Tensor:
        """Return the decreasing times (n,) of a `subsequence`, a grid for samplers.

        >>> from diffusionkit import DDPMChain
        >>> DDPMChain.linear(1000).respaced(3)
        tensor([1.0000, 0.5010, 0.0010], dtype=torch.float64)
        """
        return self.time(self.subsequence(spec)[::-1])

    def _split(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of the step that leads to each time, and how far it is into it."""
        check_times(t, self.T)
        position = t * self.steps
        # A step's own time is met exactly, whatever the rounding of (i + 1) / N times N.
        off = (position.round() - position).detach()
        near = off.abs() <= 2 * self.steps * torch.finfo(t.dtype).eps
        position = position + torch.where(near, off, torch.zeros_like(off))
        below = (position.detach().ceil() - 1).long().clamp(0, self.steps - 1)
        return below, position - below

    def _part(self, step: Tensor, past: Tensor, share: Tensor) -> Tensor:
        """Return what a share of a step adds, from where a share `past` of it is done."""
        return share * self._increments.to(share.device, share.dtype)[step]

    def _sum(self, t: Tensor) -> Tensor:
        """Return what the steps up to times t (B,) have added."""
        below, past = self._split(t)
        sums = self._sums.to(t.device, t.dtype)
        return sums[below] + self._part(below, torch.zeros_like(past), past)

    def _added(self, s: Tensor, t: Tensor) -> Tensor:
        """Return what the steps from s to t add: no difference of two sums where it is small."""
        check_transition(s, t, self.T)
        (first, done), (last, past) = self._split(s), self._split(t)
        sums = self._sums.to(t.device, t.dtype)
        short = self._part(first, done, (t - s) * self.steps)
        rest = self._part(first, done, 1 - done)
        between = (sums[last] - sums[first + 1]) + self._part(last, torch.zeros_like(past), past)
        return torch.where(first == last, short, rest + between)

    def _time_at(self, total: Tensor) -> Tensor:
        """Return the times, within [0, T], by which the steps have added a total."""
        sums = self._sums.to(total.device, total.dtype)
        above = torch.searchsorted(sums, total.detach()).clamp(1, self.steps)
        past = self._share(above - 1, total - sums[above - 1])
        return ((above - 1 + past) / self.steps).clamp(0.0, self.T)

    def _share(self, step: Tensor, part: Tensor) -> Tensor:
        """Return the share of a step that adds a part, from its start."""
        return part / self._increments.to(part.device, part.dtype)[step]
