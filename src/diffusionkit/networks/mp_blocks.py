"""Magnitude-preserving parts of EDM2's U-Net; they have no biases and no normalization layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .._coefficients import add_scaled
from .._magnitude import (
    SILU_MAGNITUDE,
    MPLinear,
    mp_cosines,
    mp_sum,
    normalized,
    sum_weights,
)
from ._arguments import check_optional_counts
from .dropout import Dropout
from .exact_frequencies import ExactFrequencies, as_float

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# The scale of a magnitude-preserving SiLU; the layers after one multiply their weights by it.
_SILU = 1 / SILU_MAGNITUDE


class MPConv(MPLinear):
    r"""A convolution without a bias that keeps the spatial size and normalizes its weight.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        dims: number of spatial dimensions, 1, 2 or 3.
        kernel: odd kernel size, the same along every dimension.
    """

    def __init__(self, in_channels: int, out_channels: int, dims: int, kernel: int = 3) -> None:
        super().__init__(in_channels, out_channels, (kernel,) * dims)

    @override
    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        r"""Map features (B, in_channels, \*spatial) to (B, out_channels, \*spatial)."""
        weight = self.scaled_weight(gain, x.dtype)
        return _CONV[x.ndim - 2](x, weight, padding=weight.shape[-1] // 2)


class MPInput(MPConv):
    """The input convolution, of the input and a constant channel of ones in place of biases.

    Args:
        in_channels: number of channels of the network's input.
        out_channels: number of output channels.
        dims: number of spatial dimensions, 1, 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__(in_channels + 1, out_channels, dims)

    @override
    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        r"""Map the input (B, in_channels, \*spatial) to (B, out_channels, \*spatial)."""
        return super().forward(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), gain)


class _Gain(nn.Module):
    """A learned factor, zero at initialization."""

    def __init__(self) -> None:
        super().__init__()
        # One number, not a scalar: fully_shard does not shard scalars.
        self.gain = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Set the factor to zero."""
        nn.init.zeros_(self.gain)


class MPHead(_Gain):
    """The output convolution, times a learned gain that is zero at initialization.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        dims: number of spatial dimensions, 1, 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        self.conv = MPConv(in_channels, out_channels, dims)

    @override
    def forward(self, h: Tensor) -> Tensor:
        r"""Map features (B, in_channels, \*spatial) to (B, out_channels, \*spatial)."""
        out: Tensor = self.conv(h, self.gain)
        return out


