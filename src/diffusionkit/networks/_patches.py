"""Validation of the arguments of transformers: patches and feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._checks import check_number, check_sequence
from ._arguments import MOST_CHANNELS, check_counts


def patch_sizes(patch_size: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return the size of a patch along each dimension, from one for all or one for each."""
    if isinstance(patch_size, int):
        check_counts(patch_size=patch_size)
        return (patch_size,) * dims
    check_sequence(patch_size, "patch_size")
    for size in patch_size:
        check_counts(patch_size=size)
    if len(patch_size) != dims:
        raise ValueError(
            f"patch_size: expected one integer or {dims}, got {len(patch_size)} of them"
        )
    return tuple(patch_size)


def check_patches(x: Tensor, patches: Sequence[int]) -> list[int]:
    """Return the number of patches along each dimension, or raise if they do not fit an input."""
    sizes = x.shape[2:]
    if any(size % patch for size, patch in zip(sizes, patches, strict=True)):
        raise ValueError(
            f"x: expected spatial sizes divisible by those of a patch, {tuple(patches)}, "
            f"got {tuple(sizes)}"
        )
    return [size // patch for size, patch in zip(sizes, patches, strict=True)]


def check_hidden(width: int, ratio: float) -> int:
    """Return the hidden units of a feed-forward layer, or raise if there are none or too many."""
    check_number(ratio, "mlp_ratio")
    if not 1 <= width * ratio <= MOST_CHANNELS:
        raise ValueError(
            f"mlp_ratio: expected at least one of {width} channels, and no more than "
            f"{MOST_CHANNELS}, got {ratio!r:.40}"
        )
    return round(width * ratio)
