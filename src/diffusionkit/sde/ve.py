"""The variance-exploding SDE, and its sigma_max for a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import (
    check_count,
    check_finite,
    check_interval,
    check_known,
    check_positive,
    check_state,
    check_t_min,
    check_times,
    check_transition,
)
from .._ones import ones_like
from ..interfaces import ForwardSDE


@dataclass(frozen=True)
class VESDE(ForwardSDE):
    r"""The variance-exploding SDE, the continuous limit of SMLD (NCSN).

    .. math::
        \alpha = 1, \quad \sigma(t) = \sigma_{min} (\sigma_{max} / \sigma_{min})^t, \quad
        g = \sigma \sqrt{2 \ln(\sigma_{max} / \sigma_{min})}, \quad t \in [0, 1].

    The noise does not vanish at t = 0, where sigma = sigma_min. The prior is N(0, sigma_max^2 I).
    The paper's sigma_max, for data in [0, 1], is 50 for CIFAR-10, 90 for CelebA 64, 348 to 380 at
    256 px and 1348 at 1024 px; `suggest_sigma_max` computes it for a data set.

    Args:
        sigma_min: sigma at t = 0, in units of the data.
        sigma_max: sigma at t = 1, about the largest distance between two data points.
        t_min: the smallest time for training and likelihood.

    Raises:
        ValueError: if not 0 < sigma_min < sigma_max.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.

    >>> import torch
    >>> from diffusionkit import VESDE
    >>> sde = VESDE(sigma_min=0.01, sigma_max=50.0)
    >>> sde.marginal(torch.tensor([0.0, 1.0]))[1]
    tensor([1.0000e-02, 5.0000e+01])
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = field(default=1e-5, kw_only=True)

    T = 1.0

    def __post_init__(self) -> None:
        check_t_min(self.t_min, self.T)
        check_positive(self.sigma_min, "sigma_min")
        check_positive(self.sigma_max, "sigma_max")
        check_interval(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")

    @property
    @override
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(t, self.T)
        return ones_like(t), self.sigma_min * torch.exp(self._rate * t)

    @override
    def drift_coefficient(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return torch.zeros_like(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return self.marginal(t)[1] * math.sqrt(2 * self._rate)

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return t * (-2 * self._rate) - 2 * math.log(self.sigma_min)

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - math.log(self.sigma_min)) / self._rate).clamp(0.0, self.T)

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_transition(s, t, self.T)
        variance = -torch.expm1(2 * self._rate * (s - t))
        return torch.ones_like(t), self.marginal(t)[1] * torch.sqrt(variance)


def suggest_sigma_max(data: Tensor, *, block: int = 2048) -> float:
    """Return the largest Euclidean distance between two data points, VE's sigma_max.

    Exact, without a tensor of all pairs: points are sorted by their distance r from the mean,
    and since the distance of x and y is at most r_x + r_y, most pairs can be skipped.

    Args:
        data: the data set (N, *D), N >= 2, in the units of the model.
        block: the number of points per block; pairs of blocks are compared at once.

    Raises:
        ValueError: if there are fewer than two points, all points are equal, or a value is not
            finite.
        TypeError: if data is not a floating-point tensor.

    Source: Song and Ermon, Improved Techniques for Training Score-Based Generative Models,
    2020, arXiv 2006.09011 (technique 1).

    >>> import torch
    >>> from diffusionkit import suggest_sigma_max
    >>> data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    >>> suggest_sigma_max(data)
    5.0
    """
    check_state(data, "data")
    check_known(data, "data")
    check_finite(data, "data")
    check_count(block, "block")
    points = data.detach().flatten(1) if data.ndim > 1 else data.detach().unsqueeze(1)
    if len(points) < 2:
        raise ValueError(f"data: expected at least two points, got {len(points)}")
    points = points.double() if points.device.type != "mps" else points.float()
    points = points - points.mean(0)
    radius, order = torch.linalg.vector_norm(points, dim=1).sort(descending=True)
    points, best = points[order], 0.0
    for i in range(0, len(points), block):
        if 2 * radius[i] <= best:
            break
        for j in range(i, len(points), block):
            if radius[i] + radius[j] <= best:
                break
            pairs = torch.cdist(points[i : i + block], points[j : j + block])
            best = max(best, float(pairs.max()))
    if best == 0.0:
        raise ValueError("data: expected at least two different points, got equal ones")
    return best
