"""What every layer of a flow does, and the two layers that mix and scale channels."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from ..._schedules import exact


def total(log_slopes: Tensor) -> Tensor:
    """Return the sum over the dimensions of each sample (B, *D), (B,), in float64."""
    return exact(log_slopes).flatten(1).sum(1)


class Bijection(nn.Module, abc.ABC):
    """A smooth one-to-one map of a state z (B, C, *D), given a context (B, E, *D)."""

    @abc.abstractmethod
    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of z (B, C, *D), and log |det| of the map there (B,)."""

    @abc.abstractmethod
    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        """Return the z (B, C, *D) whose image is y (B, C, *D)."""


class ActNorm(Bijection):
    r"""A scale and a shift for each channel, z -> exp(log_scale) (z - center).

    The first call in training mode sets them such that its own result has mean 0 and standard
    deviation 1 in each channel. The buffer `initialised` remembers that this was done, also in a
    saved state; in evaluation mode a fresh layer is the identity.

    Args:
        channels: the number of channels.

    Source: Kingma and Dhariwal, Glow, 2018, arXiv 1807.03039.
    """

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        """Start as the identity."""
        super().__init__()
        self.center = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialised:
            self._initialise(z)
        y = (z - _channels(self.center, z)) * _channels(self.log_scale.exp(), z)
        log_det = exact(self.log_scale).sum() * z[0, 0].numel()
        return y, log_det.expand(len(z))

    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        return y * _channels((-self.log_scale).exp(), y) + _channels(self.center, y)

    @torch.no_grad()
    def _initialise(self, z: Tensor) -> None:
        values = exact(z).transpose(0, 1).flatten(1)
        self.center.copy_(values.mean(1))
        if values.shape[1] > 1:  # one number has no spread
            self.log_scale.copy_(-values.std(1, correction=0).clamp_min(1e-6).log())
        self.initialised.fill_(True)


class ChannelMixing(Bijection):
    """An invertible matrix across the channels of each position, a rotation at the start.

    Args:
        channels: the number of channels.

    Source: Kingma and Dhariwal, Glow, 2018, arXiv 1807.03039.
    """

    def __init__(self, channels: int) -> None:
        """Draw a rotation."""
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(exact(self.weight)).logabsdet * z[0, 0].numel()
        return _mixed(self.weight, z), log_det.expand(len(z))

    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        return _mixed(torch.linalg.inv(exact(self.weight)).to(y.dtype), y)


def _mixed(weight: Tensor, z: Tensor) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):  # the state keeps its precision
        return torch.einsum("dc,bc...->bd...", weight, z)


def _channels(value: Tensor, like: Tensor) -> Tensor:
    """Shape one value for each channel (C,) to multiply a state (B, C, *D)."""
    return value.view(-1, *(1,) * (like.ndim - 2))
