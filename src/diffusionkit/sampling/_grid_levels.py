"""Levenberg-Marquardt search for the levels of a grid, on draws with known results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._log_snr import with_signal
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE
from .pc import PCSampler

_NUDGE = 0.03  # of a logarithm of a step's length, for derivatives
_LONGEST = 0.7  # the largest change of such a logarithm in an iteration
_ENOUGH = 1e-3  # the relative gain below which the search ends, with new derivatives
_STALE = 0.03  # the relative gain below which derivatives are taken anew
_TRIES = 8  # of shorter and shorter changes, for one that is a gain


@dataclass(frozen=True)
class Levels:
    """Grids with the first time and kind of end of a given one, by logarithms of their steps.

    The steps are those of l = log(alpha / sigma), of which any positive lengths are a grid.
    """

    sde: ForwardSDE
    start: Tensor

    @property
    def to_zero(self) -> bool:
        return not float(self.start[-1]) > 0.0

    def _levels(self) -> Tensor:
        """Return l at the times of the start that have noise."""
        here = home(self.sde)
        times = self.start[:-1] if self.to_zero else self.start
        log_snr = self.sde.log_snr(times.to(here, schedule_dtype(here)))
        return 0.5 * with_signal(log_snr).detach().cpu().double()

    def parameters(self) -> Tensor:
        """Return the logarithms (n,) of the steps of the start."""
        return torch.log(self._levels().diff())

    def times(self, parameters: Tensor) -> Tensor | None:
        """Return the times of logarithms (n,) of steps, or None if they leave the process."""
        levels = self._levels()[0] + torch.exp(parameters).cumsum(0)
        here = home(self.sde)
        inner = self.sde.time_at_log_snr(2 * levels.to(here, schedule_dtype(here)))
        times = torch.cat([self.start[:1], inner.detach().cpu().double()])
        if not bool((times.diff() < 0).all()) or float(times[-1]) < self.sde.t_min:
            return None
        return torch.cat([times, times.new_zeros(1)]) if self.to_zero else times


@dataclass(frozen=True)
class Draws:
    """Draws from the prior, and the samples to which the probability flow takes them.

    Args:
        sampler: the sampler, whose grid is set in every run.
        batches: states at T and their conditions.
        target: the ends of the flow from them all, (n, *D).
    """

    sampler: PCSampler
    batches: Sequence[tuple[Tensor, Mapping[str, Any]]]
    target: Tensor

    def residual(self, times: Tensor, seed: int = 0) -> Tensor:
        """Return the differences of samples from the target (n, d)."""
        self.sampler.grid = times  # a new sampler would compute a solver's coefficients twice
        noise = torch.Generator().manual_seed(seed)
        found = [self.sampler(x, generator=noise, **cond) for x, cond in self.batches]
        return (torch.cat(found) - self.target).flatten(1)

    def error(self, times: Tensor) -> float:
        """Return the mean square error per number."""
        return mean_square(self.residual(times))


def mean_square(residual: Tensor) -> float:
    """Return the mean of squares."""
    return float(residual.double().square().mean())


def search(levels: Levels, draws: Draws) -> Iterator[Tensor]:
    """Yield grids of decreasing error on draws, by the Levenberg-Marquardt method.

    Derivatives are differences, one run for each level. Between two sets of them they are corrected
    by the secants of the changes made (Broyden's update), at no cost.
    """
    p, damping = levels.parameters(), 1e-2
    if not bool(torch.isfinite(p).all()):
        return  # noise levels that cannot be distinguished from none
    residual = draws.residual(levels.start)
    error, slopes, new = mean_square(residual), _slopes(levels, draws, p, residual), True
    while True:
        normal = (slopes @ slopes.T).cpu().double()
        right = (slopes @ residual.flatten()).cpu().double()
        scale = normal.diagonal() + 1e-12 * normal.diagonal().max() + 1e-300
        times, gain = None, 0.0
        for _ in range(_TRIES if new else 2):
            change = -torch.linalg.solve(normal + damping * torch.diag(scale), right)
            change = change.clamp(-_LONGEST, _LONGEST)
            tried = levels.times(p + change)
            if tried is not None:
                found = draws.residual(tried)
                if (now := mean_square(found)) < error:
                    times, gain = tried, 1 - now / error
                    break
            damping *= 4
        if times is not None:
            along = change.to(slopes)
            missed = (found - residual).flatten() - along @ slopes
            slopes += torch.outer(along / along.square().sum(), missed)
            p, residual, error = p + change, found, now
            damping = max(damping / 5, 1e-5)
            yield times
        if gain < (_ENOUGH if new else _STALE):
            if new:
                return
            slopes, new = _slopes(levels, draws, p, residual), True
        else:
            new = False


def _slopes(levels: Levels, draws: Draws, p: Tensor, residual: Tensor) -> Tensor:
    """Return the derivatives (n, ...) of a residual by the logarithms p (n,) of steps."""
    rows = []
    for k in range(len(p)):
        for nudge in (_NUDGE, -_NUDGE):
            moved = p.clone()
            moved[k] += nudge
            near = levels.times(moved)
            if near is not None:
                rows.append((draws.residual(near) - residual).flatten() / nudge)
                break
        else:
            rows.append(torch.zeros_like(residual).flatten())
    return torch.stack(rows)
