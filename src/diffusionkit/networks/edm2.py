"""The magnitude-preserving U-Net of EDM2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self, cast

from torch import nn

from .._checks import check_choice, check_number, check_positive
from .._magnitude import mp_cat
from ._arguments import (
    check_counts,
    check_dropout,
    check_layout,
    check_optional_counts,
    default_levels,
)
from .config import remembers
from .layers import Style
from .mp_blocks import CosineAttention, MPBlock, MPEmbedding, MPHead, MPInput
from .resampling import Downsample, Upsample
from .unet import Stage, UNet

Size = Literal["xxs", "xs", "s", "m", "l", "xl", "xxl"]
_WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
_SMALL = ("xxs", "xs", "s")  # trained without dropout


class EDM2UNet(UNet):
    r"""The magnitude-preserving U-Net of EDM2, its configuration G.

    Maps :math:`(x, l) \mapsto F(x, l)`, zero at initialization, for `EDMModel`: the input has
    magnitude one and the noise label l = log(sigma) / 4. The weights of all layers have magnitude
    one, there are no biases and no group normalization, and activations keep magnitude one by
    construction. Call `normalize_weights` in every training step.

    Class methods build the published networks; their `options` replace the published ones.

    Args:
        channels: number of input channels.
        out_channels: number of output channels; as many as input channels if None.
        dims: number of spatial dimensions, 1, 2 or 3.
        width: number of channels that the multipliers multiply, even and at least 4.
        multipliers: channels of each level over `width`; each level halves the resolution.
        blocks: number of residual blocks per level.
        attention_levels: indices of the levels with attention; 0 is the full resolution. None
            for 2 and 3, as far as the network has as many levels.
        head_channels: number of channels per attention head. A level has as many heads as fit; it
            has no attention if none fits.
        dropout: dropout probability within the residual blocks.
        num_classes: number of classes, or None for a network without classes.
        condition_features: size of a condition vector, of magnitude one, or None.
        low_res_channels: number of channels of a low-resolution image that is a second input of
            the network, or None: for super-resolution.
        label_balance: weight of the class against the noise label, within [0, 1], and of the
            condition vector against both.
        concat_balance: weight of a skip connection against the features of the decoder.
        res_balance: weight of the residual branch of a block.
        attn_balance: weight of an attention.
        clip_act: largest magnitude of an activation after a block, or None.
        data_range: range of the data, which is mapped to [-1, 1] first; with `EDMModel`, keep the
            default.
        activation_checkpointing: whether activations are recomputed in the backward pass instead
            of stored: less memory, more time, the same gradient. Not supported under
            transforms of torch.func.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if an argument is out of range.

    Source: T. Karras, M. Aittala, J. Lehtinen, J. Hellsten, T. Aila, S. Laine, Analyzing and
    Improving the Training Dynamics of Diffusion Models, 2024, arXiv 2312.02696.

    >>> import torch
    >>> from diffusionkit.networks import EDM2UNet
    >>> net = EDM2UNet(
    ...     1, width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,)
    ... )
    >>> label = torch.tensor([-1.5, 0.0, 0.3, 1.0])
    >>> net(torch.randn(4, 1, 8, 12), label).shape
    torch.Size([4, 1, 8, 12])
    """

    @remembers
    def __init__(
        self,
        channels: int = 3,
        *,
        out_channels: int | None = None,
        dims: int = 2,
        width: int = 192,
        multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks: int = 3,
        attention_levels: Sequence[int] | None = None,
        head_channels: int = 64,
        dropout: float = 0.0,
        num_classes: int | None = None,
        condition_features: int | None = None,
        low_res_channels: int | None = None,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        data_range: tuple[float, float] = (-1.0, 1.0),
        activation_checkpointing: bool = False,
    ) -> None:
        check_counts(channels=channels, head_channels=head_channels)
        check_optional_counts(out_channels=out_channels)
        attention_levels = default_levels(attention_levels, (2, 3), multipliers)
        self.config["attention_levels"] = attention_levels
        widths = check_layout(dims, width, multipliers, attention_levels)
        check_dropout(dropout)
        _check_balances(
            label_balance=label_balance,
            concat_balance=concat_balance,
            res_balance=res_balance,
            attn_balance=attn_balance,
        )
        if clip_act is not None:
            check_positive(clip_act, "clip_act")
        make = partial(
            MPBlock,
            width=max(widths),
            dims=dims,
            dropout=dropout,
            balance=res_balance,
            clip=clip_act,
        )

        def attention(c: int, decoding: bool) -> nn.Module | None:
            heads = c // head_channels
            if not heads:
                return None
            return CosineAttention(c, heads=heads, balance=attn_balance, clip=clip_act)

        out = channels if out_channels is None else out_channels
        super().__init__(
            channels,
            out_channels=out,
            low_res_channels=low_res_channels,
            style=Style(dims),
            input_width=widths[0],
            widths=widths,
            blocks=blocks,
            attention_levels=attention_levels,
            attend_all=True,
            embedding=MPEmbedding(
                widths[0],
                max(widths),
                num_classes=num_classes,
                condition_features=condition_features,
                balance=label_balance,
            ),
            input_layer=partial(MPInput, dims=dims),
            block=partial(make, decoding=False),
            decoder_block=partial(make, decoding=True),
            attention=attention,
            down=lambda c: make(c, c, decoding=False, resample=Downsample()),
            up=lambda c: make(c, c, decoding=True, resample=Upsample()),
            concatenate=partial(mp_cat, t=concat_balance),
            head=lambda c: MPHead(c, out, dims),
            data_range=data_range,
            activation_checkpointing=activation_checkpointing,
        )
        for stage in self.modules():
            if isinstance(stage, Stage) and stage.attention is not None:
                cast(MPBlock, stage.block).clip = None  # clipped once, after the attention

    @classmethod
    def imagenet512(cls, size: Size = "s", **options: Any) -> Self:
        """Build the network for ImageNet of 512 pixels, class-conditional.

        It takes latents of 4 channels and 64 x 64 positions, of the autoencoder of Stable
        Diffusion, with mean 0 and standard deviation 0.5. With num_classes=None it is the
        unconditional one.

        Args:
            size: "xs", "s", "m", "l", "xl" or "xxl", with 125, 280, 498, 777, 1119 and 1523 million
                parameters, or "xxs", with 31 million.
            **options: options that replace the published ones.
        """
        return cls(**{"channels": 4} | _published(size, tuple(_WIDTHS)) | options)

    @classmethod
    def imagenet64(cls, size: Size = "s", **options: Any) -> Self:
        """Build the network for ImageNet of 64 pixels, class-conditional, data in [-1, 1].

        Args:
            size: "xs", "s", "m", "l" or "xl", as in `imagenet512`.
            **options: options that replace the published ones.
        """
        return cls(**_published(size, ("xs", "s", "m", "l", "xl")) | options)


def _published(size: str, sizes: Sequence[str]) -> dict[str, Any]:
    """Return the options of a published network."""
    check_choice("size", size, sizes)
    dropout = 0.0 if size in _SMALL else 0.1
    return {"width": _WIDTHS[size], "dropout": dropout, "num_classes": 1000}


def _check_balances(**values: float) -> None:
    """Raise unless the weights of magnitude-preserving sums are in [0, 1]."""
    for name, value in values.items():
        check_number(value, name)
        if not 0 <= value <= 1 or math.isnan(value):
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
