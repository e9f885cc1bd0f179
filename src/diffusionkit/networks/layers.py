"""Initialisation, convolution of any dimension, and normalisation."""

import math

import torch
from torch import Tensor, nn

# A scale of exactly zero would make the variance-scaling bound zero and with it every gradient
# that has to pass two such layers in a row.
_SMALLEST_SCALE = 1e-10

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


@torch.no_grad()
def variance_scaling_(weight: Tensor, scale: float = 1.0) -> Tensor:
    r"""Fill a weight in place from a uniform law of variance ``scale / fan_avg``.

    .. math:: w \sim U[-b, b], \qquad b = \sqrt{3\,\mathrm{scale} / \mathrm{fan_{avg}}}

    where fan_avg is the mean of the numbers of inputs and outputs of one unit.

    Args:
        weight: Weight (out, in, \*kernel).
        scale: Factor of the variance. Zero stands for 1e-10: nearly, but not quite, nothing.

    Returns:
        The weight.
    """
    receptive = math.prod(weight.shape[2:])
    fan_avg = receptive * (weight.shape[0] + weight.shape[1]) / 2
    bound = math.sqrt(3 * max(scale, _SMALLEST_SCALE) / fan_avg)
    return weight.uniform_(-bound, bound)


def linear(in_features: int, out_features: int, *, scale: float = 1.0) -> nn.Linear:
    """Linear layer with variance-scaled weight and zero bias.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        scale: Variance scale of the weight, see `variance_scaling_`.

    Returns:
        The layer, mapping (..., in_features) to (..., out_features).
    """
    layer = nn.Linear(in_features, out_features)
    variance_scaling_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


def conv(
    dims: int, in_channels: int, out_channels: int, kernel: int = 3, *, scale: float = 1.0
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    r"""Convolution that keeps the spatial size, with variance-scaled weight and zero bias.

    Args:
        dims: Number of spatial dimensions, 1, 2 or 3.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel: Odd kernel size, the same along every dimension.
        scale: Variance scale of the weight, see `variance_scaling_`.

    Returns:
        The layer, mapping (B, in_channels, \*spatial) to (B, out_channels, \*spatial).
    """
    layer = _CONV[dims](in_channels, out_channels, kernel, padding=kernel // 2)
    variance_scaling_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with min(channels // 4, 32) groups and eps 1e-6.

    Where that number does not divide the channels, the next smaller one that does is taken.

    Args:
        channels: Number of channels.

    Returns:
        The layer.
    """
    groups = max(1, min(channels // 4, 32))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)
