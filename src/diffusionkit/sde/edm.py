"""The SDE of EDM, whose time is the noise itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_positive, check_times, check_transition
from ..interfaces import ForwardSDE


@dataclass(frozen=True)
class EDMSDE(ForwardSDE):
    r"""The SDE of EDM: time is the standard deviation of the noise.

    .. math::
        \alpha = 1, \quad \sigma(t) = t, \quad g = \sqrt{2 t}, \quad t \in [0, \sigma_{max}].

    Data are expected at a standard deviation of about 0.5. The prior is N(0, sigma_max^2 I).

    Args:
        sigma_min: the smallest noise for training and sampling.
        sigma_max: the largest noise, T.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364.

    >>> EDMSDE().marginal(torch.tensor([3.0]))
    (tensor([1.]), tensor([3.]))
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_positive(self.sigma_min, "sigma_min")
        check_positive(self.sigma_max, "sigma_max")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"expected sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def T(self) -> float:  # type: ignore[override]  # noqa: N802
        return self.sigma_max

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(t, self.T)
        return torch.ones_like(t), t.clone()

    def drift_coefficient(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return torch.sqrt(2 * t)

    def log_snr(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return -2 * torch.log(t)

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr).clamp(0.0, self.T)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_transition(s, t, self.T)
        return torch.ones_like(t), torch.sqrt((t - s) * (t + s))
