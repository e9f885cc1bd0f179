"""Residual blocks, attention and resampling for feature maps of any dimension."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionkit.networks.layers import conv, group_norm, linear, variance_scaling_

_AVG_POOL: dict[int, Callable[[Tensor, int], Tensor]] = {
    1: F.avg_pool1d,
    2: F.avg_pool2d,
    3: F.avg_pool3d,
}


def upsample_nearest(x: Tensor) -> Tensor:
    r"""Double every spatial size by repeating each entry.

    Args:
        x: Feature map (B, C, \*spatial) of 1 to 3 spatial dimensions.

    Returns:
        Feature map (B, C, \*(2 spatial)).
    """
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample_mean(x: Tensor) -> Tensor:
    r"""Halve every spatial size by averaging neighbours (2 x 2 of them in images).

    Args:
        x: Feature map (B, C, \*spatial) of 1 to 3 spatial dimensions, of even sizes.

    Returns:
        Feature map (B, C, \*(spatial / 2)).
    """
    return _AVG_POOL[x.ndim - 2](x, 2)


class ResidualBlock(nn.Module):
    r"""BigGAN residual block, conditioned on an embedding added between its convolutions.

    .. math::
        h &= \mathrm{conv}_1(r(\mathrm{SiLU}(\mathrm{GN}(x)))) + L(\mathrm{SiLU}(\mathrm{emb})) \\
        h &= \mathrm{conv}_2(\mathrm{dropout}(\mathrm{SiLU}(\mathrm{GN}(h)))) \\
        \mathrm{out} &= (\mathrm{shortcut}(r(x)) + h) / \sqrt 2

    where r is the resampling, if any, and the shortcut is a 1x1 convolution if the channels
    change or there is a resampling, else the identity.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        embedding_width: Number of channels of the embedding.
        dims: Number of spatial dimensions.
        dropout: Dropout probability.
        resample: Resampling of both branches, a map of feature maps, or None.

    Source:
        Y. Song et al., Score-Based Generative Modeling through Stochastic Differential
        Equations, 2021, https://arxiv.org/abs/2011.13456, after A. Brock et al., Large Scale
        GAN Training for High Fidelity Natural Image Synthesis, 2019,
        https://arxiv.org/abs/1809.11096.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_width: int,
        dims: int,
        dropout: float,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Build the layers."""
        super().__init__()
        self.resample = resample
        self.norm_1 = group_norm(in_channels)
        self.conv_1 = conv(dims, in_channels, out_channels)
        self.embedding = linear(embedding_width, out_channels)
        self.norm_2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(dims, out_channels, out_channels, scale=0)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or resample is not None:
            self.shortcut = conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        r"""Apply the block.

        Args:
            x: Feature map (B, in_channels, \*spatial).
            emb: Embedding (B, embedding_width).

        Returns:
            Feature map (B, out_channels, \*resampled).
        """
        h: Tensor = F.silu(self.norm_1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        bias: Tensor = self.embedding(F.silu(emb))
        h = self.conv_1(h) + bias.reshape(bias.shape + (1,) * (x.ndim - 2))
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        x = self.shortcut(x)
        return (x + h) / math.sqrt(2)


class SelfAttention(nn.Module):
    r"""Residual self-attention with one head over all spatial positions.

    .. math::
        q, k, v = \mathrm{GN}(x) W_{qkv}, \qquad
        \mathrm{out} = (x + \mathrm{softmax}(q k^\top / \sqrt C)\, v\, W_o) / \sqrt 2

    The attention is torch's fused one. Its second derivatives exist only under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``; without it, torch raises an error.

    Args:
        channels: Number C of channels.

    Source:
        J. Ho et al., Denoising Diffusion Probabilistic Models, 2020,
        https://arxiv.org/abs/2006.11239; rescaling by Y. Song et al., 2021,
        https://arxiv.org/abs/2011.13456.
    """

    def __init__(self, channels: int) -> None:
        """Build the layers."""
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = linear(channels, 3 * channels)
        for weight in self.qkv.weight.chunk(3):  # three square maps, each with its own fans
            variance_scaling_(weight, 0.1)
        self.out = linear(channels, channels, scale=0)

    def forward(self, x: Tensor) -> Tensor:
        r"""Apply the attention.

        Args:
            x: Feature map (B, channels, \*spatial).

        Returns:
            Feature map of the same shape.
        """
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        h: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return (x + h.transpose(1, 2).reshape(x.shape)) / math.sqrt(2)


class Stage(nn.Module):
    """A conditioned block and, if given, an attention after it.

    Args:
        block: Module of a feature map and an embedding.
        attention: Module of a feature map, or None.
    """

    def __init__(self, block: nn.Module, attention: nn.Module | None) -> None:
        """Join block and attention."""
        super().__init__()
        self.block = block
        self.attention = nn.Identity() if attention is None else attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        r"""Apply block and attention.

        Args:
            x: Feature map (B, C, \*spatial).
            emb: Embedding (B, embedding_width).

        Returns:
            Feature map.
        """
        h: Tensor = self.attention(self.block(x, emb))
        return h


class EncoderLevel(nn.Module):
    """The stages of one resolution on the way down.

    Args:
        stages: The stages, in order.
    """

    def __init__(self, stages: list[Stage]) -> None:
        """Keep the stages."""
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, h: Tensor, emb: Tensor) -> list[Tensor]:
        r"""Apply the stages.

        Args:
            h: Feature map (B, C, \*spatial).
            emb: Embedding (B, embedding_width).

        Returns:
            The feature map after each stage.
        """
        outputs = []
        for stage in self.stages:
            h = stage(h, emb)
            outputs.append(h)
        return outputs


class DecoderLevel(nn.Module):
    """The stages of one resolution on the way up, each of which takes one skip.

    Args:
        stages: The stages, in order.
    """

    def __init__(self, stages: list[Stage]) -> None:
        """Keep the stages."""
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        r"""Apply the stages, each to the feature map joined to the last skip left.

        Args:
            h: Feature map (B, C, \*spatial).
            emb: Embedding (B, embedding_width).
            skips: Feature maps of the encoder; those used are taken off the end.

        Returns:
            Feature map.
        """
        for stage in self.stages:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return h
