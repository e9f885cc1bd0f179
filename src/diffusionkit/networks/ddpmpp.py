"""DDPM++, the U-Net of the variance-preserving models of Song et al., 2021."""

from collections.abc import Sequence
from functools import partial

from diffusionkit.networks.blocks import (
    ResidualBlock,
    SelfAttention,
    downsample_mean,
    upsample_nearest,
)
from diffusionkit.networks.checks import check_dropout, check_positive
from diffusionkit.networks.embeddings import PositionalEmbedding
from diffusionkit.networks.unet import UNet


class DDPMpp(UNet):
    r"""DDPM++: a U-Net of BigGAN residual blocks with a positional embedding of the label.

    Maps :math:`(x, l) \mapsto F(x, l)` with F of the shape of x (or of `out_channels` channels).
    Close to zero at initialisation. The default arguments are the CIFAR-10 network (61,804,419
    parameters for 3 channels); ``blocks=8`` is the deep one (106,632,579).

    The label is embedded as it comes, by frequencies from 1 down to 1e-4: it should be of the
    order of a step index, for example 999 t.

    Args:
        channels: Number of input channels.
        out_channels: Number of output channels; those of the input if None.
        dims: Number of spatial dimensions, 1, 2 or 3.
        width: Number of channels of the first level, even and at least 4.
        multipliers: Channels of each level over `width`; each level halves the resolution.
        blocks: Number of residual blocks per level.
        attention_levels: Indices of the levels with attention; 0 is the full resolution.
        dropout: Dropout probability within the residual blocks.
        num_classes: Number of classes, or None for a network without classes.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If an argument is out of range.

    Source:
        Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based
        Generative Modeling through Stochastic Differential Equations, 2021,
        https://arxiv.org/abs/2011.13456.

    Example:
        >>> import torch
        >>> from diffusionkit.networks import DDPMpp
        >>> net = DDPMpp(channels=1, width=8, multipliers=(1, 2), blocks=1)
        >>> x, t = torch.randn(4, 1, 8, 12), torch.rand(4)
        >>> net(x, 999 * t).shape
        torch.Size([4, 1, 8, 12])
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        out_channels: int | None = None,
        dims: int = 2,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention_levels: Sequence[int] = (1,),
        dropout: float = 0.1,
        num_classes: int | None = None,
    ) -> None:
        """Choose the parts and build the network."""
        check_positive(width=width)
        if width < 4 or width % 2:  # the positional embedding has as many features
            raise ValueError(f"width must be even and at least 4, got {width}")
        check_dropout(dropout)
        embedding_width = 4 * width
        block = partial(ResidualBlock, embedding_width=embedding_width, dims=dims, dropout=dropout)
        super().__init__(
            channels,
            out_channels=channels if out_channels is None else out_channels,
            dims=dims,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            attention_levels=attention_levels,
            num_classes=num_classes,
            label_features=PositionalEmbedding(width),
            embedding_width=embedding_width,
            block=block,
            attention=SelfAttention,
            down=lambda c: block(c, c, resample=downsample_mean),
            up=lambda c: block(c, c, resample=upsample_nearest),
        )
