"""NCSN++, the U-Net of which DDPM++ and DDPM are special cases."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, Self

from torch import nn

from .._checks import check_choice, check_positive
from ._arguments import (
    check_counts,
    check_dropout,
    check_fir_kernel,
    check_flags,
    check_layout,
    default_levels,
)
from .blocks import ResidualBlock, SelfAttention
from .config import remembers
from .embeddings import LabelEmbedding, SigmaTable, make_embedding
from .layers import ACTIVATIONS, Style
from .progressive import Head, InputResidual, InputSkip, OutputResidual, OutputSkip, OutputStart
from .resampling import ConvDownsample, ConvUpsample, Downsample, Upsample
from .unet import UNet

logger = logging.getLogger(__name__)


class NCSNpp(UNet):
    r"""NCSN++: the U-Net of Song et al., 2021, with all options of its tables.

    Maps :math:`(x, l) \mapsto F(x, l)` with F of the shape of x (or of `out_channels` channels).
    Close to zero at initialization. The default arguments are the continuous CIFAR-10 network of
    the variance-exploding process (62,758,915 parameters for 3 channels): its noise label l is
    the noise level sigma, which divides the output; `DDPMpp` and `DDPMUNet` are the same
    network with other defaults.

    Class methods build the published networks; their `options` replace the published ones.

    Args:
        channels: number of input channels.
        out_channels: number of output channels; as many as input channels if None.
        dims: number of spatial dimensions, 1, 2 or 3.
        width: number of channels of the first level, even and at least 4.
        multipliers: channels of each level over `width`; each level halves the resolution.
        blocks: number of residual blocks per level.
        attention_levels: indices of the levels with attention; 0 is the full resolution. None
            for 1, the second, as far as the network has as many levels.
        dropout: dropout probability within the residual blocks.
        num_classes: number of classes, or None for a network without classes.
        condition_features: size of a condition vector, such as augmentation labels, or None.
        low_res_channels: number of channels of a low-resolution image that is a second input of
            the network, or None.
        embedding: the embedding of the noise label: "fourier", random Fourier features of its
            logarithm, for labels sigma; "fourier_linear", those of the label itself;
            "positional", sines and cosines, for labels in the range of a step index; None for a
            network that ignores the label.
        fourier_scale: standard deviation of the frequencies of the Fourier features.
        resblock: "biggan" for residual blocks that resample, "ddpm" for separate layers for up-
            and downsampling.
        fir_kernel: one-dimensional FIR kernel of all resampling, or None to repeat entries and
            take means.
        resample_with_conv: whether the separate layers of "ddpm" have a convolution.
        progressive: the output branch: "none", the output of the last level; "output_skip", the
            sum of the upsampled outputs of all levels; "residual", a convolutional branch that
            replaces the features.
        progressive_input: the input branch: "none", the input enters at the first level only;
            "input_skip", it is downsampled and combined with the features of every level;
            "residual", a convolutional branch of it replaces the features.
        progressive_combine: "sum" to add, "cat" to concatenate the branch of "input_skip".
        skip_rescale: whether sums of two branches are divided by sqrt(2).
        adaptive_scale: whether the embedding scales and shifts the output of the second
            normalization of a residual block, rather than being added before it.
        group_channels: least number of channels per normalization group; there are at most
            32 groups. With one channel per group and no scale, normalization would remove the
            noise embedding.
        activation: activation function of all layers; "leaky_relu" with a slope of 0.2.
        scale_by_sigma: whether the output is divided by the noise level.
        sigmas: noise levels by index, if the noise label is an index and not the level itself.
        data_range: range of the data, which is mapped to [-1, 1] first.
        activation_checkpointing: whether activations are recomputed in the backward pass instead
            of stored: less memory, more time, the same gradient. Not supported under
            transforms of torch.func.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if an argument is out of range.

    Source: Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based
    Generative Modeling through Stochastic Differential Equations, 2021, arXiv 2011.13456.

    >>> import torch
    >>> from diffusionkit import VESDE, RawScoreModel
    >>> from diffusionkit.networks import NCSNpp
    >>> net = NCSNpp(channels=1, width=8, multipliers=(1, 2), blocks=1)
    >>> model = RawScoreModel(net, VESDE(sigma_max=50.0))
    >>> model(torch.randn(4, 1, 8, 12), torch.rand(4)).shape
    torch.Size([4, 1, 8, 12])
    """

    @remembers
    def __init__(
        self,
        channels: int = 3,
        *,
        out_channels: int | None = None,
        dims: int = 2,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention_levels: Sequence[int] | None = None,
        dropout: float = 0.1,
        num_classes: int | None = None,
        condition_features: int | None = None,
        low_res_channels: int | None = None,
        embedding: LabelEmbedding | None = "fourier",
        fourier_scale: float = 16.0,
        resblock: Literal["biggan", "ddpm"] = "biggan",
        fir_kernel: Sequence[float] | None = (1, 3, 3, 1),
        resample_with_conv: bool = True,
        progressive: Literal["none", "output_skip", "residual"] = "none",
        progressive_input: Literal["none", "input_skip", "residual"] = "residual",
        progressive_combine: Literal["sum", "cat"] = "sum",
        skip_rescale: bool = True,
        adaptive_scale: bool = False,
        group_channels: int = 4,
        activation: Literal["silu", "relu", "elu", "leaky_relu"] = "silu",
        scale_by_sigma: bool = True,
        sigmas: Sequence[float] | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
        activation_checkpointing: bool = False,
    ) -> None:
        attention_levels = default_levels(attention_levels, (1,), multipliers)
        self.config["attention_levels"] = attention_levels
        widths = check_layout(dims, width, multipliers, attention_levels)
        check_dropout(dropout)
        check_counts(channels=channels, group_channels=group_channels)
        check_flags(
            resample_with_conv=resample_with_conv,
            skip_rescale=skip_rescale,
            adaptive_scale=adaptive_scale,
            scale_by_sigma=scale_by_sigma,
        )
        check_positive(fourier_scale, "fourier_scale")
        check_fir_kernel(fir_kernel)
        check_choice("embedding", embedding, ("fourier", "fourier_linear", "positional", None))
        check_choice("resblock", resblock, ("biggan", "ddpm"))
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("progressive", progressive, ("none", "output_skip", "residual"))
        check_choice("progressive_input", progressive_input, ("none", "input_skip", "residual"))
        check_choice("progressive_combine", progressive_combine, ("sum", "cat"))
        if embedding is None and (num_classes is not None or condition_features is not None):
            raise ValueError("embedding: expected one for classes or conditions, got None")
        out = channels if out_channels is None else out_channels
        style = Style(
            dims,
            embedding_width=None if embedding is None else 4 * width,
            dropout=dropout,
            rescale=skip_rescale,
            adaptive_scale=adaptive_scale,
            group_channels=group_channels,
            activation=ACTIVATIONS[activation],
        )

        single = [c for c in widths if style.norm(c).num_groups == c]
        if embedding is not None and not adaptive_scale and single:
            logger.warning(
                "with one channel per group, normalization removes the noise embedding at levels "
                "of %s channels; group_channels=4 avoids this",
                single,
            )

        def block(c: int, out: int) -> nn.Module:
            # Ho et al. initialize the 1x1 shortcuts like the linear maps of the attention.
            scale = 0.1 if resblock == "ddpm" else 1.0
            return ResidualBlock(c, out, style, shortcut_scale=scale)

        def down(c: int) -> nn.Module:
            if resblock == "biggan":
                return ResidualBlock(c, c, style, resample=Downsample(fir_kernel), project=True)
            if resample_with_conv:
                return ConvDownsample(c, c, style, fir_kernel)
            return Downsample(fir_kernel)

        def up(c: int) -> nn.Module:
            if resblock == "biggan":
                return ResidualBlock(c, c, style, resample=Upsample(fir_kernel), project=True)
            if resample_with_conv:
                return ConvUpsample(c, c, style, fir_kernel)
            return Upsample(fir_kernel)

        def input_branch(c: int, width: int) -> nn.Module:
            if progressive_input == "residual":
                return InputResidual(c, width, style, fir_kernel)
            return InputSkip(c, width, style, fir_kernel, progressive_combine)

        def output_branch(c: int | None, width: int) -> nn.Module:
            if progressive == "output_skip":
                return OutputSkip(width, out, style, fir_kernel)
            if c is None:
                return OutputStart(width, style)
            return OutputResidual(c, width, style, fir_kernel)

        noise_level = nn.Identity() if sigmas is None else SigmaTable(sigmas)
        super().__init__(
            channels,
            out_channels=out,
            low_res_channels=low_res_channels,
            style=style,
            input_width=width,
            widths=widths,
            blocks=blocks,
            attention_levels=attention_levels,
            attend_all=False,
            embedding=make_embedding(
                embedding, width, style, float(fourier_scale), num_classes, condition_features
            ),
            block=block,
            attention=lambda c, decoding: SelfAttention(c, style),
            down=down,
            up=up,
            input_branch=None if progressive_input == "none" else input_branch,
            output_branch=None if progressive == "none" else output_branch,
            head=None if progressive == "output_skip" else lambda c: Head(c, out, style),
            noise_level=noise_level if scale_by_sigma else None,
            data_range=data_range,
            activation_checkpointing=activation_checkpointing,
        )

    @classmethod
    def cifar10(cls, *, deep: bool = False, **options: Any) -> Self:
        """Build the network for CIFAR-10 and the continuous VE process, data in [0, 1].

        Args:
            deep: whether each level has 8 blocks rather than 4.
            **options: options that replace the published ones.

        Returns:
            The network: 62,758,915 parameters (107,587,075 if deep); noise label: sigma.
        """
        published: dict[str, Any] = {"blocks": 8 if deep else 4, "data_range": (0.0, 1.0)}
        return cls(**published | options)

    @classmethod
    def cifar10_vp(cls, *, deep: bool = False, **options: Any) -> Self:
        """Build the network for CIFAR-10 and the VP or sub-VP process, data in [-1, 1].

        Args:
            deep: whether each level has 8 blocks rather than 4.
            **options: options that replace the published ones.

        Returns:
            The network: 62,693,251 parameters unless deep; noise label: 999 t; output: the noise.
        """
        published: dict[str, Any] = {
            "blocks": 8 if deep else 4,
            "embedding": "positional",
            "scale_by_sigma": False,
        }
        return cls(**published | options)

    @classmethod
    def cifar10_smld(cls, *, sigma_max: float = 50.0, **options: Any) -> Self:
        """Build the network for CIFAR-10 and 1000 discrete VE levels, data in [0, 1].

        Args:
            sigma_max: largest noise level.
            **options: options that replace the published ones.

        Returns:
            The network: 62,693,251 parameters; noise label: index of the level, largest first.
        """
        published: dict[str, Any] = {
            "embedding": "positional",
            "sigmas": tuple(sigma_max * (0.01 / sigma_max) ** (i / 999) for i in range(1000)),
            "data_range": (0.0, 1.0),
        }
        return cls(**published | options)

    @classmethod
    def celeba_64_smld(cls, **options: Any) -> Self:
        """Build the network for CelebA of 64 pixels and 1000 discrete VE levels, data in [0, 1].

        62,693,251 parameters; noise label: index of the level, largest first.
        """
        return cls.cifar10_smld(sigma_max=90.0, **{"attention_levels": (2,)} | options)

    @classmethod
    def celebahq_256(cls, **options: Any) -> Self:
        """Build the network for CelebA-HQ of 256 pixels and VE, data in [0, 1].

        65,574,549 parameters; noise label: sigma.
        """
        published: dict[str, Any] = {
            "multipliers": (1, 1, 2, 2, 2, 2, 2),
            "blocks": 2,
            "attention_levels": (4,),
            "dropout": 0.0,
            "progressive": "output_skip",
            "progressive_input": "input_skip",
            "data_range": (0.0, 1.0),
        }
        return cls(**published | options)

    @classmethod
    def ffhq_256(cls, **options: Any) -> Self:
        """Build the network for FFHQ of 256 pixels, the same as `celebahq_256`."""
        return cls.celebahq_256(**options)

    @classmethod
    def lsun_256(cls, **options: Any) -> Self:
        """Build the network for LSUN of 256 pixels, the same as `celebahq_256`."""
        return cls.celebahq_256(**options)

    @classmethod
    def celebahq_1024(cls, **options: Any) -> Self:
        """Build the network for CelebA-HQ of 1024 pixels and VE, data in [0, 1].

        105,785,896 parameters; noise label: sigma.
        """
        published: dict[str, Any] = {
            "width": 16,
            "multipliers": (1, 2, 4, 8, 16, 32, 32, 32),
            "blocks": 1,
            "attention_levels": (6,),
        }
        return cls.celebahq_256(**published | options)

    @classmethod
    def ffhq_1024(cls, **options: Any) -> Self:
        """Build the network for FFHQ of 1024 pixels, the same as `celebahq_1024`."""
        return cls.celebahq_1024(**options)

    @classmethod
    def edm_cifar10(cls, **options: Any) -> Self:
        """Build the "ncsnpp" network of Karras et al., 2022, for CIFAR-10, data in [-1, 1].

        For `EDMModel`; the condition is a vector of 9 augmentation labels; num_classes=10 makes
        it class-conditional.
        """
        published: dict[str, Any] = {
            "multipliers": (2, 2, 2),
            "dropout": 0.13,
            "embedding": "fourier_linear",
            "scale_by_sigma": False,
            "condition_features": 9,
        }
        return cls(**published | options)

    @classmethod
    def edm_image_64(cls, **options: Any) -> Self:
        """Build the network of Karras et al., 2022, for FFHQ and AFHQv2 of 64 pixels.

        For `EDMModel`; the condition is a vector of 9 augmentation labels.
        """
        published: dict[str, Any] = {
            "multipliers": (1, 2, 2, 2),
            "attention_levels": (2,),
            "dropout": 0.05,
        }
        return cls.edm_cifar10(**published | options)
