"""The networks that condition a flow: gated convolutions and attention."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

_CONVOLUTIONS = (nn.Conv1d, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def conv(dims: int, inputs: int, outputs: int, size: int = 3) -> nn.Module:
    """Return a convolution over `dims` spatial dimensions that preserves their sizes.

    Vectors, dims = 0, are feature maps with one position: the convolution is a linear layer.
    """
    size = size if dims else 1
    return _CONVOLUTIONS[dims](inputs, outputs, size, padding=size // 2)


class GatedBlock(nn.Module):
    """A residual block of two convolutions and a gated linear unit.

    Args:
        dims: the number of spatial dimensions.
        width: the number of channels.

    Source: Ho et al., Flow++, 2019, arXiv 1902.00275 (section 3.3).
    """

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv_1 = conv(dims, width, width)
        self.conv_2 = conv(dims, width, 2 * width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to a feature map (B, width, *D)."""
        h = F.silu(self.conv_1(F.silu(self.norm(x))))
        return x + F.glu(self.conv_2(h), dim=1)


class Attention(nn.Module):
    """Residual self-attention over all positions.

    Args:
        dims: the number of spatial dimensions.
        width: the number of channels.
        heads: the number of heads.
    """

    def __init__(self, dims: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, width)
        self.qkv = conv(dims, width, 3 * width, 1)
        self.out = conv(dims, width, width, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to a feature map (B, width, *D)."""
        pattern = "b (three heads c) ... -> three b heads (...) c"
        q, k, v = rearrange(self.qkv(self.norm(x)), pattern, three=3, heads=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "b heads n c -> b (heads c) n").reshape(x.shape)
        out: Tensor = x + self.out(h)
        return out


class Conditioner(nn.Module):
    """A network of gated blocks and attention, from (B, inputs, *D) to (B, outputs, *D).

    Args:
        dims: the number of spatial dimensions.
        inputs: the number of input channels.
        outputs: the number of output channels.
        width: the number of hidden channels.
        blocks: the number of gated blocks.
        heads: the number of attention heads after each block, 0 for no attention.
    """

    def __init__(
        self, dims: int, inputs: int, outputs: int, *, width: int, blocks: int, heads: int
    ) -> None:
        super().__init__()
        self.first = conv(dims, inputs, width)
        self.blocks = nn.Sequential()
        for _ in range(blocks):
            self.blocks.append(GatedBlock(dims, width))
            if heads:
                self.blocks.append(Attention(dims, width, heads))
        self.norm = nn.GroupNorm(1, width)
        self.last = conv(dims, width, outputs)

    @override
    def forward(self, *inputs: Tensor) -> Tensor:
        """Return (B, outputs, *D) for inputs (B, *, *D), concatenated along the channels."""
        h = self.blocks(self.first(torch.cat(inputs, dim=1)))
        out: Tensor = self.last(F.silu(self.norm(h)))
        return out
