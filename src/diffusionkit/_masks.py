"""Masks and weights of the elements of data, in objectives and likelihoods."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_device, check_finite, readable
from ._precision import at_least_float32
from ._schedules import exact


def masked(
    mask: Tensor, x0: Tensor, fill: float = 0.0, name: str = "mask"
) -> tuple[Tensor, Tensor]:
    """Return a mask of the shape of data x0, and the data filled where it is 0.

    Both are in float32 at least: float16 cannot count the elements of an image.

    Args:
        mask: booleans or numbers >= 0, (B, *D) or with sizes of 1.
        x0: the data (B, *D).
        fill: the value of the data where the mask is 0.
        name: the name of the mask in errors.

    Raises:
        ValueError: if the shape or device does not fit, or, on the CPU, the mask is not finite, is
            negative or all 0 for a sample.
        TypeError: if it is not a tensor, or complex.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(mask).__name__}")
    if mask.dtype.is_complex:
        raise TypeError(f"{name}: expected booleans or numbers >= 0, got {mask.dtype}")
    check_device(mask, x0, name, "x0")
    fits = mask.ndim == x0.ndim and all(
        n in (1, size) for n, size in zip(mask.shape, x0.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected shape {tuple(x0.shape)}, or 1 for some of its sizes, "
            f"got {tuple(mask.shape)}"
        )
    x0 = at_least_float32(x0)
    mask = mask.to(x0.dtype).expand_as(x0)
    if readable(mask):
        check_finite(mask, name)
        if bool((mask < 0).any()):
            raise ValueError(f"{name}: expected numbers >= 0, got {float(mask.min()):g}")
        if not bool((total(mask) > 0).all()):
            raise ValueError(f"{name}: expected an entry > 0 in each sample, got a sample of zeros")
    return mask, torch.where(mask == 0, fill, x0)


def kept(mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask of 0 and 1 of the shape of data x, and the data set to 0 where it is 0.

    Raises:
        ValueError: as `masked` does, and, on the CPU, if the mask has other numbers: a weighted
            sum of the terms of a likelihood is the likelihood of nothing.
        TypeError: if it is not a tensor, or complex.
    """
    mask, x = masked(mask, x)
    if readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        other = float(mask[(mask != 0) & (mask != 1)][0])
        raise ValueError(
            f"mask: expected booleans, or numbers 0 and 1, got {other:g}; likelihoods have no "
            "weights: a part of the data is given or it is not"
        )
    return mask, x


def kept_levels(mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask of 0 and 1 of the shape of images, and the images with level 0 where it is 0.

    Raises:
        ValueError: as `kept` does.
        TypeError: if either is not a tensor.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images: expected a tensor of integers (B, *D), got {type(images).__name__}"
        )
    mask = kept(mask, torch.zeros(images.shape, device=images.device))[0]
    if not (images.is_floating_point() or images.is_complex() or images.dtype == torch.bool):
        images = images.long()  # uint16 has no masked_fill
    return mask, images.masked_fill(mask == 0, 0)


def common(mask: Tensor, reference: Tensor) -> Tensor:
    """Return reference data (n, *D) set to 0 where a mask of all samples is 0.

    Distances between states and references then count the elements that the mask keeps, and the
    posterior mean over the references is that of the kept elements given the kept state.

    Raises:
        ValueError: if the mask may differ between samples, or does not fit.
    """
    if isinstance(mask, Tensor) and mask.ndim and len(mask) != 1:
        raise ValueError(
            "mask: expected one mask for all samples, (1, *D), with reference data, got "
            f"{tuple(mask.shape)}; if masks differ, a reference has no information on samples "
            "whose elements it lacks"
        )
    return masked(mask, reference)[1]


def zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x with 0 where a mask is 0, whatever the value there, NaN included."""
    return x if mask is None else torch.where(mask == 0, 0.0, x)


def count(x: Tensor, mask: Tensor | None) -> int | Tensor:
    """Return the number of elements of a sample, or the sums of a mask (B,) in float64."""
    return x[0].numel() if mask is None else total(exact(mask))


def mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the elements of each sample (B,), weighted by a mask."""
    if mask is None:
        if x.ndim < 3:
            return x.mean(1) if x.ndim == 2 else x
        return x.mean(tuple(range(1, x.ndim)))
    return total(zeroed(x * mask, mask)) / total(mask)


def total(x: Tensor) -> Tensor:
    """Return the sum over the elements of each sample (B,)."""
    return x.reshape(len(x), -1).sum(1)
