"""The sub-VP SDE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from ._beta import LinearBetaSDE


@dataclass(frozen=True)
class SubVPSDE(LinearBetaSDE):
    r"""The sub-variance-preserving SDE: the drift of VP with less noise, for better likelihoods.

    .. math::
        \alpha = e^{-B/2}, \quad \sigma = 1 - e^{-B}, \quad
        g = \sqrt{\beta(t) (1 - e^{-2B})}, \quad
        B(t) = \beta_{min} t + (\beta_{max} - \beta_{min}) t^2 / 2, \quad t \in [0, 1].

    Expects data of scale about 1, such as images in [-1, 1]. The prior is N(0, I).

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.
        t_min: the smallest time for training and likelihood.

    Raises:
        ValueError: if 0 < beta_min <= beta_max or 0 <= t_min < 1 does not hold.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.

    >>> import torch
    >>> from diffusionkit import SubVPSDE
    >>> alpha, sigma = SubVPSDE().marginal(torch.tensor([0.5]))
    >>> alpha, sigma
    (tensor([0.2812]), tensor([0.9209]))
    """

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.integrated_beta(t)
        return torch.exp(-0.5 * integral), -torch.expm1(-integral)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.integrated_beta(t)))

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        integral = self.integrated_beta(t)
        return -integral - 2 * torch.log(-torch.expm1(-integral))

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        # snr = 1 / (2 sinh(B / 2))^2
        return self._time(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # sigma_t^2 - scale^2 sigma_s^2, factorized to avoid cancellation as s approaches t.
        between = self._between(s, t)
        total = self.integrated_beta(s) + self.integrated_beta(t)
        return torch.exp(-0.5 * between), torch.sqrt(torch.expm1(-between) * torch.expm1(-total))
