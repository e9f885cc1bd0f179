"""Invertible layers: their interface, activation normalization and channel mixing."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..._schedules import exact


def total(log_slopes: Tensor) -> Tensor:
    """Return the sums (B,), in float64, over the dimensions of samples (B, *D)."""
    return exact(log_slopes).flatten(1).sum(1)


class Bijection(nn.Module, abc.ABC):
    """A smooth invertible map of a state z (B, C, *D), given a context (B, E, *D)."""

    @override
    @abc.abstractmethod
    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of z (B, C, *D) and log |det| of the Jacobian at z (B,)."""

    @abc.abstractmethod
    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        """Return the z (B, C, *D) whose image is y (B, C, *D)."""


class ActNorm(Bijection):
    r"""A scale and shift of each channel, z -> exp(log_scale) (z - center).

    The first call in training mode sets them so that its result has mean 0 and standard deviation
    1 in each channel. The buffer `initialized` records this, also in a saved state; in evaluation
    mode a new layer is the identity.

    Args:
        channels: the number of channels.

    Source: Kingma and Dhariwal, Glow, 2018, arXiv 1807.03039.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @override
    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialized:
            self._initialize(z)
        y = (z - _channels(self.center, z)) * _channels(self.log_scale.exp(), z)
        log_det = exact(self.log_scale).sum() * z[0, 0].numel()
        return y, log_det.expand(len(z))

    @override
    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        return y * _channels((-self.log_scale).exp(), y) + _channels(self.center, y)

    @torch.no_grad()
    def _initialize(self, z: Tensor) -> None:
        values = exact(z).transpose(0, 1).flatten(1)
        self.center.copy_(values.mean(1))
        if values.shape[1] > 1:  # one value has no standard deviation
            self.log_scale.copy_(-values.std(1, correction=0).clamp_min(1e-6).log())
        self.initialized.fill_(True)


class ChannelMixing(Bijection):
    """An invertible matrix over the channels at each position, initially a rotation.

    Args:
        channels: the number of channels.

    Source: Kingma and Dhariwal, Glow, 2018, arXiv 1807.03039.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))

    @override
    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(exact(self.weight)).logabsdet * z[0, 0].numel()
        return _mixed(self.weight, z), log_det.expand(len(z))

    @override
    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        return _mixed(torch.linalg.inv(exact(self.weight)).to(y.dtype), y)


def _mixed(weight: Tensor, z: Tensor) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):  # keep the state's precision
        return torch.einsum("dc,bc...->bd...", weight, z)


def _channels(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a value per channel (C,) to broadcast with a state (B, C, *D)."""
    return value.view(-1, *(1,) * (like.ndim - 2))
