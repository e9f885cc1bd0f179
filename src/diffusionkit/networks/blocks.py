"""Residual block and self-attention of the U-Nets."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .dropout import Dropout
from .layers import Style


class ResidualBlock(nn.Module):
    r"""Residual block of two convolutions, conditioned on an embedding between them.

    .. math::
        h &= \mathrm{conv}_1(r(\mathrm{SiLU}(\mathrm{GN}(x)))) \\
        h &= \mathrm{SiLU}(\mathrm{GN}(h + L(\mathrm{emb})))
            \quad\text{or}\quad \mathrm{SiLU}(\mathrm{GN}(h)(1 + a) + b), \;
            (a, b) = L(\mathrm{emb}) \\
        \mathrm{out} &= \mathrm{join}(\mathrm{shortcut}(r(x)), \mathrm{conv}_2(\mathrm{dropout}(h)))

    where r is the resampling, if any. The style selects one of the two forms of conditioning,
    the activation, and whether the sum of the branches (join) is divided by sqrt(2).

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        style: settings shared by the network's blocks.
        resample: resampling of both branches, or None.
        project: whether the shortcut is a 1x1 convolution even for equal numbers of channels.
        shortcut_scale: scale passed to the initializer of that convolution.

    Source: J. Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239;
    resampling: A. Brock et al., Large Scale GAN Training for High Fidelity Natural Image
    Synthesis, 2019, arXiv 1809.11096, and Y. Song et al., 2021, arXiv 2011.13456; adaptive scale:
    A. Nichol, P. Dhariwal, 2021, arXiv 2102.09672.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: Style,
        *,
        resample: nn.Module | None = None,
        project: bool = False,
        shortcut_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.style = style
        self.resample = resample
        self.norm_1 = style.norm(in_channels)
        self.conv_1 = style.conv(in_channels, out_channels)
        self.embedding: nn.Linear | None = None
        if style.embedding_width is not None:
            features = 2 * out_channels if style.adaptive_scale else out_channels
            self.embedding = style.linear(style.embedding_width, features)
        self.norm_2 = style.norm(out_channels)
        self.dropout = Dropout(style.dropout)
        self.conv_2 = style.conv(out_channels, out_channels, scale=0)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or project:
            self.shortcut = style.conv(in_channels, out_channels, 1, scale=shortcut_scale)

    @override
    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        r"""Return features (B, out_channels, \*resampled).

        Args:
            x: features (B, in_channels, \*spatial).
            emb: embedding (B, embedding_width), or None if the network has none.
        """
        h = self.style.activation(self.norm_1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self._normalize(self.conv_1(h), emb)
        h = self.conv_2(self.dropout(self.style.activation(h)))
        return self.style.join(self.shortcut(x), h)

    def _normalize(self, h: Tensor, emb: Tensor | None) -> Tensor:
        if self.embedding is None or emb is None:
            normal: Tensor = self.norm_2(h)
            return normal
        shift: Tensor = self.embedding(emb)
        shift = shift.reshape(shift.shape + (1,) * (h.ndim - 2))
        if not self.style.adaptive_scale:
            normal = self.norm_2(h + shift)
            return normal
        scale, shift = shift.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm_2(h), 1 + scale)


class SelfAttention(nn.Module):
    r"""Residual self-attention over all spatial positions.

    .. math::
        q, k, v = \mathrm{GN}(x) W_{qkv}, \qquad
        \mathrm{out} = \mathrm{join}(x, \mathrm{softmax}(q k^\top / \sqrt{C / H})\, v\, W_o)

    with H heads of C / H channels; q, k and v are each ordered by head. Computed by torch's fused
    attention, whose second derivatives require
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``; otherwise torch raises an error.

    Args:
        channels: number C of channels.
        style: settings shared by the network's blocks.
        heads: number H of heads.

    Raises:
        ValueError: if the heads do not divide the channels.

    Source: J. Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239; heads:
    A. Nichol, P. Dhariwal, 2021, arXiv 2102.09672.
    """

    def __init__(self, channels: int, style: Style, *, heads: int = 1) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of {channels} channels, got {heads}")
        self.style = style
        self.heads = heads
        self.norm = style.norm(channels)
        self.qkv = style.linear(channels, 3 * channels, scale=0.2)  # 0.1 for each of q, k, v
        self.out = style.linear(channels, channels, scale=0)

    @override
    def forward(self, x: Tensor) -> Tensor:
        r"""Map features (B, channels, \*spatial) to features of the same shape."""
        tokens = rearrange(self.norm(x), "b c ... -> b (...) c").contiguous()
        q, k, v = rearrange(self.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        h = self.out(h).transpose(1, 2).reshape(x.shape)
        return self.style.join(x, h)
