"""Variance-preserving processes defined by their log-SNR, fixed or learned."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from typing_extensions import override

from .._checks import check_count, check_flag, check_interval, check_times
from .._schedules import exact
from ..interfaces import ForwardSDE


class _GammaSDE(ForwardSDE):
    r"""A process with alpha^2 + sigma^2 = 1 and log-SNR -gamma(t), gamma finite at t = 0.

    .. math::
        \sigma^2 = \mathrm{sigmoid}(\gamma), \quad \alpha^2 = \mathrm{sigmoid}(-\gamma), \quad
        f = -\tfrac12 \sigma^2 \gamma', \quad g^2 = \sigma^2 \gamma'.
    """

    T = 1.0
    t_min = 1e-10  # effectively 0; a geometric grid cannot end at 0
    prior_std = 1.0

    @abc.abstractmethod
    def _gamma(self, t: Tensor) -> Tensor:
        """Return gamma(t), (B,), in the dtype of t."""

    @abc.abstractmethod
    def _slope(self, t: Tensor) -> Tensor:
        """Return gamma'(t), (B,)."""

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(t, self.T)
        gamma = self._gamma(exact(t))
        alpha, sigma = (torch.sqrt(torch.sigmoid(x)) for x in (-gamma, gamma))
        return alpha.to(t.dtype), sigma.to(t.dtype)

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return -self._gamma(exact(t)).to(t.dtype)

    def _variance_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(t, self.T)
        at = exact(t)
        return torch.sigmoid(self._gamma(at)), self._slope(at)

    @override
    def drift_coefficient(self, t: Tensor) -> Tensor:
        variance, slope = self._variance_and_slope(t)
        return (-0.5 * variance * slope).to(t.dtype)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        variance, slope = self._variance_and_slope(t)
        return torch.sqrt(variance * slope).to(t.dtype)


@dataclass(frozen=True)
class LogSNRSDE(_GammaSDE):
    r"""The variance-preserving SDE whose log-SNR is linear in time.

    .. math::
        \gamma(t) = \gamma_{min} + (\gamma_{max} - \gamma_{min}) t, \quad
        \sigma^2 = \mathrm{sigmoid}(\gamma), \quad \alpha^2 = \mathrm{sigmoid}(-\gamma).

    The noise does not vanish at t = 0, where a decoder gives the likelihood of discrete data
    (`diffusionkit.likelihood`). Expects data in [-1, 1]. The prior is N(0, I).

    Args:
        gamma_min: minus the log-SNR at t = 0.
        gamma_max: minus the log-SNR at t = 1.

    Raises:
        ValueError: if gamma_min >= gamma_max or an end point is not finite.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630.

    >>> import torch
    >>> from diffusionkit import LogSNRSDE
    >>> LogSNRSDE().log_snr(torch.tensor([0.0, 0.5, 1.0]))
    tensor([13.3000,  4.1500, -5.0000])
    """

    gamma_min: float = -13.3
    gamma_max: float = 5.0

    def __post_init__(self) -> None:
        check_interval(self.gamma_min, self.gamma_max, "gamma_min", "gamma_max")

    @override
    def _gamma(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    @override
    def _slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.gamma_max - self.gamma_min)

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr - self.gamma_min) / (self.gamma_max - self.gamma_min)).clamp(0.0, 1.0)


