"""The diffusion transformer of Peebles and Xie, 2023."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from .._checks import check_choice
from .._repr import configuration
from ._arguments import (
    check_class_labels,
    check_counts,
    check_flags,
    check_noise_label,
    check_optional_counts,
    network_condition,
    network_input,
    unit_range,
)
from ._patches import check_hidden, check_patches, patch_sizes
from .config import remembers
from .embeddings import ConditionEmbedding, PositionalEmbedding
from .layers import Layer, Style, variance_scaling_
from .positions import Waves, rotary_positions, rotated, sincos_positions

Positions = Literal["sincos", "rotary"]

_LABEL_FEATURES = 256
_LABEL_STD = 0.02  # of the embedding of noise labels and classes, at initialization
_EPS = 1e-6
_SIZES: dict[str, dict[str, int]] = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
HEADS = {size["width"]: size["heads"] for size in _SIZES.values()}
"""The number of heads of the published networks, by width."""
PUBLISHED = tuple(f"{size}/{patch}" for size in _SIZES for patch in (2, 4, 8))
"""The names of the published networks."""


@torch.no_grad()
def _xavier_or_zero_(layer: Layer, scale: float) -> None:
    """Initialize the weight by Xavier's uniform distribution, or to zero, and the bias to zero."""
    if scale == 0:
        nn.init.zeros_(layer.weight)
    else:
        variance_scaling_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def _narrow_normal_(layer: Layer, scale: float) -> None:
    nn.init.normal_(layer.weight, std=_LABEL_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class _Attention(nn.Module):
    """Multi-head self-attention of tokens, with queries and keys rotated by their positions."""

    def __init__(self, width: int, heads: int, style: Style) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = style.linear(width, 3 * width)
        self.out = style.linear(width, width)

    @override
    def forward(self, x: Tensor, rotation: Waves | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(rearrange(h, "b h n d -> b n (h d)"))
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, style: Style) -> None:
        super().__init__()
        self.linear_1 = style.linear(width, hidden)
        self.linear_2 = style.linear(hidden, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))
        return out


