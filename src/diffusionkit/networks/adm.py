"""The U-Net of Nichol and Dhariwal, 2021, and its successor ADM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from torch import nn

from ._arguments import (
    check_counts,
    check_dropout,
    check_flags,
    check_layout,
    check_optional_counts,
    default_levels,
)
from .blocks import ResidualBlock, SelfAttention
from .config import remembers
from .embeddings import ConditionEmbedding, PositionalEmbedding
from .layers import Style, default_or_zero_
from .progressive import Head
from .resampling import ConvDownsample, ConvUpsample, Downsample, Upsample
from .unet import UNet


class ADMUNet(UNet):
    r"""The U-Net of improved DDPM and of ADM, with multi-head attention.

    Maps :math:`(x, l) \mapsto F(x, l)`, zero at initialization. With `learn_sigma` the output has
    twice the channels: first the mean, then the variance. The noise label l should have the
    range of a step index, 0 to 1000, whatever the number of steps.

    Class methods build the published networks; their `options` replace the published ones.

    Args:
        channels: number of input channels.
        out_channels: number of output channels; as many as input channels if None.
        learn_sigma: whether the output also contains a learned variance: twice the channels.
        dims: number of spatial dimensions, 1, 2 or 3.
        width: number of channels that the multipliers multiply, even and at least 4.
        multipliers: channels of each level over `width`; each level halves the resolution.
        blocks: number of residual blocks per level.
        attention_levels: indices of the levels with attention; 0 is the full resolution. None
            for 1 and 2, as far as the network has as many levels.
        heads: number of heads of each attention.
        decoder_heads: number of heads of each attention in the decoder; `heads` if None.
        head_channels: number of channels per head, instead of a number of heads, or None. A level
            has as many heads as fit; it has no attention if none fits.
        dropout: dropout probability within the residual blocks.
        num_classes: number of classes, or None for a network without classes.
        condition_features: size of a condition vector, such as augmentation labels, or None.
        low_res_channels: number of channels of a low-resolution image that is a second input of
            the network, or None: for super-resolution.
        scale_shift: whether the embedding scales and shifts the output of the second
            normalization of a residual block, rather than being added before it.
        group_channels: least number of channels per normalization group; there are at most
            32 groups. With one channel per group and no scale, normalization would remove the
            noise embedding.
        resblock_updown: whether residual blocks resample, rather than separate layers.
        resample_with_conv: whether those separate layers have a convolution.
        data_range: range of the data, which is mapped to [-1, 1] first.
        activation_checkpointing: whether activations are recomputed in the backward pass instead
            of stored: less memory, more time, the same gradient. Not supported under
            transforms of torch.func.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if an argument is out of range.

    Source: A. Nichol, P. Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, arXiv
    2102.09672; P. Dhariwal, A. Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv
    2105.05233.

    >>> import torch
    >>> from diffusionkit.networks import ADMUNet
    >>> net = ADMUNet(
    ...     1, width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,)
    ... )
    >>> net(torch.randn(4, 1, 8, 12), torch.tensor([0, 10, 500, 999])).shape
    torch.Size([4, 2, 8, 12])
    """

    @remembers
    def __init__(
        self,
        channels: int = 3,
        *,
        out_channels: int | None = None,
        learn_sigma: bool = True,
        dims: int = 2,
        width: int = 128,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 3,
        attention_levels: Sequence[int] | None = None,
        heads: int = 4,
        decoder_heads: int | None = None,
        head_channels: int | None = None,
        dropout: float = 0.0,
        num_classes: int | None = None,
        condition_features: int | None = None,
        low_res_channels: int | None = None,
        scale_shift: bool = True,
        group_channels: int = 4,
        resblock_updown: bool = False,
        resample_with_conv: bool = True,
        data_range: tuple[float, float] = (-1.0, 1.0),
        activation_checkpointing: bool = False,
    ) -> None:
        check_counts(channels=channels)
        check_optional_counts(out_channels=out_channels)
        attention_levels = default_levels(attention_levels, (1, 2), multipliers)
        self.config["attention_levels"] = attention_levels
        widths = check_layout(dims, width, multipliers, attention_levels)
        check_dropout(dropout)
        decoder_heads = heads if decoder_heads is None else decoder_heads
        check_counts(heads=heads, decoder_heads=decoder_heads, group_channels=group_channels)
        check_optional_counts(head_channels=head_channels)
        check_flags(
            learn_sigma=learn_sigma,
            scale_shift=scale_shift,
            resblock_updown=resblock_updown,
            resample_with_conv=resample_with_conv,
        )
        out = (channels if out_channels is None else out_channels) * (2 if learn_sigma else 1)
        style = Style(
            dims,
            embedding_width=4 * width,
            dropout=dropout,
            rescale=False,
            adaptive_scale=scale_shift,
            group_channels=group_channels,
            eps=1e-5,
            initialize=default_or_zero_,
        )

        def attention(c: int, decoding: bool) -> nn.Module | None:
            count = decoder_heads if decoding else heads
            if head_channels is not None:
                count = c // head_channels
            return SelfAttention(c, style, heads=count) if count else None

        def down(c: int) -> nn.Module:
            if resblock_updown:
                return ResidualBlock(c, c, style, resample=Downsample())
            return ConvDownsample(c, c, style, pad_front=1) if resample_with_conv else Downsample()

        def up(c: int) -> nn.Module:
            if resblock_updown:
                return ResidualBlock(c, c, style, resample=Upsample())
            return ConvUpsample(c, c, style) if resample_with_conv else Upsample()

        super().__init__(
            channels,
            out_channels=out,
            low_res_channels=low_res_channels,
            style=style,
            input_width=widths[0],
            widths=widths,
            blocks=blocks,
            attention_levels=attention_levels,
            attend_all=True,
            embedding=ConditionEmbedding(
                PositionalEmbedding(width, endpoint=False),
                width,
                4 * width,
                num_classes=num_classes,
                condition_features=condition_features,
                late_classes=True,
                style=style,
            ),
            block=partial(ResidualBlock, style=style),
            attention=attention,
            down=down,
            up=up,
            head=lambda c: Head(c, out, style),
            data_range=data_range,
            activation_checkpointing=activation_checkpointing,
        )

    @classmethod
    def cifar10(cls, **options: Any) -> Self:
        """Build the network of improved DDPM for CIFAR-10, data in [-1, 1].

        52,546,438 parameters.
        """
        return cls(**{"dropout": 0.3} | options)

    @classmethod
    def improved_imagenet64(cls, *, large: bool = False, **options: Any) -> Self:
        """Build the network of improved DDPM for ImageNet of 64 pixels, data in [-1, 1].

        Args:
            large: whether to build the class-conditional network of 270 million parameters.
            **options: options that replace the published ones.
        """
        published: dict[str, Any] = {"multipliers": (1, 2, 3, 4), "attention_levels": (2, 3)}
        if large:
            published |= {"width": 192, "num_classes": 1000}
        return cls(**published | options)

    @classmethod
    def improved_lsun_256(cls, **options: Any) -> Self:
        """Build the network of improved DDPM for LSUN of 256 pixels, data in [-1, 1]."""
        published: dict[str, Any] = {
            "multipliers": (1, 1, 2, 2, 4, 4),
            "blocks": 2,
            "attention_levels": (4,),
            "heads": 1,
            "scale_shift": False,
        }
        return cls(**published | options)

    @classmethod
    def imagenet64(cls, **options: Any) -> Self:
        """Build ADM for ImageNet of 64 pixels, class-conditional, data in [-1, 1].

        295.90 million parameters.
        """
        published: dict[str, Any] = {
            "width": 192,
            "multipliers": (1, 2, 3, 4),
            "attention_levels": (1, 2, 3),
            "head_channels": 64,
            "dropout": 0.1,
            "num_classes": 1000,
            "resblock_updown": True,
        }
        return cls(**published | options)

    @classmethod
    def imagenet128(cls, **options: Any) -> Self:
        """Build ADM for ImageNet of 128 pixels, class-conditional, data in [-1, 1].

        421.53 million parameters.
        """
        published: dict[str, Any] = {
            "multipliers": (1, 1, 2, 3, 4),
            "attention_levels": (2, 3, 4),
            "heads": 4,
        }
        return cls.imagenet256(**published | {"head_channels": None} | options)

    @classmethod
    def imagenet256(cls, **options: Any) -> Self:
        """Build ADM for ImageNet of 256 pixels, class-conditional, data in [-1, 1].

        553.84 million parameters; num_classes=None makes it unconditional.
        """
        published: dict[str, Any] = {
            "width": 256,
            "multipliers": (1, 1, 2, 2, 4, 4),
            "blocks": 2,
            "attention_levels": (3, 4, 5),
            "head_channels": 64,
            "num_classes": 1000,
            "resblock_updown": True,
        }
        return cls(**published | options)

    @classmethod
    def imagenet512(cls, **options: Any) -> Self:
        """Build ADM for ImageNet of 512 pixels, class-conditional, data in [-1, 1].

        559.00 million parameters.
        """
        published: dict[str, Any] = {
            "multipliers": (0.5, 1, 1, 2, 2, 4, 4),
            "attention_levels": (4, 5, 6),
        }
        return cls.imagenet256(**published | options)

    @classmethod
    def edm_imagenet64(cls, **options: Any) -> Self:
        """Build the ADM of Karras et al., 2022, for ImageNet of 64 pixels, without a variance.

        For `EDMModel`.
        """
        return cls.imagenet64(**{"learn_sigma": False} | options)
