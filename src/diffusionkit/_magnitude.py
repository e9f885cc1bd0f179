"""Magnitude-preserving operations, and layers whose weights have unit magnitude.

The magnitude of a vector is the root of the mean square of its entries. If the entries of the
inputs are uncorrelated and have magnitude one, so have those of the outputs.

Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024,
arXiv 2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ._checks import check_part
from ._coefficients import add_scaled
from .distributed._sharded import is_sharded

_EPS = 1e-4
SILU_MAGNITUDE = 0.596
"""The magnitude of SiLU of a standard Gaussian, rounded as in the released code."""


def normalized(x: Tensor, dims: Sequence[int]) -> Tensor:
    r"""Return x / (1e-4 + m), m the magnitude of x over some dimensions, at least in float32."""
    count = math.prod([x.shape[dim] for dim in dims])
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=list(dims), keepdim=True, dtype=wide)
    magnitude = norm * math.sqrt(1 / count) + _EPS
    return x / magnitude.to(x.dtype)


def sum_weights(t: float) -> tuple[float, float]:
    r"""Return the weights of a magnitude-preserving sum: 1 - t and t, over their root sum square.

    Source: equation 88.
    """
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the magnitude-preserving sum of tensors of the same shape."""
    of_a, of_b = sum_weights(t)
    return add_scaled(a * of_a, b, of_b)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    r"""Concatenate features (B, C, \*D) so that their parts contribute as in a sum, 1 - t and t.

    .. math::
        w_a a \oplus w_b b, \quad (w_a, w_b) = \sqrt{\frac{N_a + N_b}{(1 - t)^2 + t^2}}
        \left( \frac{1 - t}{\sqrt{N_a}}, \frac{t}{\sqrt{N_b}} \right)

    Source: equation 103.
    """
    parts = []
    for x, weight in zip((a, b), sum_weights(t), strict=True):
        scale = weight * math.sqrt((a.shape[1] + b.shape[1]) / x.shape[1])
        parts.append(x if abs(scale - 1) < 1e-12 else x * scale)
    return torch.cat(parts, dim=1)


def mp_cosines(label: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
    r"""Return :math:`\sqrt 2 \cos(f_i l + \phi_i)` (B, n) of labels (B,).

    Source: equation 75.
    """
    return torch.cos(torch.outer(label, frequencies) + phases) * math.sqrt(2)


class MPLinear(nn.Module):
    r"""A linear map without a bias, whose weight is normalized in every forward pass.

    .. math:: y = g\,\hat W x / \sqrt n, \qquad
        \hat W_i = W_i / (10^{-4} + \|W_i\| / \sqrt n)

    with the rows W_i of n entries. The gradient of a row is orthogonal to it, so optimizer steps
    let W grow and the effective learning rate fall, unless `normalize_weights` is called.

    Args:
        in_features: the number of inputs.
        out_features: the number of outputs.
        kernel: the sizes of the kernel, for convolutions.

    Source: equations 47 and 66.
    """

    def __init__(self, in_features: int, out_features: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, *kernel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight)
        self.normalize_weight()

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Give each row of the weight magnitude one, in place."""
        weight: Tensor = self.weight
        if is_sharded(weight):
            sharded = cast(Any, weight)
            if any(getattr(at, "dim", 0) != 0 for at in sharded.placements):
                raise ValueError(
                    "normalize_weights: expected weights sharded along their first dimension, got "
                    f"{sharded.placements}"
                )
            weight = sharded.to_local()
        if weight.numel():
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight.copy_(normalized(wide, range(1, weight.ndim)))

    def scaled_weight(self, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Return gain times the normalized weight over the root of the size of its rows."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        root = math.sqrt(weight[0].numel())
        dims = list(range(1, weight.ndim))
        norm: Tensor = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
        return (weight * (gain / (norm + _EPS * root))).to(dtype)

    @override
    def extra_repr(self) -> str:
        return ", ".join(str(size) for size in self.weight.shape)

    @override
    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Map features (..., in_features) to (..., out_features)."""
        return F.linear(x, self.scaled_weight(gain, x.dtype))


def normalize_weights(*modules: nn.Module) -> None:
    r"""Give the weights of magnitude-preserving layers magnitude one, in place.

    The forced weight normalization of EDM2. These layers normalize their weights in every forward
    pass, so the outputs do not change; but the weights would grow with training, and the larger
    they are, the less an optimizer step turns them. Call this in each training step, before the
    forward pass, as the released code does, or after the optimizer step.

    Args:
        modules: networks with such layers, such as `EDM2UNet` or a model of it, and
            `LearnedUncertainty`. Wrapped networks (compiled, DistributedDataParallel) and those
            sharded by `fully_shard` are normalized too.

    Raises:
        ValueError: if a module has no such layer.
        TypeError: if it is not a Module.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024,
    arXiv 2312.02696 (section 2.3, equation 66).

    >>> from diffusionkit import normalize_weights
    >>> from diffusionkit.networks import EDM2UNet
    >>> network = EDM2UNet(1, width=8, multipliers=(1,), blocks=1)
    >>> normalize_weights(network)
    """
    for module in modules:
        check_part(module, nn.Module, "modules")
        layers = [layer for layer in module.modules() if isinstance(layer, MPLinear)]
        if not layers:
            raise ValueError(
                "modules: expected a network with magnitude-preserving layers, such as EDM2UNet, "
                f"got {type(module).__name__}"
            )
        for layer in layers:
            layer.normalize_weight()
