"""Grids of times, from T down to where a sampler stops.

A grid is any callable (sde, steps) -> times (steps + 1,), or a tensor of times.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_known,
    check_part,
    check_positive,
    check_t_end,
)
from .._log_snr import LARGEST_RATIO, with_signal
from .._schedules import home, schedule_dtype, shifted
from ..interfaces import ForwardSDE
from ..sde import Chain

MOST_STEPS = 2**20  # a grid of more is a mistake; its values are kept as floats
Grid: TypeAlias = Callable[[ForwardSDE, int], Tensor]


@dataclass(frozen=True)
class _SpacedGrid(abc.ABC):
    """Times spaced by a rule between T and t_end.

    Args:
        t_end: the last time, the SDE's t_stop by default.
        to_zero: whether the last step goes from t_end to 0; t_end is then the last time but one.
    """

    _: KW_ONLY
    t_end: float | None = None
    to_zero: bool = False

    def __post_init__(self) -> None:
        if self.t_end is not None:
            check_t_end(self.t_end)
        check_flag(self.to_zero, "to_zero")

    @abc.abstractmethod
    def _spaced(self, sde: ForwardSDE, ends: Tensor, u: Tensor) -> Tensor:
        """Return the times at fractions u (n,) of the range between the two ends (2,)."""

    def __call__(self, sde: ForwardSDE, steps: int) -> Tensor:
        """Return decreasing times (steps + 1,) in float64, where the process's device has it.

        Raises:
            ValueError: unless steps >= 1 and 0 <= t_end < T, where the rule must be finite.
        """
        check_part(sde, ForwardSDE, "sde")
        check_count(steps, "steps", least=2 if self.to_zero else 1, most=MOST_STEPS)
        t_end = sde.t_stop if self.t_end is None else self.t_end
        if not 0.0 <= t_end < sde.T:
            raise ValueError(f"t_end: expected a time in [0, T) = [0, {sde.T:g}), got {t_end}")
        here = home(sde)
        ends = torch.tensor([sde.T, t_end], dtype=schedule_dtype(here), device=here)
        points = steps + (0 if self.to_zero else 1)
        u = torch.linspace(0, 1, points, dtype=ends.dtype, device=ends.device)
        times = self._spaced(sde, ends, u).detach()
        times[0], times[-1] = ends  # exact, unlike the result of an inverse function
        if not bool((times.diff() < 0).all()):
            name = type(self).__name__
            alpha, sigma = sde.marginal(ends)
            if float(alpha[0]) == 0.0 and float(sigma[1]) > 0.0:
                raise ValueError(
                    f"t_end: expected sigma / alpha < {LARGEST_RATIO:g} for {name}, which spaces "
                    f"times from there where alpha(T) = 0, got {t_end}; use UniformGrid"
                )
            raise ValueError(f"t_end: expected a time with noise for {name}, got {t_end}")
        return torch.cat([times, times.new_zeros(1)]) if self.to_zero else times


@dataclass(frozen=True)
class UniformGrid(_SpacedGrid):
    """Equally spaced times, the grid of the papers.

    Args:
        t_end: the last time, the SDE's t_stop by default.
        to_zero: whether the last step goes from t_end to 0.

    >>> from diffusionkit import VPSDE, UniformGrid
    >>> UniformGrid(t_end=0.0)(VPSDE(), 4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    @override
    def _spaced(self, sde: ForwardSDE, ends: Tensor, u: Tensor) -> Tensor:
        return ends[0] + u * (ends[1] - ends[0])


@dataclass(frozen=True)
class _ProcessGrid(_SpacedGrid):
    """The default: times spaced by the rule of the process, uniform for most processes."""

    @override
    def _spaced(self, sde: ForwardSDE, ends: Tensor, u: Tensor) -> Tensor:
        root = ends ** (1 / sde.grid_rho)
        return (root[0] + u * (root[1] - root[0])) ** sde.grid_rho


@dataclass(frozen=True)
class QuadraticGrid(_SpacedGrid):
    """Times with equally spaced square roots: shorter steps near the data.

    Args:
        t_end: the last time, the SDE's t_stop by default.
        to_zero: whether the last step goes from t_end to 0.

    Source: Song et al., Denoising Diffusion Implicit Models, 2021, arXiv 2010.02502.
    """

    @override
    def _spaced(self, sde: ForwardSDE, ends: Tensor, u: Tensor) -> Tensor:
        root = ends.sqrt()
        return (root[0] + u * (root[1] - root[0])).square()


@dataclass(frozen=True)
class LogSNRGrid(_SpacedGrid):
    """Times equally spaced in log-SNR, the natural time of few-step solvers.

    Where alpha(T) = 0 the first time is T, and the others are spaced from sigma / alpha = 160.

    Args:
        t_end: the last time, the SDE's t_stop by default.
        to_zero: whether the last step goes from t_end to 0.

    Source: Lu et al., DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in
    Around 10 Steps, 2022, arXiv 2206.00927.
    """

    @override
    def _spaced(self, sde: ForwardSDE, ends: Tensor, u: Tensor) -> Tensor:
        l = with_signal(sde.log_snr(ends))
        return sde.time_at_log_snr(l[0] + u * (l[1] - l[0]))


@dataclass(frozen=True)
class KarrasGrid(_SpacedGrid):
    r"""EDM's grid: s^(1/rho) equally spaced, with s = sigma / alpha.

    `KarrasGrid(to_zero=True)` with an `EDMSDE` is the paper's grid, N noise levels and zero. Where
    alpha(T) = 0 the first time is T, and the others are spaced from s = 160.

    Args:
        rho: the exponent; 1 is uniform in s, larger values take shorter steps near the data.
        t_end: the last time, the SDE's t_stop by default.
        to_zero: whether the last step goes from t_end to 0.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (equation 5).

    >>> from diffusionkit import EDMSDE, KarrasGrid
    >>> grid = KarrasGrid(to_zero=True)
    >>> [round(s, 3) for s in grid(EDMSDE(), 4).tolist()]
    [80.0, 9.723, 0.47, 0.002, 0.0]
    """

    rho: float = 7.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.rho, "rho")

    @override
    def _spaced(self, sde: ForwardSDE, ends: Tensor, u: Tensor) -> Tensor:
        return karras_times(sde, ends, u, self.rho)


