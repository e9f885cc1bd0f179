"""The structure shared by all U-Nets of the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from .._repr import configuration
from ._arguments import (
    check_class_labels,
    check_counts,
    check_divisible,
    check_flags,
    check_label_values,
    check_level_index,
    check_low_res,
    check_noise_label,
    check_optional_counts,
    network_condition,
    network_input,
    unit_range,
)
from .embeddings import ConditionEmbedding, FourierEmbedding, SigmaTable
from .layers import Style, over_level
from .mp_blocks import MPEmbedding

Join: TypeAlias = Callable[[Tensor, Tensor], Tensor]
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def _concatenated(h: Tensor, skip: Tensor) -> Tensor:
    return torch.cat([h, skip], dim=1)


class Stage(nn.Module):
    """A conditioned block, optionally followed by attention.

    Args:
        block: module called with features and an embedding.
        attention: module called with features, or None.
        recompute: whether activations are recomputed in the backward pass instead of stored.
            Dropout draws the same mask both times.
    """

    def __init__(
        self, block: nn.Module, attention: nn.Module | None = None, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.recompute = recompute

    @override
    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        r"""Apply block and attention to features (B, C, \*spatial), given an embedding or None."""
        if self.recompute and torch.is_grad_enabled():
            h: Tensor = checkpoint(self._apply_parts, x, emb, use_reentrant=False)
            return h
        return self._apply_parts(x, emb)

    def _apply_parts(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h: Tensor = self.block(x, emb)
        return h if self.attention is None else self.attention(h)


class EncoderLevel(nn.Module):
    """The stages of one resolution of the encoder.

    Args:
        stages: the stages, in order.
    """

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    @override
    def forward(self, h: Tensor, emb: Tensor | None) -> list[Tensor]:
        r"""Return the features after each stage, from features (B, C, \*spatial)."""
        outputs = []
        for stage in self.stages:
            h = stage(h, emb)
            outputs.append(h)
        return outputs


class DecoderLevel(nn.Module):
    """The stages of one resolution of the decoder, each with one skip connection.

    Args:
        stages: the stages, in order.
        concatenate: joins features and a skip along the channels.
    """

    def __init__(self, stages: list[Stage], concatenate: Join = _concatenated) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.concatenate = concatenate

    @override
    def forward(self, h: Tensor, emb: Tensor | None, skips: list[Tensor]) -> Tensor:
        r"""Apply the stages, each to the features concatenated with the last remaining skip.

        Args:
            h: features (B, C, \*spatial).
            emb: embedding (B, embedding_width), or None.
            skips: features of the encoder; those used are popped off the end.
        """
        for stage in self.stages:
            h = stage(self.concatenate(h, skips.pop()), emb)
        return h


class UNet(nn.Module):
    r"""U-Net over 1 to 3 spatial dimensions, assembled from its parts.

    The input convolution and every block and downsampling of the encoder produce one skip; the
    decoder has one more block per level than the encoder and consumes one skip per block.
    Attention follows every encoder block at the chosen levels, the first of the two middle
    blocks, and the last or every decoder block at those levels. Input and output branches, see
    `diffusionkit.networks.progressive`, run in parallel to the levels.

    Args:
        channels: number of channels of the input.
        out_channels: number of channels of the output.
        low_res_channels: number of channels of a low-resolution image that is a second input of
            the network, or None.
        style: settings shared by the blocks.
        input_width: number of channels after the input convolution.
        widths: number of channels of each level; each level halves the resolution.
        blocks: number of blocks per level.
        attention_levels: indices of the levels with attention; 0 is the full resolution.
        attend_all: whether attention follows every decoder block of those levels, or the last.
        embedding: embedding of noise label, class labels and condition, or None.
        input_layer: makes the input convolution from the numbers of its input and output channels;
            a convolution of the style by default.
        block: makes a block from the numbers of its input and output channels.
        decoder_block: makes a middle block or a block of the decoder; `block` by default.
        attention: makes an attention from the number of its channels and whether it is in the
            decoder, or returns None.
        down: makes a downsampling, a module called with features and embedding, from the number
            of its channels.
        up: makes an upsampling, a module like those of `down`.
        concatenate: joins features of the decoder and a skip along the channels.
        input_branch: makes one level of the input branch from the numbers of channels of branch
            and features, or None.
        output_branch: makes one level of the output branch from the numbers of channels of branch
            (None at the coarsest level) and features, or None.
        head: makes the module that maps the last features to the output from the number of their
            channels; None if the output branch yields the output.
        noise_level: module that maps noise labels to the noise levels that divide the output, or
            None.
        data_range: range of the data, which is mapped to [-1, 1] first.
        activation_checkpointing: whether activations within stages are recomputed in the backward
            pass instead of stored.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if an argument is out of range.
    """

    config: dict[str, Any]

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int,
        low_res_channels: int | None,
        style: Style,
        input_width: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Sequence[int],
        attend_all: bool,
        embedding: ConditionEmbedding | MPEmbedding | None,
        input_layer: Callable[[int, int], nn.Module] | None = None,
        block: Callable[[int, int], nn.Module],
        decoder_block: Callable[[int, int], nn.Module] | None = None,
        attention: Callable[[int, bool], nn.Module | None],
        down: Callable[[int], nn.Module],
        up: Callable[[int], nn.Module],
        concatenate: Join = _concatenated,
        input_branch: Callable[[int, int], nn.Module] | None = None,
        output_branch: Callable[[int | None, int], nn.Module] | None = None,
        head: Callable[[int], nn.Module] | None = None,
        noise_level: nn.Module | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_counts(channels=channels, out_channels=out_channels, blocks=blocks)
        check_optional_counts(low_res_channels=low_res_channels)
        check_flags(activation_checkpointing=activation_checkpointing)
        self.channels = channels
        self.low_res_channels = low_res_channels
        self.dims = style.dims
        self.factor = 2 ** (len(widths) - 1)  # total downsampling
        self.scale, self.shift = unit_range(data_range)
        self.embedding = embedding
        self.noise_level = noise_level

        after = block if decoder_block is None else decoder_block

        def stage(
            c: int,
            out: int,
            attend: bool,
            make: Callable[[int, int], nn.Module] = block,
            *,
            decoding: bool = False,
        ) -> Stage:
            return Stage(
                make(c, out),
                attention(out, decoding) if attend else None,
                recompute=activation_checkpointing,
            )

        in_channels = channels + (low_res_channels or 0)
        self.input: Any = (input_layer or style.conv)(in_channels, input_width)

        c, skips, branch = input_width, [input_width], in_channels
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        self.input_branch = nn.ModuleList() if input_branch else None
        for level, width in enumerate(widths):
            if level > 0:
                self.downs.append(Stage(down(c), recompute=activation_checkpointing))
                if input_branch and self.input_branch is not None:
                    step: Any = input_branch(branch, c)
                    self.input_branch.append(step)
                    branch, c = step.branch_channels, step.out_channels
                skips.append(c)
            stages = []
            for _ in range(blocks):
                stages.append(stage(c, width, level in attention_levels))
                skips.append(width)
                c = width
            self.encoder.append(EncoderLevel(stages))

        self.middle = nn.ModuleList([stage(c, c, True, after), stage(c, c, False, after)])

        above: int | None = None
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        self.output_branch = nn.ModuleList() if output_branch else None
        for level, width in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.ups.append(Stage(up(c), recompute=activation_checkpointing))
            stages = []
            for i in range(blocks + 1):
                attend = level in attention_levels and (attend_all or i == blocks)
                stages.append(stage(c + skips.pop(), width, attend, after, decoding=True))
                c = width
            self.decoder.append(DecoderLevel(stages, concatenate))
            if output_branch and self.output_branch is not None:
                self.output_branch.append(output_branch(above, c))
                above = c

        self.head = head(c) if head else None

    @override
    def extra_repr(self) -> str:
        return ", ".join(configuration(self))

    @override
    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        r"""Evaluate the network.

        Args:
            x: input (B, channels, \*spatial), every size divisible by the total downsampling
                ``2 ** (levels - 1)``.
            noise_label: noise label (B,).
            class_labels: class labels (B,), int64, if and only if the network has classes.
            condition: condition vectors (B, condition_features), for a network with a condition
                only, or (condition_features,) for one that all samples have; None for zeros.
            low_res: image (B, low_res_channels, \*any spatial), if and only if the network takes
                one; it is interpolated linearly to the size of the input.

        Returns:
            Output (B, out_channels, \*spatial).

        Raises:
            TypeError: if a dtype is wrong, or an argument is missing or unexpected.
            ValueError: if a shape, a device, a class label or a noise label is wrong.
        """
        x = network_input(x, self.channels, self.dims, self.input.weight)
        check_divisible(x, self.factor)
        check_noise_label(x, noise_label)
        classes = None if self.embedding is None else self.embedding.num_classes
        check_class_labels(x, class_labels, classes)
        size = None if self.embedding is None else self.embedding.condition_features
        condition = network_condition(x, condition, size)
        check_low_res(x, low_res, self.low_res_channels)
        emb = (
            None if self.embedding is None else self.embedding(noise_label, class_labels, condition)
        )
        if (self.scale, self.shift) != (1.0, 0.0):
            x = x * self.scale + self.shift
        if low_res is not None:
            mode = _INTERPOLATION[self.dims]
            low_res = F.interpolate(low_res.to(x.dtype), x.shape[2:], mode=mode)
            x = torch.cat([x, low_res], dim=1)

        h: Tensor = self.input(x)
        skips, branch = [h], x
        for level, encode in enumerate(self.encoder):
            if level > 0:
                h = self.downs[level - 1](h, emb)
                if self.input_branch is not None:
                    branch, h = self.input_branch[level - 1](branch, h)
                skips.append(h)
            skips += encode(h, emb)
            h = skips[-1]
        for stage in self.middle:
            h = stage(h, emb)
        out: Any = None
        for level, decode in enumerate(self.decoder):
            if level > 0:
                h = self.ups[level - 1](h, emb)
            h = decode(h, emb, skips)
            if self.output_branch is not None:
                out, h = self.output_branch[level](out, h)
        result: Tensor = out if self.head is None else self.head(h)
        if self.noise_level is not None:
            result = over_level(result, self.noise_level(noise_label))
        return result

    @property
    def divides_by_label(self) -> bool:
        """Whether the output is divided by the noise label itself, as by a noise level sigma."""
        return isinstance(self.noise_level, nn.Identity)

    def check_noise_labels(self, noise_label: Tensor) -> None:
        """Raise unless the network can embed noise labels (n,) (read on the CPU only).

        Raises:
            TypeError: if they are in half precision.
            ValueError: if one is not positive or no index of a noise level, where it must be.
        """
        features = None if self.embedding is None else self.embedding.noise_features
        if isinstance(features, FourierEmbedding) and features.log:
            check_label_values(noise_label, "embeds their logarithm", positive=True)
        if isinstance(self.noise_level, SigmaTable):
            check_level_index(noise_label, len(self.noise_level.values))
