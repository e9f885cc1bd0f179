"""EDM's preconditioned model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._checks import check_positive
from ..interfaces import ForwardSDE
from ..values import Coefficient, expand
from .labels import Label, LogSigmaLabel
from .network import NetworkModel


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
        label: what the network is told about time, log(sigma / alpha) / 4 by default.
        data_range: the range of the data, for whoever makes pictures of samples.
        variance: what the network says of a step's variance, see `NetworkModel`.

    Raises:
        ValueError: unless sigma_data is finite and positive.
        TypeError: if the network or the label is not callable, or sde is not a ForwardSDE.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (table 1).

    >>> import torch
    >>> from diffusionkit import EDMSDE
    >>> model = EDMModel(lambda x, noise_label: torch.zeros_like(x), EDMSDE())
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
        super().__init__(network, sde, label=label, data_range=data_range, variance=variance)
        check_positive(sigma_data, "sigma_data")
        self.sigma_data = sigma_data

    @staticmethod
    def _default_label() -> Label:
        return LogSigmaLabel()

    def _total(self, ratio: Coefficient) -> Coefficient:
        return (ratio * ratio + self.sigma_data**2) ** 0.5

    def parameterization(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        ratio = sigma / alpha
        total = self._total(ratio)
        return ratio / (self.sigma_data * total), -self.sigma_data / total

    def scale_input(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        out = x * expand(1.0 / (alpha * self._total(sigma / alpha)), x)
        return out if out.dtype == x.dtype else out.to(x.dtype)
