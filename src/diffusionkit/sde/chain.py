"""The base class of discrete chains: processes defined by a table with one entry per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._batch_times import Drawn, can_carry, validated
from .._checks import as_item, check_times, check_transition
from .._kept import Kept
from .._schedules import schedule_dtype, slack, snapped
from ..interfaces import ForwardSDE
from ._subsequence import subsequence


def at_steps(sde: ForwardSDE, i: Tensor, dtype: torch.dtype, weight: Tensor | None = None) -> Drawn:
    """Return the times (B,) that steps i (B,) of a process end at, with a chain's schedule there.

    Args:
        sde: a process with a number of `steps`.
        i: the steps (B,), from 0.
        dtype: the dtype of the times.
        weight: weights (B,) of the times, None for 1.
    """
    table = sde._at_steps(i.device, dtype) if isinstance(sde, Chain) and can_carry(i) else None
    if table is None:
        steps: int = getattr(sde, "steps")  # noqa: B009 - a chain of another kind
        t = (i + 1).to(schedule_dtype(i.device)) * (sde.T / steps)
        return Drawn(t.to(dtype), weight)
    t, exact, alpha, sigma = (column.index_select(0, i) for column in table)
    exact = validated(exact, sde.T)
    return Drawn(t, weight, exact, (alpha, sigma), i)


class Chain(ForwardSDE):
    """A process on [0, 1] with N steps: step i, counted from 0, ends at t = (i + 1) / N.

    The base class of `DDPMChain`, which accumulates -log(alpha) over its steps, and `SMLDChain`,
    which accumulates sigma^2. In between, the accumulated quantity is linear in t. Transitions
    use the tabulated increments, so no digits are lost. The data are at t = 0.

    Attributes:
        steps: the number N of steps.
        tables: what other parts tabulated for all steps, which do not change.
    """

    def __init__(self, increments: Tensor) -> None:
        """Accumulate the increments of the steps (N,), all positive; the last may be infinite."""
        self.steps = len(increments)
        self.t_min = 1 / self.steps
        self._increments = increments
        self._sums = torch.cat([increments.new_zeros(1), increments.cumsum(0)])
        self._copies: Kept[tuple[Tensor, Tensor]] = Kept()
        self.tables: Kept[Any] = Kept()

    def time(self, step: Tensor | Sequence[int] | int) -> Tensor:
        """Return the times (i + 1) / N of steps i, in the shape of the steps, in float64.

        Raises:
            TypeError: if the steps are not integers.
            ValueError: if a step is outside 0 ... N - 1.
        """
        i = step if isinstance(step, Tensor) else as_item(step, "step")
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
            ValueError: if a time is outside [0, T] or nearer to 0 than to the first step.
        """
        check_times(t, self.T)
        i = (t.detach() * self.steps).round().long() - 1
        if i.numel() and int(i.min()) < 0:
            raise ValueError(
                f"t: expected times of steps, from 1/{self.steps} to 1, got {float(t.min()):g}"
            )
        return i

    def subsequence(self, spec: str | int | Sequence[int]) -> list[int]:
        """Return a subsequence of the steps, increasing, as improved DDPM's code selects it.

        Args:
            spec: "ddimN" for every k-th step, with the smallest k that gives N steps; or the
                number of steps in each of several equal sections, evenly spaced from the first
                step of the section to the last: "250", "10,15,20", 250 or [10, 15, 20].

        Raises:
            ValueError: if a section has fewer steps than requested, or no integer stride gives N.
            TypeError: if spec has another type.

        Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672.

        >>> from diffusionkit import DDPMChain
        >>> chain = DDPMChain.linear(1000)
        >>> chain.subsequence("ddim5"), chain.subsequence(5)
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

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return increments and sums on the device and in the dtype of times.

        They are copied to a device once.
        """
        if like.dtype == self._sums.dtype and like.device == self._sums.device:
            return self._increments, self._sums
        key = like.device, like.dtype
        return self._copies.get(key, lambda: (self._increments.to(*key), self._sums.to(*key)))

    def _at_steps(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """Return the times of all steps in a dtype, and times, alpha and sigma in float64.

        None if the schedule of a subclass is learned.
        """

        def made() -> tuple[Tensor, ...]:
            exactly = schedule_dtype(device)
            times = torch.arange(1, self.steps + 1, device=device).to(exactly)
            times = times * (self.T / self.steps)
            alpha, sigma = self.marginal(times)
            if alpha.requires_grad or sigma.requires_grad:
                return ()
            return times.to(dtype), times, alpha, sigma

        table: tuple[Tensor, ...] = self.tables.get(("times", device, dtype), made)
        return table or None

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step that each time falls in, and the fraction of it completed."""
        check_times(t, self.T)
        position = snapped(t * self.steps, slack(self.steps, t.dtype))
        below = self._below(position)
        return below, position - below

    def _rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the increments of the steps that times (B,) fall in, and the fractions completed.

        Increments jump at the end of a step. It belongs to that step also where a time was in
        float32 before, and so may be a little later.
        """
        check_times(t, self.T)
        position = snapped(t * self.steps, slack(self.steps, t.dtype))
        below = self._below(snapped(position, slack(self.steps, torch.float32)))
        return self._tables(t)[0][below], position - below

    def _below(self, position: Tensor) -> Tensor:
        """Return the steps that positions fall in."""
        return (position.ceil().long() - 1).clamp(0, self.steps - 1)

    def _partial(self, step: Tensor, done: Tensor | None, fraction: Tensor) -> Tensor:
        """Return the increment over a fraction of a step of which `done` is completed, or none."""
        return fraction * self._tables(fraction)[0][step]

    def _sum(self, t: Tensor) -> Tensor:
        """Return the accumulated quantity at times t (B,)."""
        step, done = self._locate(t)
        sums = self._tables(t)[1]
        return sums[step] + self._partial(step, None, done)

    def _increment(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the increment from s to t, without subtracting nearly equal sums."""
        check_transition(s, t, self.T)
        (first, before), (last, done) = self._locate(s), self._locate(t)
        sums = self._tables(t)[1]
        short = self._partial(first, before, (t - s) * self.steps)
        rest = self._partial(first, before, 1 - before)
        final = self._partial(last, None, done)
        between = (sums[last] - sums[first + 1]) + final
        return torch.where(first == last, short, rest + between)

    def _time_of(self, total: Tensor) -> Tensor:
        """Return the times, within [0, T], at which the accumulated quantity is `total`."""
        sums = self._tables(total)[1]
        above = torch.searchsorted(sums, total.detach()).clamp(1, self.steps)
        done = self._fraction(above - 1, total - sums[above - 1])
        return ((above - 1 + done) / self.steps).clamp(0.0, self.T)

    def _fraction(self, step: Tensor, increment: Tensor) -> Tensor:
        """Return the fraction of a step, from its start, that has the given increment."""
        return increment / self._tables(increment)[0][step]
