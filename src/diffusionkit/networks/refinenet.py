"""The building blocks of NCSNv2: normalization, residual block and refinement block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_MEAN_POOL: dict[int, Callable[[int], nn.Module]] = {
    1: nn.AvgPool1d,
    2: nn.AvgPool2d,
    3: nn.AvgPool3d,
}
_MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}

Activation: TypeAlias = Callable[[Tensor], Tensor]


def conv(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    *,
    dilation: int = 1,
    bias: bool = True,
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    r"""Make a convolution that keeps the spatial size, with torch's default initialization.

    Args:
        dims: number of spatial dimensions.
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel: odd kernel size, the same along every dimension.
        dilation: distance between the entries of the kernel.
        bias: whether there is a bias.

    Returns:
        The layer, mapping (B, in_channels, \*spatial) to (B, out_channels, \*spatial).
    """
    padding = dilation * (kernel // 2)
    return _CONV[dims](
        in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=bias
    )


class InstanceNormPlus(nn.Module):
    r"""Instance normalization that restores the differences between the means of the channels.

    .. math::
        \mathrm{out}_c = \gamma_c \Big(\frac{x_c - \mu_c}{\sqrt{v_c + \epsilon}}
            + \alpha_c \frac{\mu_c - m}{\sqrt{s^2 + \epsilon}}\Big) + \beta_c

    where :math:`\mu_c, v_c` are mean and variance over the positions of one channel of one
    sample, :math:`m, s^2` mean and unbiased variance of the :math:`\mu_c` over the channels, and
    :math:`\epsilon = 10^{-5}`.

    Args:
        channels: number of channels, at least 2.

    Source: Y. Song, S. Ermon, Generative Modeling by Estimating Gradients of the Data Distribution,
    2019, arXiv 1907.05600 (appendix A).
    """

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.gamma, self.beta = (nn.Parameter(torch.empty(channels)) for _ in range(3))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new scales around 1, without a shift."""
        self.alpha.normal_(1, 0.02)
        self.gamma.normal_(1, 0.02)
        self.beta.zero_()

    @override
    def forward(self, x: Tensor) -> Tensor:
        r"""Normalize features (B, channels, \*spatial)."""
        # In half precision, differences of nearly equal means would be lost.
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = x.flatten(2).mean(2, dtype=dtype)
        var, center = torch.var_mean(mean, dim=1, keepdim=True)
        mean = (mean - center) * (var + self.eps).rsqrt() * (self.alpha * self.gamma)
        # torch.nn.functional.group_norm rejects a single sample with a single position.
        h = torch.group_norm(x, x.shape[1], self.gamma, self.beta, self.eps)
        return (h + mean.reshape(mean.shape + (1,) * (x.ndim - 2))).to(x.dtype)


