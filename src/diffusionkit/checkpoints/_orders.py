"""The orders in which published networks keep what attention and embedding need."""

import torch
from torch import Tensor


def sines_first(weight: Tensor) -> Tensor:
    """Exchange the halves of the inputs of a linear map, for features with cosines first."""
    half = weight.shape[1] // 2
    return torch.cat([weight[:, half:], weight[:, :half]], dim=1)


def by_kind(weight: Tensor, heads: int, order: str) -> Tensor:
    """Put the outputs of a map to queries, keys and values in our order: kind, head, channel.

    Args:
        weight: Weight (3 C, C, 1, ...) or bias (3 C,).
        heads: Number of heads.
        order: The order of the outputs in the file, such as "head kind channel".

    Returns:
        Weight (3 C, C) or bias (3 C,).
    """
    sizes = {"kind": 3, "head": heads, "channel": len(weight) // (3 * heads)}
    axes = order.split()
    inner = weight.shape[1:2]
    parts = weight.reshape(*(sizes[axis] for axis in axes), *inner)
    order_of = [axes.index(axis) for axis in ("kind", "head", "channel")]
    return parts.permute(*order_of, *range(3, parts.ndim)).reshape(-1, *inner)


def matrix(weight: Tensor) -> Tensor:
    """Take the matrix (out, in) out of a convolution of one tap.

    Args:
        weight: Weight (out, in, 1, ...).

    Returns:
        Weight (out, in).
    """
    return weight.reshape(weight.shape[:2])
