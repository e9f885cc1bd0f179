r"""Positions of patches on a grid: sines and cosines to add, or angles to rotate by.

Along an axis of n patches, position p has the angles

.. math:: \theta_i = p\, 10^{-4 i / k}, \quad i = 0, \dots, k - 1.

Axes share the channels equally; channels that are left over carry no position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._kept import Kept

_BASE = 1e4

Waves = tuple[Tensor, Tensor]

_waves: Kept[Waves] = Kept()


def sincos_positions(grid: Sequence[int], width: int, like: Tensor) -> Tensor:
    """Return the embedding (N, width) of the N patches of a grid, in the order of a reshape.

    The last axis comes first, and of each axis first the sines, then the cosines.

    Args:
        grid: number of patches along each axis.
        width: number of channels.
        like: a tensor of the dtype and on the device of the embedding.

    Source: K. He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, arXiv 2111.06377
    (released code); W. Peebles, S. Xie, 2023, arXiv 2212.09748.
    """
    count = width // (2 * len(grid))
    parts = []
    for axis in reversed(range(len(grid))):
        parts += [_over_grid(wave, axis, grid) for wave in _axis(grid[axis], count, like)]
    return _joined(parts, width)


def rotary_positions(grid: Sequence[int], features: int, like: Tensor) -> Waves:
    """Return the cosines and sines (N, features / 2) that rotate pairs of features of N patches.

    Args:
        grid: number of patches along each axis.
        features: even number of features of an attention head.
        like: a tensor of the dtype and on the device of the result.
    """
    count = features // (2 * len(grid))
    sines, cosines = [], []
    for axis, n in enumerate(grid):
        sine, cosine = _axis(n, count, like)
        sines.append(_over_grid(sine, axis, grid))
        cosines.append(_over_grid(cosine, axis, grid))
    return _joined(cosines, features // 2, rest=1.0), _joined(sines, features // 2)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    r"""Rotate pairs of features by the angles of their positions.

    .. math::
        (a, b) \mapsto (a \cos\theta - b \sin\theta,\; a \sin\theta + b \cos\theta)

    so that inner products depend on differences of positions. The pairs are features i and
    i + d/2.

    Args:
        x: queries or keys (..., N, d).
        cosine: cosines (N, d/2).
        sine: sines (N, d/2).

    Source: J. Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021,
    arXiv 2104.09864; along the axes of an image: B. Heo et al., Rotary Position Embedding for
    Vision Transformer, 2024, arXiv 2403.13298.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


def _axis(n: int, count: int, like: Tensor) -> Waves:
    """Return sines and cosines (n, count) of the positions along one axis."""
    device, dtype = like.device, like.dtype
    return _waves.get((n, count, device, dtype), lambda: _made(n, count, device, dtype))


def _made(n: int, count: int, device: torch.device, dtype: torch.dtype) -> Waves:
    exact = torch.float32 if device.type == "mps" else torch.float64
    place = torch.arange(n, dtype=exact, device=device)
    index = torch.arange(count, dtype=exact, device=device)
    angle = place[:, None] * _BASE ** (-index / max(count, 1))
    return angle.sin().to(dtype), angle.cos().to(dtype)


def _over_grid(wave: Tensor, axis: int, grid: Sequence[int]) -> Tensor:
    """Repeat what varies along one axis (n, k) over a grid: (*grid, k)."""
    shape = [1] * len(grid)
    shape[axis] = grid[axis]
    return wave.view(*shape, -1).expand(*grid, -1)


def _joined(parts: list[Tensor], width: int, rest: float = 0.0) -> Tensor:
    """Concatenate parts (*grid, k) to (N, width), with a constant in the channels left over."""
    left = width - sum(part.shape[-1] for part in parts)
    if left:
        first = parts[0]
        parts = [*parts, first.new_full((*first.shape[:-1], left), rest)]
    return torch.cat(parts, dim=-1).flatten(0, -2)
