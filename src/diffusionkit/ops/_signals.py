"""Validation and normalization of the arguments of FIR resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_device, check_dtype, check_finite, check_number

# Python numbers, used along every dimension, or a tensor with one dimension per spatial one.
Taps = tuple[float, ...] | Tensor
Padding = tuple[int, int] | Sequence[tuple[int, int]]


def check_signal(x: Tensor) -> int:
    r"""Return the number of spatial dimensions of a batch of signals, images or volumes.

    Args:
        x: expected to be floating-point, (B, C, \*spatial) with one to three spatial dimensions.

    Raises:
        TypeError: if x is not a floating-point tensor.
        ValueError: if its number of dimensions is wrong or it has no channel or no pixel.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {_kind(x)}")
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"x: expected shape (B, C, *spatial) with 1 to 3 spatial dimensions, "
            f"got {tuple(x.shape)}"
        )
    if 0 in x.shape[1:]:
        raise ValueError(f"x: expected channels and pixels, got shape {tuple(x.shape)}")
    return x.ndim - 2


def check_finite_number(value: float, name: str) -> None:
    """Raise unless a value is a finite number."""
    check_number(value, name)
    if not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_kernel(kernel: Sequence[float] | Tensor, x: Tensor) -> Taps:
    """Return the taps of a kernel, or raise if it does not match the input.

    Args:
        kernel: numbers, or a real tensor with one dimension or as many as x has spatial ones.
        x: the input.

    Returns:
        Python numbers, or a float64 tensor with as many dimensions as there are spatial ones.

    Raises:
        TypeError: if the kernel is neither, or its values are not real numbers.
        ValueError: if it is empty or infinite, or its number of dimensions or device is wrong.
    """
    dims = x.ndim - 2
    if isinstance(kernel, Tensor):
        if kernel.dtype == torch.bool or kernel.is_complex():
            raise TypeError(f"kernel: expected real numbers, got {kernel.dtype}")
        if kernel.ndim not in (1, dims):
            allowed = "1 dimension" if dims == 1 else f"1 or {dims} dimensions"
            raise ValueError(f"kernel: expected {allowed}, got shape {tuple(kernel.shape)}")
        if kernel.numel() == 0:
            raise ValueError(f"kernel: expected at least one tap, got shape {tuple(kernel.shape)}")
        check_device(kernel, x, "kernel")
        check_finite(kernel, "kernel")
        return outer(kernel.double(), dims)
    if not isinstance(kernel, Sequence) or isinstance(kernel, (str, bytes)):
        raise TypeError(f"kernel: expected a sequence of numbers or a tensor, got {_kind(kernel)}")
    return check_numbers(kernel)


def check_numbers(kernel: Sequence[float]) -> tuple[float, ...]:
    """Return the taps of a kernel that is a sequence, or raise unless they are finite numbers."""
    if not kernel:
        raise ValueError("kernel: expected at least one tap, got none")
    for value in kernel:
        check_finite_number(value, "kernel")
    return tuple(kernel)


def outer(taps: Tensor, dims: int) -> Tensor:
    """Extend one-dimensional taps to `dims` dimensions by outer products; return others as is."""
    if taps.ndim == 1:
        line = taps
        for _ in range(dims - 1):
            taps = taps[..., None] * line
    return taps


def normalize(taps: Taps) -> Taps:
    """Divide taps by their sum; raise if it is zero (not checked for tensors, to avoid a sync)."""
    if isinstance(taps, Tensor):
        return taps / taps.sum()
    total = math.fsum(taps)
    if total == 0:
        raise ValueError(f"kernel: expected taps of nonzero sum, got {taps}")
    return tuple(tap / total for tap in taps)


def check_padding(padding: Padding, dims: int) -> tuple[tuple[int, int], ...]:
    """Return a padding as one pair per dimension, or raise.

    Args:
        padding: zeros before and after, negative to crop: one pair, or one for each dimension.
        dims: number of spatial dimensions.

    Raises:
        TypeError: if it is not a sequence of integers or of pairs of them.
        ValueError: if it has a wrong length.
    """
    message = f"padding: expected a pair of integers or {dims} such pairs, got {padding!r}"
    if not isinstance(padding, Sequence):
        raise TypeError(message)
    pairs: Sequence[object] = padding
    if not any(isinstance(pair, Sequence) for pair in padding):
        pairs = (padding,) * dims
    if len(pairs) != dims:
        raise ValueError(message)
    checked = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or not all(type(number) is int for number in pair):
            raise TypeError(message)
        if len(pair) != 2:
            raise ValueError(message)
        checked.append((pair[0], pair[1]))
    return tuple(checked)


def check_weight(weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    r"""Raise unless weight and bias match the input.

    Args:
        weight: expected to be (out, C, \*k) with the dtype and device of x; under autocast any
            floating-point dtype.
        bias: expected to be (out,), with the same dtype and device, or None.
        x: input (B, C, \*spatial).

    Raises:
        TypeError: if one is not a tensor or has a wrong dtype.
        ValueError: if a shape or device is wrong.
    """
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else 0
    for name, value, shape in (
        ("weight", weight, (None, x.shape[1], *(None,) * (x.ndim - 2))),
        ("bias", bias, (outputs,)),
    ):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {_kind(value)}")
        if value.ndim != len(shape) or any(
            have == 0 or want not in (None, have)
            for have, want in zip(value.shape, shape, strict=True)
        ):
            expected = ", ".join("*" if want is None else str(want) for want in shape)
            raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
        check_device(value, x, name)
        check_dtype(value, x, name, autocast=True)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