class _Modulated(nn.Module):
    """A module with adaptive layer normalization, adaLN-zero: it starts as if it were absent."""

    def __init__(self, width: int, count: int, style: Style) -> None:
        super().__init__()
        self.count = count
        self.modulation = style.linear(width, count * width, scale=0)

    def modulations(self, emb: Tensor) -> tuple[Tensor, ...]:
        """Return shifts, scales and gates (B, 1, width) from an embedding (B, width)."""
        out: Tensor = self.modulation(emb)
        return out[:, None].chunk(self.count, dim=-1)

    def normalized(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalize tokens (B, N, width), then scale and shift them."""
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=_EPS), 1 + scale)


class _Block(_Modulated):
    r"""A transformer block, with shift, scale and gate of both branches from the embedding.

    .. math::
        x &\leftarrow x + g_1\, \mathrm{attention}(\mathrm{LN}(x)(1 + a_1) + b_1) \\
        x &\leftarrow x + g_2\, \mathrm{MLP}(\mathrm{LN}(x)(1 + a_2) + b_2), \qquad
        (b_1, a_1, g_1, b_2, a_2, g_2) = L(\mathrm{emb})
    """

    def __init__(self, width: int, heads: int, hidden: int, style: Style) -> None:
        super().__init__(width, 6, style)
        self.attention = _Attention(width, heads, style)
        self.feed_forward = _FeedForward(width, hidden, style)

    @override
    def forward(self, x: Tensor, emb: Tensor, rotation: Waves | None) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulations(emb)
        h = self.attention(self.normalized(x, shift_1, scale_1), rotation)
        x = torch.addcmul(x, gate_1, h)
        h = self.feed_forward(self.normalized(x, shift_2, scale_2))
        return torch.addcmul(x, gate_2, h)


class _Head(_Modulated):
    def __init__(self, width: int, out: int, style: Style) -> None:
        super().__init__(width, 2, style)
        self.linear = style.linear(width, out, scale=0)

    @override
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.linear(self.normalized(x, *self.modulations(emb)))
        return out


class DiT(nn.Module):
    r"""The diffusion transformer (DiT), in one to three dimensions, zero at initialization.

    Maps :math:`(x, l) \mapsto F(x, l)`. The input is split into patches, which a linear layer maps
    to tokens, followed by `depth` transformer blocks whose layer normalizations are scaled and
    shifted, and whose branches are gated, by the embedding of noise label, class and condition
    (adaLN-zero). A linear layer maps each token to a patch of the output. With `learn_sigma` the
    output has twice the channels: first the mean, then the variance, for a model with
    ``variance="learned_range"``. The noise label l may have the range of a step index, 0 to 1000,
    or be a number of order one, such as EDM's.

    The input may have any size that is divisible by the patch size, square or not. Sines and
    cosines of the positions, as published, are added to the tokens and count patches from the first
    one, so a network only generalizes to the sizes it was trained on. Rotary positions enter the
    attention, only through differences.

    For classifier-free guidance one of the classes stands for no class, the last one in the
    published networks: `num_classes` counts it, `drop_conditions` uses it in training, and
    `ClassifierFreeGuidance` takes it as ``null={"class_labels": num_classes - 1}``.

    Attention is torch's fused one; second derivatives require
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``. Under autocast the tokens stay in the
    dtype of the weights.

    Args:
        channels: number of input channels.
        out_channels: number of output channels; as many as input channels if None.
        learn_sigma: whether the output also contains a learned variance: twice the channels.
        dims: number of spatial dimensions, 1, 2 or 3.
        patch_size: size of a patch, one for each dimension or the same along all.
        width: number of channels of a token.
        depth: number of transformer blocks.
        heads: number of heads of each attention, a divisor of `width`.
        mlp_ratio: hidden units of the feed-forward layers over `width`.
        num_classes: number of classes, including the one for no class, or None.
        condition_features: size of a condition vector, such as an observation, or None.
        positions: "sincos" or "rotary".
        data_range: range of the data, which is mapped to [-1, 1] first.
        activation_checkpointing: whether activations are recomputed in the backward pass instead
            of stored: less memory, more time, the same gradient. Not supported under
            transforms of torch.func.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if an argument is out of range, the heads do not divide the width, or a head
            is too narrow for rotary positions.

    Source: W. Peebles, S. Xie, Scalable Diffusion Models with Transformers, 2023, arXiv
    2212.09748; rotary positions: see J. Su et al., 2021, arXiv 2104.09864.

    >>> import torch
    >>> from diffusionkit.networks import DiT
    >>> net = DiT(1, patch_size=(2, 4), width=32, depth=2, heads=4)
    >>> net(torch.randn(4, 1, 8, 12), torch.tensor([0, 10, 500, 999])).shape
    torch.Size([4, 1, 8, 12])
    """

    config: dict[str, Any]

    @remembers
    def __init__(
        self,
        channels: int = 3,
        *,
        out_channels: int | None = None,
        learn_sigma: bool = False,
        dims: int = 2,
        patch_size: int | Sequence[int] = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        condition_features: int | None = None,
        positions: Positions = "sincos",
        data_range: tuple[float, float] = (-1.0, 1.0),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_counts(channels=channels, dims=dims, width=width, depth=depth, heads=heads)
        check_optional_counts(out_channels=out_channels, condition_features=condition_features)
        check_flags(learn_sigma=learn_sigma, activation_checkpointing=activation_checkpointing)
        check_choice("positions", positions, ("sincos", "rotary"))
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width={width}, got {heads}")
        if positions == "rotary" and (width // heads < 2 * dims or width // heads % 2):
            raise ValueError(
                f"heads: expected heads of an even number of features, at least {2 * dims}, for "
                f"rotary positions, got {heads} of {width // heads}"
            )
        hidden = check_hidden(width, mlp_ratio)
        self.patches = patch_sizes(patch_size, dims)
        self.channels = channels
        self.dims = dims
        self.num_classes = num_classes
        self.condition_features = condition_features
        self.rotary = positions == "rotary"
        self.head_features = width // heads
        self.width = width
        self.scale, self.shift = unit_range(data_range)
        self.activation_checkpointing = activation_checkpointing
        out = (channels if out_channels is None else out_channels) * (2 if learn_sigma else 1)
        volume = math.prod(self.patches)
        style = Style(dims, initialize=_xavier_or_zero_)
        self.embedding = ConditionEmbedding(
            PositionalEmbedding(_LABEL_FEATURES, endpoint=False),
            _LABEL_FEATURES,
            width,
            num_classes=num_classes,
            condition_features=condition_features,
            late_classes=True,
            class_std=_LABEL_STD,
            style=Style(dims, initialize=_narrow_normal_),
        )
        self.input = style.linear(channels * volume, width)
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, style) for _ in range(depth))
        self.head = _Head(width, out * volume, style)

        # Patterns of einops: the entries of a patch have names of their own.
        axes = [(f"h{i}", f"p{i}") for i in range(dims)]
        image = " ".join(f"({h} {p})" for h, p in axes)
        tokens, patch = (" ".join(names) for names in zip(*axes, strict=True))
        self._cut = f"b c {image} -> b ({tokens}) (c {patch})"
        self._paste = f"b ({tokens}) ({patch} c) -> b c {image}"
        self._patch = {p: size for (_, p), size in zip(axes, self.patches, strict=True)}

    @classmethod
    def published(cls, name: str, **options: Any) -> Self:
        """Build a network of the paper for latents (B, 4, H/8, W/8) of ImageNet.

        Class-conditional with a learned variance: 1000 classes, and 1000 for no class.

        Args:
            name: size and patch size: "S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4",
                "L/8", "XL/2", "XL/4" or "XL/8".
            **options: options that replace the published ones.

        Raises:
            ValueError: if there is no such network.
        """
        check_choice("name", name, PUBLISHED)
        size, patch = name.split("/")
        made: dict[str, Any] = {"channels": 4, "learn_sigma": True, "num_classes": 1001}
        return cls(**made | _SIZES[size] | {"patch_size": int(patch)} | options)

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
    ) -> Tensor:
        r"""Evaluate the network.

        Args:
            x: input (B, channels, \*spatial), every size divisible by that of a patch.
            noise_label: noise label (B,).
            class_labels: class labels (B,), int64, if and only if the network has classes.
            condition: condition vectors (B, condition_features), or (condition_features,) for one
                that all samples have, if and only if the network takes them.

        Returns:
            Output (B, out_channels, \*spatial), or of twice the channels with `learn_sigma`.

        Raises:
            TypeError: if a dtype is wrong, or class labels or condition are missing or unexpected.
            ValueError: if a shape, a device, a class label or a noise label is wrong.
        """
        x = network_input(x, self.channels, self.dims, self.input.weight)
        grid = check_patches(x, self.patches)
        check_noise_label(x, noise_label)
        check_class_labels(x, class_labels, self.num_classes)
        condition = network_condition(x, condition, self.condition_features, required=True)
        emb = self.embedding(noise_label, class_labels, condition)
        if (self.scale, self.shift) != (1.0, 0.0):
            x = x * self.scale + self.shift
        tokens: Tensor = self.input(rearrange(x, self._cut, **self._patch))
        # Autocast computes products in half precision; the blocks add up in the dtype of weights.
        tokens = tokens.to(self.input.weight.dtype)
        rotation = None
        if self.rotary:
            rotation = rotary_positions(grid, self.head_features, tokens)
        else:
            tokens = tokens + sincos_positions(grid, self.width, tokens)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                tokens = checkpoint(block, tokens, emb, rotation, use_reentrant=False)
            else:
                tokens = block(tokens, emb, rotation)
        sizes = {f"h{i}": n for i, n in enumerate(grid)}
        out: Tensor = rearrange(self.head(tokens, emb), self._paste, **self._patch, **sizes)
        return out
