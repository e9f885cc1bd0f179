"""EDM's preconditioned model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._coefficients import expand
from .._grid_times import evaluate
from .._keywords import explained
from .._ones import product
from .._precision import at_least_float32
from .._schedules import exact
from .._sigma_data import (
    SigmaData,
    as_sigma_data,
    check_channels,
    for_channels,
    over_channels,
    overall,
    spread,
)
from ..interfaces import ForwardSDE
from .labels import Label, LogSigmaLabel
from .network import NetworkModel


@explained
class EDMModel(NetworkModel):
    r"""A network whose input and target have unit variance at every noise level.

    With the noise-to-signal ratio s = sigma / alpha, S^2 = s^2 + sd^2 and the state x / alpha,

    .. math::
        D = \frac{sd^2}{S^2} \frac{x}{\alpha} + \frac{s\,sd}{S}
            F\!\left(\frac{x}{\alpha S};\ \tfrac14 \ln s\right), \quad
        F = \frac{s}{sd\,S} x_0 - \frac{sd}{S} \epsilon,

    which is EDM's model where alpha = 1, and its counterpart for every other process.

    With one standard deviation for each channel, these equations hold for each channel with its
    own: the model is that of separately standardized channels, while data, noise and samples keep
    their scale. The prediction is then in the parameterization of their root mean square; pass
    `EDMWeighting` the same numbers, and each channel's output has weight 1.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D).
        sde: the forward process.
        sigma_data: sd, the standard deviation of the data; or one for each channel, a sequence or
            a tensor (C,) or (C, 1, ...), which is kept as a tuple.
        label: the noise label, log(sigma / alpha) / 4 by default.
        data_range: the range of the training data, see `NetworkModel`.
        variance: the variance of reverse steps, see `NetworkModel`.

    Raises:
        ValueError: unless sigma_data is finite and positive; when called, if the state has another
            number of channels.
        TypeError: if the network or the label is not callable, or sde is not a ForwardSDE.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (table 1).

    >>> import torch
    >>> from diffusionkit import EDMSDE, EDMModel
    >>> model = EDMModel(lambda x, noise_label: 0 * x, EDMSDE())
    >>> model.predict(torch.ones(1, 2), torch.tensor([0.5])).x0  # c_skip x
    tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sde: ForwardSDE,
        sigma_data: SigmaData = 0.5,
        *,
        label: Label | None = None,
        data_range: tuple[float, float] | None = None,
        variance: str | None = None,
    ) -> None:
        """Join the network and its process."""
        # Read by the parameterization.
        self.sigma_data: float | tuple[float, ...] = as_sigma_data(sigma_data)
        self._overall = overall(self.sigma_data)
        super().__init__(network, sde, label=label, data_range=data_range, variance=variance)

    @staticmethod
    @override
    def _default_label() -> Label:
        return LogSigmaLabel()

    @property
    @override
    def _unit(self) -> Hashable:
        return "edm", self._overall

    def _std(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return alpha S, the standard deviation of the state; finite at alpha = 0."""
        return torch.hypot(sigma, alpha * self._overall)

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        (scale,) = self._input_scale(alpha, sigma)
        return sigma * scale / self._overall, product(scale * -self._overall, alpha)

    def _input_scale(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor]:
        return (torch.reciprocal(self._std(alpha, sigma)),)

    @override
    def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        if isinstance(self.sigma_data, tuple):
            check_channels(self.sigma_data, x)
            return x / over_channels(spread(alpha, sigma, self.sigma_data), at_least_float32(x))
        (scale,) = evaluate(self, "_input_scale", alpha, sigma)
        out = x * expand(scale, x)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @override
    def _unscaled(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r"""Return p x + q F_c for the outputs F_c of channels with deviations sd_c.

        .. math::
            q = \frac{S}{sd} \frac{sd_c}{S_c}, \quad
            p = \frac{s}{\alpha} \frac{sd_c}{S_c^2 S} \left(\frac{sd_c}{sd} - \frac{sd}{sd_c}\right)
        """
        if not isinstance(self.sigma_data, tuple):
            return output
        stds = spread(alpha, sigma, self.sigma_data)
        std = self._std(exact(alpha), exact(sigma)).unsqueeze(1)
        own, sd = for_channels(self.sigma_data, stds), self._overall
        q = std / sd * own / stds
        p = exact(alpha * sigma).unsqueeze(1) * own / (stds.square() * std) * (own / sd - sd / own)
        x = at_least_float32(x)
        return over_channels(p, x) * x + over_channels(q, x) * output.to(x.dtype)
