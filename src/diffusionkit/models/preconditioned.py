"""EDM's preconditioned model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_positive
from .._coefficients import expand
from .._grid_times import evaluate
from .._keywords import explained
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

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D).
        sde: the forward process.
        sigma_data: sd, the standard deviation of the data.
        label: the noise label, log(sigma / alpha) / 4 by default.
        data_range: the range of the training data, see `NetworkModel`.
        variance: the variance of reverse steps, see `NetworkModel`.

    Raises:
        ValueError: unless sigma_data is finite and positive.
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
        sigma_data: float = 0.5,
        *,
        label: Label | None = None,
        data_range: tuple[float, float] | None = None,
        variance: str | None = None,
    ) -> None:
        """Join the network and its process."""
        check_positive(sigma_data, "sigma_data")
        self.sigma_data = sigma_data  # read by the parameterization
        super().__init__(network, sde, label=label, data_range=data_range, variance=variance)

    @staticmethod
    @override
    def _default_label() -> Label:
        return LogSigmaLabel()

    def _std(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return alpha S, the standard deviation of the state; finite at alpha = 0."""
        return torch.hypot(sigma, alpha * self.sigma_data)

    @override
    def parameterization(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        std = self._std(alpha, sigma)
        return sigma / (self.sigma_data * std), -self.sigma_data * alpha / std

    def _input_scale(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor]:
        return (1.0 / self._std(alpha, sigma),)

    @override
    def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        (scale,) = evaluate(self._input_scale, alpha, sigma)
        out = x * expand(scale, x)
        return out if out.dtype == x.dtype else out.to(x.dtype)
