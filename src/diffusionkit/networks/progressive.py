"""Progressive branches of NCSN++: the input and the output at every resolution.

An input branch maps (pyramid, features) to their successors after every downsampling of the
encoder; its pyramid starts as the network's input. An output branch does the same after every
level of the decoder; at the coarsest level its pyramid is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from .layers import Style
from .resampling import ConvDownsample, ConvUpsample, Downsample, Upsample


class Head(nn.Module):
    """Normalization, activation and a 3-tap convolution.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        style: settings shared by the network's blocks.
        scale: scale passed to the initializer; by default the output is almost zero.
    """

    def __init__(
        self, in_channels: int, out_channels: int, style: Style, *, scale: float = 0.0
    ) -> None:
        super().__init__()
        self.style = style
        self.norm = style.norm(in_channels)
        self.conv = style.conv(in_channels, out_channels, scale=scale)

    @override
    def forward(self, h: Tensor) -> Tensor:
        r"""Map features (B, in_channels, \*spatial) to (B, out_channels, \*spatial)."""
        out: Tensor = self.conv(self.style.activation(self.norm(h)))
        return out


class InputSkip(nn.Module):
    """Input branch that adds or concatenates a 1x1 convolution of the downsampled input.

    Args:
        channels: number of channels of the network's input.
        width: number of channels of the features.
        style: settings shared by the network's blocks.
        fir_kernel: one-dimensional FIR kernel of the downsampling, or None to take means.
        combine: "sum" to add, "cat" to concatenate.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        style: Style,
        fir_kernel: Sequence[float] | None,
        combine: Literal["sum", "cat"],
    ) -> None:
        super().__init__()
        self.down = Downsample(fir_kernel)
        self.conv = style.conv(channels, width, kernel=1)
        self.combine = combine
        self.branch_channels = channels
        self.out_channels = 2 * width if combine == "cat" else width

    @override
    def forward(self, pyramid: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the input at this resolution, and the features combined with it.

        Args:
            pyramid: the input at the resolution above (B, channels, \*(2 spatial)).
            h: features (B, width, \*spatial).
        """
        pyramid = self.down(pyramid)
        skip: Tensor = self.conv(pyramid)
        h = torch.cat([skip, h], dim=1) if self.combine == "cat" else skip + h
        return pyramid, h


class InputResidual(nn.Module):
    """Input branch of downsampling convolutions; its sum with the features replaces them.

    Args:
        channels: number of channels of the branch above.
        width: number of channels of the features.
        style: settings shared by the network's blocks.
        fir_kernel: one-dimensional FIR kernel of the downsampling, or None.
    """

    def __init__(
        self, channels: int, width: int, style: Style, fir_kernel: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.style = style
        self.down = ConvDownsample(channels, width, style, fir_kernel)
        self.branch_channels = self.out_channels = width

    @override
    def forward(self, pyramid: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the branch at this resolution twice: it replaces the features.

        Args:
            pyramid: the branch at the resolution above (B, channels, \*(2 spatial)).
            h: features (B, width, \*spatial).
        """
        pyramid = self.style.join(self.down(pyramid), h)
        return pyramid, pyramid


class OutputSkip(nn.Module):
    """Output branch that adds a head to the upsampled output of the resolution below.

    Args:
        width: number of channels of the features.
        out_channels: number of channels of the network's output.
        style: settings shared by the network's blocks.
        fir_kernel: one-dimensional FIR kernel of the upsampling, or None to repeat entries.
    """

    def __init__(
        self, width: int, out_channels: int, style: Style, fir_kernel: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.head = Head(width, out_channels, style)
        self.up = Upsample(fir_kernel)

    @override
    def forward(self, pyramid: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the output at this resolution (B, out_channels, \*spatial), and the features.

        Args:
            pyramid: the output at the resolution below, or None at the coarsest.
            h: features (B, width, \*spatial).
        """
        out: Tensor = self.head(h)
        return out if pyramid is None else self.up(pyramid) + out, h


class OutputStart(nn.Module):
    """Start of the residual output branch: a head on the coarsest features.

    Args:
        width: number of channels of the features and of the branch.
        style: settings shared by the network's blocks.
    """

    def __init__(self, width: int, style: Style) -> None:
        super().__init__()
        self.head = Head(width, width, style, scale=1.0)

    @override
    def forward(self, pyramid: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the branch, and the features (B, width, \*spatial) unchanged."""
        return self.head(h), h


class OutputResidual(nn.Module):
    """Output branch of upsampling convolutions; its sum with the features replaces them.

    Args:
        channels: number of channels of the branch below.
        width: number of channels of the features.
        style: settings shared by the network's blocks.
        fir_kernel: one-dimensional FIR kernel of the upsampling, or None to repeat entries.
    """

    def __init__(
        self, channels: int, width: int, style: Style, fir_kernel: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.style = style
        self.up = ConvUpsample(channels, width, style, fir_kernel)

    @override
    def forward(self, pyramid: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the branch at this resolution twice: it replaces the features.

        Args:
            pyramid: the branch at the resolution below (B, channels, \*(spatial / 2)).
            h: features (B, width, \*spatial).
        """
        pyramid = self.style.join(self.up(pyramid), h)
        return pyramid, pyramid
