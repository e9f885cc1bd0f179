"""Masks and weights of the elements of data, in objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_device, check_finite, readable
from .._precision import at_least_float32


def masked(mask: Tensor, x0: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a mask of the shape of data x0, and the data filled where it is 0.

    Both are in float32 at least: float16 cannot count the elements of an image.

    Args:
        mask: booleans or numbers >= 0, (B, *D) or with sizes of 1.
        x0: the data (B, *D).
        fill: the value of the data where the mask is 0.

    Raises:
        ValueError: if the shape or device does not fit, or, on the CPU, the mask is not finite, is
            negative or all 0 for a sample.
        TypeError: if it is not a tensor, or complex.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor or None, got {type(mask).__name__}")
    if mask.dtype.is_complex:
        raise TypeError(f"mask: expected booleans or numbers >= 0, got {mask.dtype}")
    check_device(mask, x0, "mask", "x0")
    fits = mask.ndim == x0.ndim and all(
        n in (1, size) for n, size in zip(mask.shape, x0.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask: expected shape {tuple(x0.shape)}, or 1 for some of its sizes, "
            f"got {tuple(mask.shape)}"
        )
    x0 = at_least_float32(x0)
    mask = mask.to(x0.dtype).expand_as(x0)
    if readable(mask):
        check_finite(mask, "mask")
        if bool((mask < 0).any()):
            raise ValueError(f"mask: expected numbers >= 0, got {float(mask.min()):g}")
        if not bool((total(mask) > 0).all()):
            raise ValueError("mask: expected an entry > 0 in each sample, got a sample of zeros")
    return mask, torch.where(mask == 0, fill, x0)


def mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the elements of each sample (B,), weighted by a mask."""
    if mask is None:
        return x.reshape(len(x), -1).mean(1)
    return total(x * mask) / total(mask)


def total(x: Tensor) -> Tensor:
    """Return the sum over the elements of each sample (B,)."""
    return x.reshape(len(x), -1).sum(1)
