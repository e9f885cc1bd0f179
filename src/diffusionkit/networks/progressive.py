"""Progressive branches: the input at every resolution of the encoder, the output likewise.

An input branch maps (pyramid, h) to (pyramid, h) after every down-sampling; the pyramid starts
as the input of the network. An output branch does so after every level of the decoder, from the
coarsest, where there is no pyramid yet.
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
    """Normalisation, activation and a 3-tap convolution.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        style: what the network's blocks have in common.
        scale: scale given to the initialiser; almost zero by default.
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
        r"""Apply the layers.

        Args:
            h: feature map (B, in_channels, \*spatial).

        Returns:
            Feature map (B, out_channels, \*spatial).
        """
        out: Tensor = self.conv(self.style.activation(self.norm(h)))
        return out


class InputSkip(nn.Module):
    """The down-sampled input, through a 1x1 convolution, is added or joined to the features.

    Args:
        channels: number of channels of the network's input.
        width: number of channels of the features.
        style: what the network's blocks have in common.
        fir_kernel: one-dimensional FIR kernel of the down-sampling, or None for means.
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
        r"""Go down one resolution.

        Args:
            pyramid: the input at the resolution above (B, channels, \*(2 spatial)).
            h: features (B, width, \*spatial).

        Returns:
            The input at this resolution, and the features joined to it.
        """
        pyramid = self.down(pyramid)
        skip: Tensor = self.conv(pyramid)
        h = torch.cat([skip, h], dim=1) if self.combine == "cat" else skip + h
        return pyramid, h


class InputResidual(nn.Module):
    """The down-sampling convolution of the branch is joined to the features and replaces them.

    Args:
        channels: number of channels of the branch above.
        width: number of channels of the features.
        style: what the network's blocks have in common.
        fir_kernel: one-dimensional FIR kernel of the down-sampling, or None.
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
        r"""Go down one resolution.

        Args:
            pyramid: the branch at the resolution above (B, channels, \*(2 spatial)).
            h: features (B, width, \*spatial).

        Returns:
            The branch at this resolution, twice: it is the features from here on.
        """
        pyramid = self.style.join(self.down(pyramid), h)
        return pyramid, pyramid


class OutputSkip(nn.Module):
    """The output is the up-sampled output of the resolution below plus a head of this one.

    Args:
        width: number of channels of the features.
        out_channels: number of channels of the network's output.
        style: what the network's blocks have in common.
        fir_kernel: one-dimensional FIR kernel of the up-sampling, or None to repeat entries.
    """

    def __init__(
        self, width: int, out_channels: int, style: Style, fir_kernel: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.head = Head(width, out_channels, style)
        self.up = Upsample(fir_kernel)

    @override
    def forward(self, pyramid: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Go up one resolution.

        Args:
            pyramid: the output at the resolution below, or None at the coarsest.
            h: features (B, width, \*spatial).

        Returns:
            The output at this resolution (B, out_channels, \*spatial), and the features.
        """
        out: Tensor = self.head(h)
        return out if pyramid is None else self.up(pyramid) + out, h


class OutputStart(nn.Module):
    """The convolutional branch of the output starts as a head of the coarsest features.

    Args:
        width: number of channels of the features and of the branch.
        style: what the network's blocks have in common.
    """

    def __init__(self, width: int, style: Style) -> None:
        super().__init__()
        self.head = Head(width, width, style, scale=1.0)

    @override
    def forward(self, pyramid: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Start the branch.

        Args:
            pyramid: none.
            h: features (B, width, \*spatial).

        Returns:
            The branch (B, width, \*spatial), and the features as they are.
        """
        return self.head(h), h


class OutputResidual(nn.Module):
    """The up-sampling convolution of the branch is joined to the features and replaces them.

    Args:
        channels: number of channels of the branch below.
        width: number of channels of the features.
        style: what the network's blocks have in common.
        fir_kernel: one-dimensional FIR kernel of the up-sampling, or None to repeat entries.
    """

    def __init__(
        self, channels: int, width: int, style: Style, fir_kernel: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.style = style
        self.up = ConvUpsample(channels, width, style, fir_kernel)

    @override
    def forward(self, pyramid: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Go up one resolution.

        Args:
            pyramid: the branch at the resolution below (B, channels, \*(spatial / 2)).
            h: features (B, width, \*spatial).

        Returns:
            The branch at this resolution, twice: it is the features from here on.
        """
        pyramid = self.style.join(self.up(pyramid), h)
        return pyramid, pyramid
