"""Errors that name what an operation expected and what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Python numbers, used along every dimension, or a tensor with one dimension per spatial one.
Taps = tuple[float, ...] | Tensor
Padding = tuple[int, int] | Sequence[tuple[int, int]]


def check_signal(x: Tensor) -> int:
    r"""Refuse what is not a batch of signals, images or volumes.

    Args:
        x: Expected to be floating-point, (B, C, \*spatial) with one to three spatial dimensions.

    Returns:
        The number of spatial dimensions.

    Raises:
        TypeError: If x is no floating-point tensor.
        ValueError: If its rank is wrong or it has no channel or no pixel.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {_kind(x)}")
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"x must have shape (B, C, *spatial) with 1 to 3 spatial dimensions, "
            f"got {tuple(x.shape)}"
        )
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have channels and pixels, got shape {tuple(x.shape)}")
    return x.ndim - 2


def check_integer(*, least: int, **values: int) -> None:
    """Refuse what is not an integer of at least `least`.

    Args:
        least: The smallest that is allowed.
        **values: The numbers by name.

    Raises:
        TypeError: If one is not an int.
        ValueError: If one is too small.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_finite(name: str, value: float) -> None:
    """Refuse what is not a finite number.

    Args:
        name: Name of the argument.
        value: Its value.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is infinite or NaN.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not -math.inf < value < math.inf:  # a compiler traces no math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")


def check_kernel(kernel: Sequence[float] | Tensor, x: Tensor) -> Taps:
    """Refuse a kernel that does not go with the input.

    Args:
        kernel: Expected to be numbers or a real tensor with one dimension or as many as there
            are spatial ones.
        x: The input.

    Returns:
        The taps: Python numbers, or a float64 tensor with as many dimensions as there are
        spatial ones.

    Raises:
        TypeError: If the kernel is neither, or its values are not real numbers.
        ValueError: If it is empty or infinite, or its rank or device is wrong.
    """
    dims = x.ndim - 2
    if isinstance(kernel, Tensor):
        if kernel.dtype == torch.bool or kernel.is_complex():
            raise TypeError(f"kernel must be real, got {kernel.dtype}")
        if kernel.ndim not in (1, dims):
            allowed = "1 dimension" if dims == 1 else f"1 or {dims} dimensions"
            raise ValueError(f"kernel must have {allowed}, got shape {tuple(kernel.shape)}")
        if kernel.numel() == 0:
            raise ValueError(f"kernel must have a tap, got shape {tuple(kernel.shape)}")
        if kernel.device != x.device:
            raise ValueError(f"kernel must be on {x.device} like x, got {kernel.device}")
        return outer(kernel.double(), dims)
    if not isinstance(kernel, Sequence):
        raise TypeError(f"kernel must be a sequence of numbers or a tensor, got {_kind(kernel)}")
    if not kernel:
        raise ValueError("kernel must have a tap, got none")
    for value in kernel:
        check_finite("kernel", value)
    return tuple(kernel)


def outer(taps: Tensor, dims: int) -> Tensor:
    """Use a tensor with one dimension along each of `dims`; leave another as it is."""
    if taps.ndim == 1:
        line = taps
        for _ in range(dims - 1):
            taps = taps[..., None] * line
    return taps


def normalise(taps: Taps) -> Taps:
    """Divide taps by their sum.

    Args:
        taps: The taps. The sum of a tensor is not checked: that could wait for its device.

    Returns:
        Taps of sum 1.

    Raises:
        ValueError: If the numbers have sum zero.
    """
    if isinstance(taps, Tensor):
        return taps / taps.sum()
    total = math.fsum(taps)
    if total == 0:
        raise ValueError(f"kernel must not have sum zero, got {taps}")
    return tuple(tap / total for tap in taps)


def check_padding(padding: Padding, dims: int) -> tuple[tuple[int, int], ...]:
    """Refuse a padding that is neither one pair of ints nor one for each dimension.

    Args:
        padding: Zeros before and after, negative to crop.
        dims: Number of spatial dimensions.

    Returns:
        One pair per dimension.

    Raises:
        TypeError: If it is no sequence of ints or pairs of them.
        ValueError: If it has a wrong length.
    """
    message = f"padding must be a pair of ints or {dims} such pairs, got {padding!r}"
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
    r"""Refuse a weight or bias that does not go with the input.

    Args:
        weight: Expected to be (out, C, \*k) with the dtype and device of x; under autocast any
            floating-point dtype.
        bias: Expected to be (out,), likewise, or None.
        x: Input (B, C, \*spatial).

    Raises:
        TypeError: If one is no tensor or of a wrong dtype.
        ValueError: If a shape or device is wrong.
    """
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else 0
    for name, value, shape in (
        ("weight", weight, (None, x.shape[1], *(None,) * (x.ndim - 2))),
        ("bias", bias, (outputs,)),
    ):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(value)}")
        if value.ndim != len(shape) or any(
            have == 0 or want not in (None, have)
            for have, want in zip(value.shape, shape, strict=True)
        ):
            expected = ", ".join("*" if want is None else str(want) for want in shape)
            raise ValueError(f"{name} must have shape ({expected}), got {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {value.device}")
        if value.dtype != x.dtype and not autocast(x):
            raise TypeError(f"{name} must be {x.dtype} like x, got {value.dtype}")


def autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    kind = x.device.type
    # Asking about a device that has no autocast, such as meta, is an error of its own.
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