class DilatedBlock(nn.Module):
    r"""Residual block of two convolutions, which may be dilated instead of downsampled.

    .. math::
        h &= \mathrm{conv}_2(a(\mathrm{norm}_2(\mathrm{conv}_1(a(\mathrm{norm}_1(x)))))) \\
        \mathrm{out} &= x + h
            \quad\text{or, first of its level,}\quad \mathrm{shortcut}(p(x)) + p(h)

    with the activation a. In the first block of a level without dilation, p takes means over 2
    neighbors per dimension and the shortcut is a 1x1 convolution. In that of a dilated level, p
    is the identity and the shortcut is a dilated convolution.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels; equal to `in_channels` unless `first`.
        dims: number of spatial dimensions.
        activation: the activation a.
        dilation: dilation of the convolutions.
        first: whether the block is the first of a level below another one.

    Source: F. Yu, V. Koltun, T. Funkhouser, Dilated Residual Networks, 2017, arXiv 1705.09914, as
    used by Song and Ermon, 2019 and 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dims: int,
        activation: Activation,
        *,
        dilation: int = 1,
        first: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.pools = first and dilation == 1
        self.norm_1 = InstanceNormPlus(in_channels)
        self.conv_1 = conv(dims, in_channels, in_channels, dilation=dilation)
        self.norm_2 = InstanceNormPlus(in_channels)
        self.conv_2 = conv(dims, in_channels, out_channels, dilation=dilation)
        self.pool = _MEAN_POOL[dims](2) if self.pools else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if first:
            kernel = 1 if self.pools else 3
            self.shortcut = conv(dims, in_channels, out_channels, kernel, dilation=dilation)

    @override
    def forward(self, x: Tensor) -> Tensor:
        r"""Map features (B, in_channels, \*spatial) to (B, out_channels, \*resampled)."""
        h = self.conv_1(self.activation(self.norm_1(x)))
        h = self.conv_2(self.activation(self.norm_2(h)))
        # A mean and a 1x1 convolution commute; this order is cheaper.
        out: Tensor = self.shortcut(self.pool(x)) + self.pool(h)
        return out


class ResidualUnit(nn.Module):
    r"""Residual convolution unit: ``x + conv_2(a(conv_1(a(x))))``, without biases.

    Args:
        channels: number of channels.
        dims: number of spatial dimensions.
        activation: the activation a.
    """

    def __init__(self, channels: int, dims: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.conv_1 = conv(dims, channels, channels, bias=False)
        self.conv_2 = conv(dims, channels, channels, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        r"""Map features (B, channels, \*spatial) to features of the same shape."""
        h: Tensor = self.conv_2(self.activation(self.conv_1(self.activation(x))))
        return x + h


class ChainedPooling(nn.Module):
    r"""Chained residual pooling over windows of growing size.

    .. math:: p_0 = a(x), \qquad p_i = \mathrm{conv}_i(\mathrm{maxpool}_5(p_{i-1})), \qquad
        \mathrm{out} = p_0 + p_1 + p_2

    Args:
        channels: number of channels.
        dims: number of spatial dimensions.
        activation: the activation a.
    """

    def __init__(self, channels: int, dims: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.pool = _MAX_POOL[dims](5, stride=1, padding=2)
        self.convs = nn.ModuleList([conv(dims, channels, channels, bias=False) for _ in range(2)])

    @override
    def forward(self, x: Tensor) -> Tensor:
        r"""Map features (B, channels, \*spatial) to features of the same shape."""
        out = path = self.activation(x)
        for layer in self.convs:
            path = layer(self.pool(path))
            out = out + path
        return out


class Refinement(nn.Module):
    r"""Refinement block: fuses the features of a level with the refined features below it.

    Two residual units adapt each input. Both inputs are convolved to `out_channels` and added,
    the lower one after linear interpolation to the size of the level (with aligned corners).
    Chained residual pooling and further residual units follow.

    Args:
        channels: number of channels of each input: the level's and, except at the lowest level,
            the refined level's below.
        out_channels: number of output channels; at the lowest level, equal to `channels`.
        dims: number of spatial dimensions.
        activation: the activation a.
        units: number of residual units at the end.

    Source: G. Lin, A. Milan, C. Shen, I. Reid, RefineNet: Multi-Path Refinement Networks for
    High-Resolution Semantic Segmentation, 2017, arXiv 1611.06612.
    """

    def __init__(
        self,
        channels: list[int],
        out_channels: int,
        dims: int,
        activation: Activation,
        units: int,
    ) -> None:
        super().__init__()

        def residual_units(c: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualUnit(c, dims, activation) for _ in range(count)))

        self.mode = _INTERPOLATION[dims]
        self.adapt = nn.ModuleList([residual_units(c, 2) for c in channels])
        fused = channels if len(channels) > 1 else []
        self.fuse = nn.ModuleList([conv(dims, c, out_channels) for c in fused])
        self.pooling = ChainedPooling(out_channels, dims, activation)
        self.units = residual_units(out_channels, units)

    @override
    def forward(self, x: Tensor, below: Tensor | None = None) -> Tensor:
        r"""Return features (B, out_channels, \*spatial).

        Args:
            x: features (B, channels[0], \*spatial) of the level.
            below: refined features (B, channels[1], \*any spatial), or None.
        """
        h: Tensor = self.adapt[0](x)
        if below is not None:
            below = self.fuse[1](self.adapt[1](below))
            if below.shape[2:] != x.shape[2:]:
                below = F.interpolate(below, x.shape[2:], mode=self.mode, align_corners=True)
            h = self.fuse[0](h) + below
        out: Tensor = self.units(self.pooling(h))
        return out
