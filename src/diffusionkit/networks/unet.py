"""The skeleton that every U-Net of the library shares."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from diffusionkit.networks.blocks import DecoderLevel, EncoderLevel, Stage
from diffusionkit.networks.checks import (
    check_classes,
    check_input,
    check_label,
    check_positive,
)
from diffusionkit.networks.embeddings import ConditionEmbedding
from diffusionkit.networks.layers import conv, group_norm


class UNet(nn.Module):
    r"""U-Net over feature maps of 1 to 3 dimensions, given its parts.

    The input convolution and every block and down-sampling of the encoder leave one skip; the
    decoder has one block more per level than the encoder and takes one skip per block. Attention
    follows every encoder block at the chosen levels, the last decoder block at those levels, and
    the first of the two middle blocks.

    Args:
        channels: Number of input channels.
        out_channels: Number of output channels.
        dims: Number of spatial dimensions, 1, 2 or 3.
        width: Number of channels after the input convolution.
        multipliers: Channels of each level over `width`; each level halves the resolution.
        blocks: Number of blocks per level.
        attention_levels: Indices of the levels with attention; 0 is the full resolution.
        num_classes: Number of classes, or None for no classes.
        label_features: Module that maps labels (B,) to features (B, width).
        embedding_width: Number of channels of the embedding that blocks are given.
        block: Makes a block from its numbers of input and output channels.
        attention: Makes an attention from its number of channels.
        down: Makes a down-sampling, a module of feature map and embedding, from its number of
            channels.
        up: Makes an up-sampling in the same way.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int,
        dims: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention_levels: Sequence[int],
        num_classes: int | None,
        label_features: nn.Module,
        embedding_width: int,
        block: Callable[[int, int], nn.Module],
        attention: Callable[[int], nn.Module],
        down: Callable[[int], nn.Module],
        up: Callable[[int], nn.Module],
    ) -> None:
        """Build the network from its parts."""
        super().__init__()
        levels = len(multipliers)
        _check_layout(channels, out_channels, dims, multipliers, blocks, attention_levels)
        if num_classes is not None:
            check_positive(num_classes=num_classes)
        self.channels = channels
        self.dims = dims
        self.num_classes = num_classes
        self.factor = 2 ** (levels - 1)  # total down-sampling

        self.embedding = ConditionEmbedding(label_features, width, embedding_width, num_classes)
        self.input = conv(dims, channels, width)

        c, skips = width, [width]
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.downs.append(down(c))
                skips.append(c)
            stages = []
            for _ in range(blocks):
                out = width * multiplier
                stages.append(
                    Stage(block(c, out), attention(out) if level in attention_levels else None)
                )
                skips.append(out)
                c = out
            self.encoder.append(EncoderLevel(stages))

        self.middle = nn.ModuleList([Stage(block(c, c), attention(c)), Stage(block(c, c), None)])

        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(levels)):
            if level < levels - 1:
                self.ups.append(up(c))
            stages = []
            for i in range(blocks + 1):
                out = width * multipliers[level]
                attend = level in attention_levels and i == blocks
                stages.append(
                    Stage(block(c + skips.pop(), out), attention(out) if attend else None)
                )
                c = out
            self.decoder.append(DecoderLevel(stages))

        self.output_norm = group_norm(c)
        self.output = conv(dims, c, out_channels, scale=0)

    def forward(self, x: Tensor, label: Tensor, labels: Tensor | None = None) -> Tensor:
        r"""Evaluate the network.

        Args:
            x: Input (B, channels, \*spatial), every size divisible by the total down-sampling
                ``2 ** (len(multipliers) - 1)``.
            label: Time label (B,).
            labels: Class labels (B,), int64, if and only if the network has classes.

        Returns:
            Output (B, out_channels, \*spatial).

        Raises:
            TypeError: If a dtype is wrong, or class labels are missing or unexpected.
            ValueError: If a shape, a device or a class label is wrong.
        """
        check_input(x, self.channels, self.dims, self.input.weight)
        if any(size % self.factor for size in x.shape[2:]):
            raise ValueError(
                f"every spatial size of x must be divisible by {self.factor}, "
                f"got {tuple(x.shape[2:])}"
            )
        check_label(x, label)
        check_classes(x, labels, self.num_classes)

        emb = self.embedding(label, labels)
        h: Tensor = self.input(x)
        skips = [h]
        for level, encode in enumerate(self.encoder):
            if level > 0:
                h = self.downs[level - 1](h, emb)
                skips.append(h)
            skips += encode(h, emb)
            h = skips[-1]
        for stage in self.middle:
            h = stage(h, emb)
        for level, decode in enumerate(self.decoder):
            if level > 0:
                h = self.ups[level - 1](h, emb)
            h = decode(h, emb, skips)
        h = self.output(F.silu(self.output_norm(h)))
        return h


def _check_layout(
    channels: int,
    out_channels: int,
    dims: int,
    multipliers: Sequence[int],
    blocks: int,
    attention_levels: Sequence[int],
) -> None:
    check_positive(channels=channels, out_channels=out_channels, blocks=blocks)
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
    if not multipliers:
        raise ValueError("multipliers must have one entry per level, got none")
    for multiplier in multipliers:
        check_positive(multipliers=multiplier)
    for level in attention_levels:
        if level not in range(len(multipliers)):
            raise ValueError(
                f"attention_levels must be in [0, {len(multipliers)}) for "
                f"{len(multipliers)} multipliers, got {level}"
            )
