"""The SDE of EDM, with time equal to the noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_interval, check_positive, check_times, check_transition
from .._ones import ones_like
from ..interfaces import ForwardSDE


@dataclass(frozen=True)
class EDMSDE(ForwardSDE):
    r"""The SDE of EDM: time is the standard deviation of the noise.

    .. math::
        \alpha = 1, \quad \sigma(t) = t, \quad g = \sqrt{2 t}, \quad t \in [0, \sigma_{max}].

    Expects data of standard deviation about 0.5. The prior is N(0, sigma_max^2 I). Samplers use the
    paper's grid by default, `KarrasGrid()`: with equal steps in t nearly all would be at high
    noise.

    Args:
        sigma_min: the smallest noise level for training and sampling, t_min.
        sigma_max: the largest noise level, T.

    Raises:
        ValueError: if not 0 < sigma_min < sigma_max.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364.

    >>> import torch
    >>> from diffusionkit import EDMSDE
    >>> EDMSDE().marginal(torch.tensor([3.0]))
    (tensor([1.]), tensor([3.]))
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    grid_rho = 7.0

    def __post_init__(self) -> None:
        check_positive(self.sigma_min, "sigma_min")
        check_positive(self.sigma_max, "sigma_max")
        check_interval(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")
        # Derived from the fields; a frozen dataclass allows no plain assignment.
        object.__setattr__(self, "t_min", self.sigma_min)
        object.__setattr__(self, "T", self.sigma_max)

    @property
    @override
    def prior_std(self) -> float:
        return self.sigma_max

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(t, self.T)
        return ones_like(t), t.clone()

    @override
    def drift_coefficient(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return torch.zeros_like(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return torch.sqrt(2 * t)

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return -2 * torch.log(t)

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr).clamp(0.0, self.T)

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_transition(s, t, self.T)
        return torch.ones_like(t), torch.sqrt((t - s) * (t + s))