class LearnedSDE(_GammaSDE, nn.Module):
    r"""The variance-preserving SDE whose log-SNR is a learned monotone function of time.

    .. math::
        \gamma(t) = \gamma_{min} + (\gamma_{max} - \gamma_{min}) \frac{m(t) - m(0)}{m(1) - m(0)},
        \quad m(t) = t + \frac1H \sum_j c_j\, \mathrm{sigmoid}(k_j (t - u_j)), \quad c, k > 0.

    In continuous time the expected variational bound depends on the end points alone, if the
    network is conditioned on the noise level (`LogSigmaLabel`) and not on the time; the interior
    affects the variance of its estimate. `diffusionkit.likelihood.variance_minimizing_backward`
    trains each for its objective. gamma is initialized nearly linear and computed in float64.

    As a submodule of a score model it adds its parameters to the model's. They lie outside a
    network in DistributedDataParallel, so you must average their gradients.

    Args:
        gamma_min: minus the log-SNR at t = 0.
        gamma_max: minus the log-SNR at t = 1.
        hidden: the number H of sigmoids.
        learn_ends: whether the end points are learned as well; otherwise they are fixed.

    Raises:
        ValueError: if gamma_min >= gamma_max, an end point is not finite or hidden < 1.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630 (appendix H).

    >>> import torch
    >>> from diffusionkit import LearnedSDE
    >>> sde = LearnedSDE()
    >>> sde.log_snr(torch.tensor([0.0, 1.0])).detach()
    tensor([13.3000, -5.0000])
    """

    def __init__(
        self,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        hidden: int = 1024,
        *,
        learn_ends: bool = False,
    ) -> None:
        """Spread the sigmoids slightly beyond [0, 1], so that gamma starts nearly linear."""
        super().__init__()
        check_interval(gamma_min, gamma_max, "gamma_min", "gamma_max")
        check_count(hidden, "hidden", most=2**24)
        check_flag(learn_ends, "learn_ends")
        self.config = {
            "gamma_min": gamma_min,
            "gamma_max": gamma_max,
            "hidden": hidden,
            "learn_ends": learn_ends,
        }
        spread = (torch.arange(hidden) + 0.5) / hidden
        self.centers = nn.Parameter(1.5 * spread - 0.25)
        self.raw_steepness = nn.Parameter(torch.full((hidden,), 16.0))  # k = softplus of it
        self.raw_heights = nn.Parameter(torch.full((hidden,), math.log(math.e - 1)))  # c = 1
        self.learn_ends = learn_ends
        self._ends = (gamma_min, math.log(gamma_max - gamma_min))
        if learn_ends:
            self.ends = nn.Parameter(torch.tensor(self._ends))  # gamma_min and the log of the span

    @override
    def extra_repr(self) -> str:
        start, span = (float(torch.as_tensor(end).detach()) for end in self._range())
        return (
            f"gamma_min={start:g}, gamma_max={start + span:g}, hidden={len(self.centers)}, "
            f"learn_ends={self.learn_ends}"
        )

    def interior(self) -> list[nn.Parameter]:
        """Return the parameters that shape gamma between its end points, which stay fixed."""
        return [self.centers, self.raw_steepness, self.raw_heights]

    def _range(self) -> tuple[Tensor | float, Tensor | float]:
        """Return gamma(0) and gamma(1) - gamma(0)."""
        if not self.learn_ends:
            return self._ends[0], math.exp(self._ends[1])
        start, log_span = exact(self.ends)
        return start, torch.exp(log_span)

    def _sigmoids(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sigmoids (B, H), their steepness k (H,) and their heights c / H (H,)."""
        centers, steepness, heights = (exact(p) for p in self.interior())
        k = softplus(steepness)
        return torch.sigmoid(k * (t.unsqueeze(1) - centers)), k, softplus(heights) / len(k)

    def _rise(self, t: Tensor) -> Tensor:
        """Return m(t), (B,)."""
        s, _, heights = self._sigmoids(t)
        return t + (heights * s).sum(1)

    @override
    def _gamma(self, t: Tensor) -> Tensor:
        start, span = self._range()
        low, high = self._rise(torch.arange(2, dtype=t.dtype, device=t.device))
        gamma: Tensor = start + span * ((self._rise(t) - low) / (high - low))
        return gamma

    @override
    def _slope(self, t: Tensor) -> Tensor:
        low, high = self._rise(torch.arange(2, dtype=t.dtype, device=t.device))
        s, k, heights = self._sigmoids(t)
        rise = 1 + (heights * k * s * (1 - s)).sum(1)
        slope: Tensor = self._range()[1] * (rise / (high - low))
        return slope
