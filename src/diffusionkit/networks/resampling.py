"""Resampling of feature maps by two, with and without a convolution.

The layers accept and ignore the embedding, so that they can replace blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..ops import fir_conv_downsample, fir_conv_upsample, fir_downsample, fir_upsample
from .layers import Style

_AVG_POOL: dict[int, Callable[[Tensor, int], Tensor]] = {
    1: F.avg_pool1d,
    2: F.avg_pool2d,
    3: F.avg_pool3d,
}


class Upsample(nn.Module):
    r"""Upsampling by two with an FIR filter or by repeating each entry.

    Args:
        fir_kernel: one-dimensional FIR kernel, or None to repeat entries.
    """

    def __init__(self, fir_kernel: Sequence[float] | None = None) -> None:
        super().__init__()
        self.fir_kernel = None if fir_kernel is None else tuple(fir_kernel)

    @override
    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        r"""Map features (B, C, \*spatial) to (B, C, \*(2 spatial))."""
        if self.fir_kernel is None:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return fir_upsample(x, self.fir_kernel)


class Downsample(nn.Module):
    r"""Downsampling by two with an FIR filter or by averaging neighbors.

    Args:
        fir_kernel: one-dimensional FIR kernel, or None to average 2 neighbors per dimension.
    """

    def __init__(self, fir_kernel: Sequence[float] | None = None) -> None:
        super().__init__()
        self.fir_kernel = None if fir_kernel is None else tuple(fir_kernel)

    @override
    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        r"""Map features (B, C, \*spatial) of even sizes to (B, C, \*(spatial / 2))."""
        if self.fir_kernel is None:
            return _AVG_POOL[x.ndim - 2](x, 2)
        return fir_downsample(x, self.fir_kernel)


class ConvUpsample(nn.Module):
    """Upsampling by two, followed by a 3-tap convolution.

    With an FIR kernel the order is reversed, as in StyleGAN2: a transposed convolution, then
    the filter.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        style: settings shared by the network's blocks.
        fir_kernel: one-dimensional FIR kernel, or None to repeat entries.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: Style,
        fir_kernel: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.conv = style.conv(in_channels, out_channels)
        self.fir_kernel = None if fir_kernel is None else tuple(fir_kernel)

    @override
    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        r"""Map features (B, in_channels, \*spatial) to (B, out_channels, \*(2 spatial))."""
        if self.fir_kernel is None:
            h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return h
        return fir_conv_upsample(x, self.conv.weight, self.conv.bias, self.fir_kernel)


class ConvDownsample(nn.Module):
    """Downsampling by two with a 3-tap convolution of stride two.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        style: settings shared by the network's blocks.
        fir_kernel: one-dimensional FIR kernel of a filter before the convolution, or None.
        pad_front: zeros before the first entry of every dimension if there is no filter; one
            always follows the last. Ho et al. use none, Dhariwal and Nichol one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: Style,
        fir_kernel: Sequence[float] | None = None,
        pad_front: int = 0,
    ) -> None:
        super().__init__()
        self.conv = style.conv(in_channels, out_channels, stride=2, padding=pad_front)
        self.fir_kernel = None if fir_kernel is None else tuple(fir_kernel)
        # With padding at both ends, a stride of two never reads the last zero.
        self.pads = (0, 1) * style.dims if pad_front == 0 else ()

    @override
    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        r"""Map features (B, in_channels, \*spatial) of even sizes to (B, out_channels, \*half)."""
        if self.fir_kernel is None:
            h: Tensor = self.conv(F.pad(x, self.pads) if self.pads else x)
            return h
        return fir_conv_downsample(x, self.conv.weight, self.conv.bias, self.fir_kernel)
