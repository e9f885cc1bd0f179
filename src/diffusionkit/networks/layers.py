"""Initializers, and the layers shared by the blocks of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._arguments import check_label_values

# A scale of exactly zero would zero the weights, and with them every gradient through two such
# layers in a row.
_SMALLEST_SCALE = 1e-10

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
AnyLayer = TypeVar("AnyLayer", bound=nn.Module)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": F.elu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.2),
}

_HALF_POWER = 1 / math.sqrt(2)


@torch.no_grad()
def variance_scaling_(weight: Tensor, scale: float = 1.0) -> Tensor:
    r"""Fill a weight in place from a uniform distribution of variance ``scale / fan_avg``.

    .. math:: w \sim U[-b, b], \qquad b = \sqrt{3\,\mathrm{scale} / \mathrm{fan_{avg}}}

    where fan_avg is the mean of the fan-in and the fan-out. Returns the weight.

    Args:
        weight: weight (out, in, \*kernel).
        scale: factor of the variance; zero is replaced by 1e-10.
    """
    receptive = math.prod(weight.shape[2:])
    fan_avg = receptive * (weight.shape[0] + weight.shape[1]) / 2
    bound = math.sqrt(3 * max(scale, _SMALLEST_SCALE) / fan_avg)
    return weight.uniform_(-bound, bound)


@torch.no_grad()
def fan_average_(layer: Layer, scale: float) -> None:
    """Initialize as in the networks of Ho et al. and Song et al.: fan-averaged weight, zero bias.

    Args:
        layer: linear or convolutional layer, changed in place.
        scale: variance scale of the weight, see `variance_scaling_`.
    """
    variance_scaling_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def default_or_zero_(layer: Layer, scale: float) -> None:
    """Initialize as in the networks of Dhariwal and Nichol: torch's default, or exact zeros.

    Args:
        layer: linear or convolutional layer, changed in place.
        scale: zero for zeros; otherwise torch's default initialization is kept.
    """
    if scale == 0:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def linear(in_features: int, out_features: int, *, scale: float = 1.0) -> nn.Linear:
    """Make a linear layer with variance-scaled weight and zero bias.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        scale: variance scale of the weight, see `variance_scaling_`.

    Returns:
        The layer, mapping (..., in_features) to (..., out_features).
    """
    return _initialized(_Linear(in_features, out_features), fan_average_, scale)


class _Initialized:
    """A layer that is initialized by a function and a scale, also by `reset_parameters`."""

    _initializer: tuple[Callable[..., None], float] | None = None

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()  # type: ignore[misc]
        if self._initializer is not None:
            initialize, scale = self._initializer
            initialize(self, scale)


class _Linear(_Initialized, nn.Linear):
    pass


class _Conv1d(_Initialized, nn.Conv1d):
    pass


class _Conv2d(_Initialized, nn.Conv2d):
    pass


class _Conv3d(_Initialized, nn.Conv3d):
    pass


_CONV = {1: _Conv1d, 2: _Conv2d, 3: _Conv3d}


def _initialized(
    layer: AnyLayer, initialize: Callable[[Layer, float], None], scale: float
) -> AnyLayer:
    """Initialize a layer, now and whenever it is reset."""
    made = cast(Any, layer)
    made._initializer = initialize, scale
    initialize(made, scale)
    return layer


@dataclass(frozen=True)
class Style:
    """Settings shared by all blocks of a network, and a factory for their layers.

    Args:
        dims: number of spatial dimensions, 1, 2 or 3.
        embedding_width: number of channels of the embedding, or None for no embedding.
        dropout: dropout probability within residual blocks.
        rescale: whether sums of two branches are divided by sqrt(2).
        adaptive_scale: whether the embedding scales and shifts the output of the second
            normalization of a residual block, rather than being added before it.
        group_channels: least number of channels per normalization group.
        eps: constant added to the variance by normalizations.
        activation: activation function of all layers.
        initialize: initializer, called with a layer and a scale: 0 for zero-initialized branches.
    """

    dims: int
    embedding_width: int | None = None
    dropout: float = 0.0
    rescale: bool = True
    adaptive_scale: bool = False
    group_channels: int = 4
    eps: float = 1e-6
    activation: Callable[[Tensor], Tensor] = F.silu
    initialize: Callable[[Layer, float], None] = fan_average_

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        scale: float = 1.0,
    ) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        r"""Make a convolution; by default one that keeps the spatial size.

        Args:
            in_channels: number of input channels.
            out_channels: number of output channels.
            kernel: odd kernel size, the same along every dimension.
            stride: stride, the same along every dimension.
            padding: padding of both ends of every dimension; half the kernel by default.
            scale: scale passed to the initializer.

        Returns:
            The layer, mapping (B, in_channels, \*spatial) to (B, out_channels, \*spatial).
        """
        padding = kernel // 2 if padding is None else padding
        kind: Any = _CONV[self.dims]
        layer: nn.Conv1d | nn.Conv2d | nn.Conv3d = kind(
            in_channels, out_channels, kernel, stride, padding
        )
        return _initialized(layer, self.initialize, scale)

    def linear(self, in_features: int, out_features: int, *, scale: float = 1.0) -> nn.Linear:
        """Make a linear layer.

        Args:
            in_features: number of inputs.
            out_features: number of outputs.
            scale: scale passed to the initializer.

        Returns:
            The layer, mapping (..., in_features) to (..., out_features).
        """
        return _initialized(_Linear(in_features, out_features), self.initialize, scale)

    def norm(self, channels: int) -> nn.GroupNorm:
        """Make a group normalization of min(channels // group_channels, 32) groups.

        If that number does not divide the channels, the next smaller divisor is used.
        """
        groups = max(1, min(channels // self.group_channels, 32))
        while channels % groups:
            groups -= 1
        return nn.GroupNorm(groups, channels, eps=self.eps)

    def join(self, x: Tensor, h: Tensor) -> Tensor:
        """Add two branches of the same shape: x + h, or (x + h) / sqrt(2) if `rescale`."""
        total = x + h
        return total.mul_(_HALF_POWER) if self.rescale else total


def over_level(h: Tensor, level: Tensor) -> Tensor:
    r"""Divide a network's output by noise levels, in at least float32.

    Args:
        h: output (B, C, \*spatial).
        level: noise levels (B,).

    Returns:
        h / level, in the dtype of h.

    Raises:
        ValueError: if a level is not finite and positive (read on the CPU only).
    """
    check_label_values(level, "divides its output by them", positive=True)
    level = level.to(torch.promote_types(h.dtype, torch.float32))
    return (h / level.reshape(-1, *(1,) * (h.ndim - 1))).to(h.dtype)
