"""The process of flow matching: a straight line from the data to the noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_t_min, check_times, check_transition
from ..interfaces import ForwardSDE


@dataclass(frozen=True)
class FlowMatchingSDE(ForwardSDE):
    r"""The process of flow matching and rectified flow: a straight line from data to noise.

    .. math::
        x_t = (1 - t) x_0 + t\, \epsilon, \quad \alpha = 1 - t, \quad \sigma = t, \quad
        f = -\frac{1}{1 - t}, \quad g^2 = \frac{2 t}{1 - t}, \quad t \in [0, 1].

    Also called the linear interpolant, or the conditional optimal-transport path. A `VelocityModel`
    predicts its velocity dx_t / dt = eps - x0; any other model of the process can be used too,
    since the optimal velocity and the score determine each other. Some papers count time from the
    noise to the data: their t is 1 - t here.

    At T no signal is left, alpha(T) = 0, so the prior N(0, I) is exact. The drift is infinite
    there; samplers and the probability flow use forms that are finite. A prediction of the noise
    alone does not determine the data at T: predict the velocity or the data.

    Expects data of scale about 1, such as images in [-1, 1].

    Args:
        t_min: the smallest time for training and likelihood, where sigma = t_min.

    Raises:
        ValueError: if 0 <= t_min < 1 does not hold.

    Source: Lipman et al., Flow Matching for Generative Modeling, 2023, arXiv 2210.02747; Liu et
    al., Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, 2023,
    arXiv 2209.03003; Albergo and Vanden-Eijnden, Building Normalizing Flows with Stochastic
    Interpolants, 2023, arXiv 2209.15571.

    >>> import torch
    >>> from diffusionkit import FlowMatchingSDE
    >>> FlowMatchingSDE().marginal(torch.tensor([0.25, 1.0]))
    (tensor([0.7500, 0.0000]), tensor([0.2500, 1.0000]))
    """

    t_min: float = 1e-3

    T = 1.0
    prior_std = 1.0

    def __post_init__(self) -> None:
        check_t_min(self.t_min, self.T)

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(t, self.T)
        return (1 - t).clamp_min(0.0), t.clone()

    @override
    def drift_coefficient(self, t: Tensor) -> Tensor:
        return -1 / self.marginal(t)[0]

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        alpha, sigma = self.marginal(t)
        return torch.sqrt(2 * sigma / alpha)

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self.marginal(t)
        return 2 * (torch.log(alpha) - torch.log(sigma))

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_transition(s, t, self.T)
        (alpha_s, _), (alpha_t, _) = self.marginal(s), self.marginal(t)
        # sigma_t^2 - scale^2 sigma_s^2, factorized to avoid cancellation as s approaches t.
        std = torch.sqrt((t - s) * (t * alpha_s + s * alpha_t)) / alpha_s
        same = s == t  # 0 / 0 at T
        return torch.where(same, 1.0, alpha_t / alpha_s), torch.where(same, 0.0, std)
