r"""Weights of the noise-prediction error as a function of time.

A weight w of ||eps_hat - eps||^2 is a weight w sigma^2 of the squared error of the score and a
weight w alpha^2 / sigma^2 of that of x0.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from .._batch_times import kernel_at, rate_at
from .._checks import check_positive, check_times
from .._ones import ones_like
from .._sigma_data import SigmaData, as_sigma_data, for_channels, overall, spread
from .._units import keep_unit
from ..interfaces import ForwardSDE, Weighting


class _UnitWeighting(Weighting):
    """Weight 1 of the error of one output, named by `_unit`."""

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name no output where a subclass has other weights."""
        super().__init_subclass__(**kwargs)
        keep_unit(cls, "__call__")


@dataclass(frozen=True)
class SimpleWeighting(_UnitWeighting):
    """Weight 1 at every noise level, for the best sample quality.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.
    """

    _unit = "eps"

    @override
    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        check_times(t, sde.T)
        return ones_like(t)


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    r"""Weight g^2 / sigma^2, with which the loss bounds the negative log-likelihood.

    Half the weighted squared error, summed over dimensions and integrated over time, is the
    diffusion term of the bound, in nats.

    Source: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    arXiv 2101.09258 (theorem 1).

    >>> import torch
    >>> from diffusionkit import VESDE, LikelihoodWeighting
    >>> t = torch.tensor([0.1, 0.9])
    >>> LikelihoodWeighting()(VESDE(), t)  # 2 ln(sigma_max / sigma_min)
    tensor([17.0344, 17.0344])
    """

    @override
    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        check_times(t, sde.T)
        return rate_at(sde, t).to(t.dtype)


@dataclass(frozen=True)
class EDMWeighting(_UnitWeighting):
    r"""Weight (s^2 + sd^2) / sd^2, s = sigma / alpha: weight 1 of EDM's raw network output.

    On the squared error of x0 this is EDM's (s^2 + sd^2) / (s sd)^2.

    With one standard deviation for each channel, the weights are those of their root mean square,
    and objectives multiply them by `per_channel`.

    Args:
        sigma_data: sd, the standard deviation of the data; or one for each channel, as in
            `EDMModel`.

    Raises:
        ValueError: unless sigma_data is finite and positive.
        TypeError: if it is not a number, a sequence or a tensor.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    arXiv 2206.00364 (table 1).
    """

    sigma_data: SigmaData = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma_data", as_sigma_data(self.sigma_data))

    @property
    def _overall(self) -> float:
        sd = self.sigma_data
        return sd if isinstance(sd, float) else overall(as_sigma_data(sd))

    @property
    def _unit(self) -> Hashable:
        return "edm", self._overall

    @override
    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        check_times(t, sde.T)
        alpha, sigma = kernel_at(sde, t)
        return (1 + (sigma / alpha / self._overall).square()).to(t.dtype)

    def per_channel(self, sde: ForwardSDE, t: Tensor) -> Tensor | None:
        r"""Return the weights (B, C) of channels over that of all, None for one sigma_data.

        .. math::
            \frac{1 + s^2 / sd_c^2}{1 + s^2 / sd^2}
        """
        sigma_data = self.sigma_data
        if not isinstance(sigma_data, tuple):
            return None
        check_times(t, sde.T)
        kernel = kernel_at(sde, t)
        one = overall(sigma_data)
        ratio = spread(*kernel, sigma_data) / spread(*kernel, (one,))
        return (ratio * (one / for_channels(sigma_data, ratio))).square()


@dataclass(frozen=True)
class MinSNRWeighting(Weighting):
    r"""Weight min(snr, gamma) / snr, snr = alpha^2 / sigma^2, smaller at low noise.

    On the squared error of x0 this is min(snr, gamma).

    Args:
        gamma: the signal-to-noise ratio above which the weight decreases.

    Source: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023,
    arXiv 2303.09556.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_positive(self.gamma, "gamma")

    @override
    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        check_times(t, sde.T)
        alpha, sigma = kernel_at(sde, t)
        return (self.gamma * (sigma / alpha).square()).clamp_max(1.0).to(t.dtype)


@dataclass(frozen=True)
class VelocityWeighting(_UnitWeighting):
    r"""Weight ((alpha + sigma) / alpha)^2: weight 1 of the squared error of eps - x0.

    The loss of flow matching: with it `ScoreMatching` is the mean of (F - eps + x0)^2 for a
    `VelocityModel`, and the same function of data and noise for every other model. Infinite at
    alpha = 0, where the objective takes the limit.

    Source: Lipman et al., Flow Matching for Generative Modeling, 2023, arXiv 2210.02747; Liu et
    al., Flow Straight and Fast, 2023, arXiv 2209.03003.

    >>> import torch
    >>> from diffusionkit import FlowMatchingSDE, VelocityWeighting
    >>> VelocityWeighting()(FlowMatchingSDE(), torch.tensor([0.0, 0.5]))
    tensor([1., 4.])
    """

    _unit = "velocity"

    @override
    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        check_times(t, sde.T)
        alpha, sigma = kernel_at(sde, t)
        return (1 + sigma / alpha).square().to(t.dtype)
