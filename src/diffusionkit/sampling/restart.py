"""Restart sampling: intervals of noise that are sampled again on levels of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_part, check_positive
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE
from .grids import MOST_STEPS, karras_times, resolve_grid


@dataclass(frozen=True)
class Restart:
    r"""Sampling an interval of noise again: forward by noise, back by the predictor, K times.

    Where a run arrives at s_min, the forward process takes the state back to s_max,

    .. math::
        x_t = \frac{\alpha_t}{\alpha_s} x_s + s_{noise}\, \mathrm{std}\, z, \quad
        \frac{\sigma_s}{\alpha_s} = s_{min}, \quad \frac{\sigma_t}{\alpha_t} = s_{max},

    and the predictor solves back to s_min on separate levels, `repeats` times; then the run
    continues. The new noise contracts the errors made above s_max, as in a stochastic sampler, and
    the steps stay those of a deterministic one. It is meant for many evaluations, where the
    network's errors dominate; with the exact score of a mixture, a plain `Heun` run at equal cost
    was better.

    Passed as `time_travel` of a `PCSampler`, one interval or a sequence of them. An interval with
    a predictor of n evaluations a step takes n * repeats * steps more. s_min is moved to the
    nearest level of the sampler's grid. In `PCSampler.edit`, intervals that reach above the start
    are omitted. Multistep predictors need two steps at least; `Heun`'s churn is divided by the
    number of steps of the interval.

    Args:
        s_min: the lower end of the interval, a ratio sigma / alpha.
        s_max: the upper end.
        steps: the number of steps down the interval. The released code counts levels, one more.
        repeats: K, how often the interval is sampled again.
        rho: the exponent of the levels, as of `KarrasGrid`.
        s_noise: the standard deviation of the noise; slightly above 1 compensates for the detail
            that a network's denoising loses.

    Raises:
        ValueError: unless 0 < s_min < s_max, steps and repeats are at least 1, and rho and s_noise
            are positive.
        TypeError: if an argument has the wrong type.

    Source: Xu, Deng, Cheng, Tian, Liu and Jaakkola, Restart Sampling for Improving Generative
    Processes, 2023, arXiv 2306.14878 (algorithm 2).

    >>> import torch
    >>> from diffusionkit import (
    ...     EDMSDE, GaussianMixtureModel, Heun, KarrasGrid, PCSampler, Restart
    ... )
    >>> model = GaussianMixtureModel(EDMSDE(), [[-0.5], [0.5]], [0.1, 0.1])
    >>> sampler = PCSampler(
    ...     model, Heun(), grid=KarrasGrid(to_zero=True), steps=18,
    ...     time_travel=Restart(0.06, 0.3, steps=2, repeats=4),
    ... )
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    51
    """

    s_min: float
    s_max: float
    steps: int = 5
    repeats: int = 1
    rho: float = 7.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("s_min", "s_max", "rho", "s_noise"):
            check_positive(getattr(self, name), name)
        if not self.s_min < self.s_max:
            raise ValueError(f"s_max: expected more than s_min = {self.s_min}, got {self.s_max}")
        check_count(self.steps, "steps", most=MOST_STEPS)
        check_count(self.repeats, "repeats", most=MOST_STEPS)

    def place(self, sde: ForwardSDE, grid: Tensor) -> tuple[int, Tensor]:
        """Return where a run on a grid is restarted, and the levels of the restart.

        Args:
            sde: the forward process.
            grid: the decreasing times (N + 1,) of the run.

        Returns:
            The index of s_min in the grid, and decreasing times (steps + 1,) from s_max to there.

        Raises:
            ValueError: if the grid is not decreasing within [0, T], or the interval is not within
                its noise.
        """
        check_part(sde, ForwardSDE, "sde")
        check_part(grid, Tensor, "grid")
        here = home(sde)
        grid = resolve_grid(grid, sde, 1).to(here, schedule_dtype(here))
        alpha, sigma = (c.detach() for c in sde.marginal(grid))
        ratio = torch.where(sigma > 0, sigma / alpha, torch.inf)
        index = int((ratio - self.s_min).abs().argmin())
        low, high = float(ratio[index]), float(ratio[0])
        if not low < self.s_max <= high * (1 + 1e-9):
            raise ValueError(
                "s_max: expected a ratio sigma / alpha above the grid's level at s_min, "
                f"{low:.4g}, and at most that at its beginning, {high:.4g}, got {self.s_max}"
            )
        u = torch.linspace(0, 1, self.steps + 1, dtype=grid.dtype, device=here)
        upper = sde.time_at_log_snr(-2 * torch.log(grid.new_tensor([self.s_max])))
        ends = torch.cat([upper.detach().clamp(max=float(grid[0])), grid[index : index + 1]])
        times = karras_times(sde, ends, u, self.rho).detach()
        times[0], times[-1] = ends
        return index, times.cpu().double()


def check_restarts(value: Any) -> tuple[Restart, ...]:
    """Return one restart or a sequence of them as a tuple, or raise."""
    found = value if isinstance(value, (list, tuple)) else (value,)
    if not found:
        raise ValueError("time_travel: expected one restart or more, got none; pass None for none")
    for part in found:
        if not isinstance(part, Restart):
            raise TypeError(
                "time_travel: expected a TimeTravel, a Restart or a sequence of Restart, "
                f"got {type(part).__name__}"
            )
    return tuple(found)
