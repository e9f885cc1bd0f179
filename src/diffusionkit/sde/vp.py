"""The variance-preserving SDE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import override

from ._beta import LinearBetaSDE


@dataclass(frozen=True)
class VPSDE(LinearBetaSDE):
    r"""The variance-preserving SDE, the continuous limit of DDPM.

    .. math::
        \alpha = e^{-B/2}, \quad \sigma^2 = 1 - e^{-B}, \quad g = \sqrt{\beta(t)}, \quad
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
    >>> from diffusionkit import VPSDE
    >>> alpha, sigma = VPSDE().marginal(torch.tensor([0.5]))
    >>> alpha, sigma
    (tensor([0.2812]), tensor([0.9597]))
    """

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.integrated_beta(t)
        return torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        integral = self.integrated_beta(t)
        return -integral - torch.log(-torch.expm1(-integral))

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        # Beyond its threshold softplus is linear: with the default of 20 the error is 2e-9.
        return self._time(softplus(-log_snr, threshold=50.0))

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self._between(s, t)
        return torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))