def karras_times(sde: ForwardSDE, ends: Tensor, u: Tensor, rho: float) -> Tensor:
    """Return times at fractions u (n,) between two ends (2,), equally spaced in s^(1/rho)."""
    root = torch.exp(-0.5 / rho * with_signal(sde.log_snr(ends)))
    return sde.time_at_log_snr(-2 * rho * torch.log(root[0] + u * (root[1] - root[0])))


# Ratios sigma / alpha of ten steps, from the authors' page.
_ALIGNED = {
    "stable_diffusion": (
        14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029,
    ),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip


@dataclass(frozen=True)
class AYSGrid(_SpacedGrid):
    """The levels of Align Your Steps, stretched to the range of the process.

    The published ratios sigma / alpha are interpolated in their logarithm for another number of
    steps, as published, and then scaled in it so that they cover the range from T to t_end. Steps
    are short where images form, around ratio 1, and long at both ends.

    Args:
        levels: the model that the levels were optimized for: "stable_diffusion", "sdxl" or "svd".
        t_end: the last time, the SDE's t_stop by default.
        to_zero: whether the last step goes from t_end to 0.

    Raises:
        ValueError: if levels is none of them.

    Source: Sabour, Fidler and Kreis, Align Your Steps: Optimizing Sampling Schedules in Diffusion
    Models, 2024, arXiv 2404.14507.

    >>> from diffusionkit import EDMSDE, AYSGrid
    >>> grid = AYSGrid()(EDMSDE(sigma_min=0.029, sigma_max=14.615), 10)
    >>> [round(s, 3) for s in grid.tolist()[:6]]
    [14.615, 6.475, 3.861, 2.697, 1.886, 1.396]
    """

    levels: str = "stable_diffusion"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("levels", self.levels, tuple(_ALIGNED))

    @override
    def _spaced(self, sde: ForwardSDE, ends: Tensor, u: Tensor) -> Tensor:
        table = torch.log(ends.new_tensor(_ALIGNED[self.levels]))
        share = (table[0] - table) / (table[0] - table[-1])
        place = u * (len(share) - 1)
        below = place.floor().long().clamp(max=len(share) - 2)
        share = torch.lerp(share[below], share[below + 1], place - below)
        l = with_signal(sde.log_snr(ends))
        return sde.time_at_log_snr(l[0] + share * (l[1] - l[0]))


@dataclass(frozen=True)
class ChainGrid:
    """Evenly strided noise levels of a discrete chain, as times of any process.

    For the chain itself these are improved DDPM's strided steps; with the cosine chain they are
    EDM's iDDPM discretization. Levels outside the process's range from T to t_stop are omitted.

    Args:
        chain: the chain.
        to_zero: whether the last step goes from the chain's last level to 0.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672; Karras et al., EDM, 2022,
    arXiv 2206.00364 (table 1).

    >>> from diffusionkit import EDMSDE, ChainGrid, DDPMChain
    >>> grid = ChainGrid(DDPMChain.cosine(1000), to_zero=True)
    >>> [round(s, 4) for s in grid(EDMSDE(sigma_max=81.0), 4).tolist()]
    [80.2037, 1.7195, 0.5834, 0.0064, 0.0]
    """

    chain: Chain
    to_zero: bool = False

    def __post_init__(self) -> None:
        check_part(self.chain, Chain, "chain")
        check_flag(self.to_zero, "to_zero")

    def __call__(self, sde: ForwardSDE, steps: int) -> Tensor:
        """Return decreasing times (steps + 1,) in float64, where the process's device has it.

        Raises:
            ValueError: unless steps >= 1 and the process has enough of the chain's levels.
        """
        check_part(sde, ForwardSDE, "sde")
        check_count(steps, "steps", least=2 if self.to_zero else 1, most=MOST_STEPS)
        here = home(sde)
        ends = torch.tensor([sde.T, sde.t_stop], dtype=schedule_dtype(here), device=here)
        low, high = sde.log_snr(ends).detach()
        k = torch.arange(self.chain.steps, 0, -1, dtype=ends.dtype, device=ends.device)
        levels = self.chain.log_snr(k / self.chain.steps)
        levels = levels[(levels >= low) & (levels <= high)]
        points = steps + (0 if self.to_zero else 1)
        if len(levels) < points:
            raise ValueError(
                f"steps: expected at most {len(levels) - points + steps} with the {len(levels)} "
                f"levels of the chain that are within the process's range, got {steps}"
            )
        index = (torch.arange(points) * ((len(levels) - 1) / (points - 1))).round().long()
        times = sde.time_at_log_snr(levels[index.to(levels.device)]).detach()
        return torch.cat([times, times.new_zeros(1)]) if self.to_zero else times


@dataclass(frozen=True)
class ShiftedGrid:
    r"""The times of another grid, moved towards the noise: the shift for a higher resolution.

    .. math::
        t' = \frac{m t}{1 + (m - 1) t}

    in units of T. On a `FlowMatchingSDE` it multiplies sigma / alpha by m. The last time is shifted
    too, except 0: use `UniformGrid(to_zero=True)` to end at 0.

    Args:
        shift: m; 1 is no shift, above 1 more steps are taken at high noise.
        grid: the grid whose times are shifted, a callable (sde, steps) -> times; `UniformGrid` by
            default.

    Raises:
        ValueError: unless shift is finite and positive.
        TypeError: if grid is not callable.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis,
    2024, arXiv 2403.03206 (section 5.3.2).

    >>> from diffusionkit import FlowMatchingSDE, ShiftedGrid, UniformGrid
    >>> grid = ShiftedGrid(3.0, UniformGrid(t_end=0.0))
    >>> [round(t, 2) for t in grid(FlowMatchingSDE(), 4).tolist()]
    [1.0, 0.9, 0.75, 0.5, 0.0]
    """

    shift: float
    grid: Grid = field(default_factory=UniformGrid)

    def __post_init__(self) -> None:
        check_positive(self.shift, "shift")
        check_callable(self.grid, "grid")

    def __call__(self, sde: ForwardSDE, steps: int) -> Tensor:
        """Return decreasing times (steps + 1,) in float64."""
        check_part(sde, ForwardSDE, "sde")
        return shifted(resolve_grid(self.grid, sde, steps), self.shift, sde.T)


def resolve_grid(grid: Grid | Tensor | None, sde: ForwardSDE, steps: int) -> Tensor:
    """Return the decreasing times (N + 1,) of a grid, a tensor of times or the default.

    Raises:
        ValueError: unless the times are finite, at least two, strictly decreasing, and within
            [0, T].
        TypeError: if the grid is neither callable nor a tensor.
    """
    if isinstance(grid, Tensor):
        check_known(grid, "grid")
        times = grid.detach()
    elif grid is None or callable(grid):
        times = (_ProcessGrid() if grid is None else grid)(sde, steps)
    else:
        raise TypeError(f"grid: expected a callable or a tensor, got {type(grid).__name__}")
    check_part(times, Tensor, "grid")
    times = times.cpu().double()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"grid: expected at least two times (N + 1,), got {tuple(times.shape)}")
    if not bool((times.diff() < 0).all()):  # a NaN fails too
        raise ValueError(f"grid: expected strictly decreasing times, got {times.tolist()[:6]}")
    if times[-1] < 0 or times[0] > sde.T * (1 + 1e-6) or not math.isfinite(float(times[0])):
        raise ValueError(
            f"grid: expected times within [0, T] = [0, {sde.T:g}], "
            f"got {float(times[0]):g} to {float(times[-1]):g}"
        )
    return times