class MPFourier(ExactFrequencies):
    r"""Cosines of the noise label at fixed random frequencies and phases.

    .. math:: e(l) = [\sqrt 2 \cos(f_i l + \phi_i)]_i, \qquad
        f_i \sim N(0, (2 \pi)^2), \quad \phi_i \sim U[0, 2 \pi]

    Args:
        features: number of features.

    Source: T. Karras et al., 2024, arXiv 2312.02696 (equation 75).
    """

    def __init__(self, features: int) -> None:
        super().__init__(2, features)
        self.reset_parameters()

    @override
    def _draw(self) -> None:
        self.frequencies[0].normal_().mul_(2 * math.pi)
        self.frequencies[1].uniform_(0, 2 * math.pi)

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Map noise labels (B,) to features (B, features), in float64 or else float32."""
        noise_label = as_float(noise_label)
        return mp_cosines(noise_label, *self.exact(noise_label.dtype))


class MPEmbedding(nn.Module):
    r"""Magnitude-preserving embedding of the noise label and, optionally, of class and condition.

    .. math:: \mathrm{emb} = \mathrm{SiLU}((L e(l) \oplus E_c) \oplus W v) / 0.596

    where :math:`a \oplus b` is the sum with weights 1 - balance and balance, over the root of the
    sum of their squares. It is in float32 at least.

    Args:
        features: number of Fourier features of the noise label.
        width: number of embedding channels.
        num_classes: number of classes, or None.
        condition_features: size of the condition vector, or None.
        balance: weight of the class against the noise label, and of the condition against both.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        num_classes: int | None,
        condition_features: int | None,
        balance: float,
    ) -> None:
        super().__init__()
        check_optional_counts(num_classes=num_classes, condition_features=condition_features)
        self.noise_features = MPFourier(features)
        self.linear = MPLinear(features, width)
        self.num_classes = num_classes
        self.condition_features = condition_features
        self.balance = balance
        self.classes = None if num_classes is None else MPLinear(num_classes, width)
        self.condition: MPLinear | None = None
        if condition_features is not None:
            self.condition = MPLinear(condition_features, width)

    @override
    def forward(
        self,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the embedding (B, width) of validated arguments.

        Args:
            noise_label: noise labels (B,).
            class_labels: class labels (B,), int64, or None for a network without classes.
            condition: vectors (B, condition_features), or None for zeros.
        """
        emb: Tensor = self.linear(self.noise_features(noise_label))
        if self.classes is not None and class_labels is not None:
            # The product with a one-hot vector of magnitude one.
            table = self.classes.scaled_weight(math.sqrt(self.classes.weight.shape[1]), emb.dtype)
            emb = mp_sum(emb, F.embedding(class_labels, table.t()), self.balance)
        if self.condition is not None:
            if condition is None:
                emb = emb * sum_weights(self.balance)[0]
            else:
                emb = mp_sum(emb, self.condition(condition.to(emb.dtype)), self.balance)
        return F.silu(emb) * _SILU


class MPBlock(_Gain):
    r"""Magnitude-preserving residual block, conditioned on an embedding by a factor.

    .. math::
        x' &= \mathrm{N}(\mathrm{shortcut}(r(x))) \text{ in the encoder}, \quad
            r(x) \text{ in the decoder} \\
        h &= \mathrm{conv}_2(\mathrm{dropout}(\mathrm{S}(
            \mathrm{conv}_1(\mathrm{S}(x')) (1 + g L(\mathrm{emb}))))) \\
        \mathrm{out} &= \mathrm{clip}((1 - \beta) \bar x + \beta h)
            / \sqrt{(1 - \beta)^2 + \beta^2})

    where r is the resampling, if any, N gives the vector of channels of each position magnitude
    one, S is SiLU over its magnitude, g a gain that is zero at initialization and :math:`\bar x`
    is x' in the encoder and its shortcut in the decoder.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        width: number of channels of the embedding.
        dims: number of spatial dimensions, 1, 2 or 3.
        decoding: whether the block is in the decoder.
        resample: resampling of the input, or None.
        dropout: dropout probability.
        balance: beta, the weight of the residual branch.
        clip: largest magnitude of an output, or None.

    Source: T. Karras et al., 2024, arXiv 2312.02696 (figure 21).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        dims: int,
        decoding: bool,
        resample: nn.Module | None = None,
        dropout: float,
        balance: float,
        clip: float | None,
    ) -> None:
        super().__init__()
        self.decoding = decoding
        self.resample = resample
        self.balance = balance
        self.clip = clip
        self.conv_1 = MPConv(in_channels if decoding else out_channels, out_channels, dims)
        self.embedding = MPLinear(width, out_channels)
        self.dropout = Dropout(dropout)
        self.conv_2 = MPConv(out_channels, out_channels, dims)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = MPConv(in_channels, out_channels, dims, kernel=1)

    @override
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        r"""Return features (B, out_channels, \*resampled).

        Args:
            x: features (B, in_channels, \*spatial).
            emb: embedding (B, width).
        """
        if self.resample is not None:
            x = self.resample(x)
        if not self.decoding:
            x = normalized(self.shortcut(x), (1,))
        h = self.conv_1(F.silu(x), _SILU)
        factor = self.embedding(emb, self.gain) + 1
        h = h * factor.reshape(factor.shape + (1,) * (h.ndim - 2)).to(h.dtype)
        of_x, of_h = sum_weights(self.balance)
        h = self.conv_2(self.dropout(F.silu(h)), _SILU * of_h)
        if self.decoding:
            x = self.shortcut(x)
        return _clipped(add_scaled(h, x, of_x), self.clip)


class CosineAttention(nn.Module):
    r"""Magnitude-preserving self-attention over all spatial positions.

    .. math::
        q, k, v = \mathrm{N}(x W_{qkv}), \qquad \mathrm{out} =
        \mathrm{clip}\big((1 - \beta) x + \beta\,\mathrm{softmax}(q k^\top / \sqrt{d})\, v\, W_o)
        / \sqrt{(1 - \beta)^2 + \beta^2}\big)

    with heads of d channels, where N gives each query, key and value magnitude one.

    Args:
        channels: number of channels.
        heads: number of heads.
        balance: beta, the weight of the attention.
        clip: largest magnitude of an output, or None.

    Raises:
        ValueError: if the heads do not divide the channels.

    Source: T. Karras et al., 2024, arXiv 2312.02696 (section B.3).
    """

    def __init__(self, channels: int, *, heads: int, balance: float, clip: float | None) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of {channels} channels, got {heads}")
        self.heads = heads
        self.balance = balance
        self.clip = clip
        self.qkv = MPLinear(channels, 3 * channels)
        self.out = MPLinear(channels, channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        r"""Map features (B, channels, \*spatial) to features of the same shape."""
        tokens = rearrange(x, "b c ... -> b (...) c").contiguous()
        qkv = rearrange(self.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        h = F.scaled_dot_product_attention(*normalized(qkv, (4,)))
        of_x, of_h = sum_weights(self.balance)
        h = self.out(rearrange(h, "b h n d -> b n (h d)"), of_h)
        h = h.transpose(1, 2).reshape(x.shape)
        return _clipped(add_scaled(h, x, of_x), self.clip)


def _clipped(x: Tensor, clip: float | None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)
