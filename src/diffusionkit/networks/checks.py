"""Errors that name what a network expected and what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SPATIAL = {0: "", 1: "L", 2: "HW", 3: "DHW"}  # one letter per spatial dimension


def check_positive(**values: int) -> None:
    """Refuse counts that are not positive integers.

    Args:
        **values: The counts by name.

    Raises:
        TypeError: If one is not an int.
        ValueError: If one is below 1.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_optional(**values: int | None) -> None:
    """Refuse counts that are neither positive integers nor None.

    Args:
        **values: The counts by name.

    Raises:
        TypeError: If one is not an int.
        ValueError: If one is below 1.
    """
    check_positive(**{name: value for name, value in values.items() if value is not None})


def check_fir_kernel(kernel: Sequence[float] | None) -> None:
    """Refuse FIR taps that cannot resample by two.

    Args:
        kernel: The taps, or None for none.

    Raises:
        ValueError: If there are fewer than two, one is not finite or their sum is zero.
    """
    if kernel is None:
        return
    total = sum(kernel)
    if len(kernel) < 2 or not math.isfinite(total) or total == 0:
        raise ValueError(f"fir_kernel must be at least two taps of nonzero sum, got {kernel}")


def check_dropout(dropout: float) -> None:
    """Refuse a dropout probability outside [0, 1).

    Args:
        dropout: The probability.

    Raises:
        ValueError: If it is outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices.

    Args:
        name: Name of the argument.
        value: Its value.
        choices: What it may be.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_layout(
    dims: int, width: int, multipliers: Sequence[float], attention_levels: Sequence[int]
) -> list[int]:
    """Refuse a layout of a U-Net that cannot be built.

    Args:
        dims: Number of spatial dimensions.
        width: Number of channels that the multipliers multiply.
        multipliers: Channels of each level over `width`.
        attention_levels: Indices of the levels with attention.

    Returns:
        The number of channels of each level.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If an argument is out of range.
    """
    check_positive(dims=dims, width=width)
    if width < 4 or width % 2:  # an embedding has as many features
        raise ValueError(f"width must be even and at least 4, got {width}")
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
    if not multipliers:
        raise ValueError("multipliers must have one entry per level, got none")
    for multiplier in multipliers:
        if not isinstance(multiplier, int | float) or isinstance(multiplier, bool):
            raise TypeError(f"multipliers must be numbers, got {multiplier!r}")
        if not math.isfinite(multiplier) or int(width * multiplier) < 1:
            raise ValueError(
                f"multipliers must leave at least one of {width} channels, got {multiplier}"
            )
    for level in attention_levels:
        if level not in range(len(multipliers)):
            raise ValueError(
                f"attention_levels must be in [0, {len(multipliers)}) for "
                f"{len(multipliers)} multipliers, got {level}"
            )
    return [int(width * multiplier) for multiplier in multipliers]


def check_data_range(data_range: tuple[float, float]) -> tuple[float, float]:
    """Refuse a range of the data that is none.

    Args:
        data_range: Smallest and largest value of the data.

    Returns:
        Scale and shift of the affine map that takes the range to [-1, 1].

    Raises:
        ValueError: If the range is not finite and increasing.
    """
    low, high = data_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"data_range must be finite and increasing, got {data_range}")
    return 2 / (high - low), -(high + low) / (high - low)


def check_divisible(x: Tensor, factor: int) -> None:
    """Refuse an input whose spatial sizes cannot be halved as often as the network does.

    Args:
        x: Input (B, C, ...).
        factor: Total down-sampling.

    Raises:
        ValueError: If a spatial size is not divisible by it.
    """
    if any(size % factor for size in x.shape[2:]):
        raise ValueError(
            f"every spatial size of x must be divisible by {factor}, got {tuple(x.shape[2:])}"
        )


def check_input(x: Tensor, channels: int, dims: int, weight: Tensor) -> None:
    r"""Refuse an input of wrong shape, dtype or device.

    Args:
        x: Input, expected to be (B, channels, \*spatial).
        channels: Expected number of channels.
        dims: Expected number of spatial dimensions, zero for vectors.
        weight: A weight of the network, for its dtype and device.

    Raises:
        TypeError: If the dtype is not the weight's (under autocast: not floating point).
        ValueError: If the shape or the device is wrong or the batch is empty.
    """
    if x.ndim != dims + 2 or x.shape[1] != channels:
        expected = ", ".join(["B", str(channels), *_SPATIAL[dims]])
        raise ValueError(f"x must have shape ({expected}), got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x must be on {weight.device} like the network, got {x.device}")
    if x.dtype != weight.dtype and not (x.is_floating_point() and _autocast(x.device.type)):
        raise TypeError(f"x must be {weight.dtype} like the network, got {x.dtype}")


def _autocast(device_type: str) -> bool:
    # Asking about a device that has no autocast, such as meta, is an error of its own.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _readable(tensor: Tensor) -> bool:
    """Whether the values may be asked for: not if it would wait for a device or break a graph."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def check_noise_label(x: Tensor, noise_label: Tensor) -> None:
    """Refuse a label (time) that does not go with the input.

    Args:
        x: Input (B, ...).
        noise_label: Label, expected to be (B,), real, on the device of x.

    Raises:
        TypeError: If the label is boolean or complex.
        ValueError: If its shape or device is wrong.
    """
    if noise_label.shape != x.shape[:1]:
        raise ValueError(
            f"noise_label must have shape ({x.shape[0]},), got {tuple(noise_label.shape)}"
        )
    if noise_label.dtype == torch.bool or noise_label.is_complex():
        raise TypeError(f"noise_label must be real, got {noise_label.dtype}")
    if noise_label.device != x.device:
        raise ValueError(f"noise_label must be on {x.device} like x, got {noise_label.device}")


def check_number(noise_label: Tensor, count: int) -> None:
    """Refuse a label that is not the number of an entry of a table.

    The values are read on the CPU only: elsewhere it would wait for the device.

    Args:
        noise_label: Label (B,).
        count: Number of entries.

    Raises:
        ValueError: If a label is outside [0, count).
    """
    if _readable(noise_label) and len(noise_label):
        low, high = noise_label.min().item(), noise_label.max().item()
        if not (low >= 0 and high < count):
            raise ValueError(
                f"noise_label must be the number of a noise level, in [0, {count}), "
                f"got values {low} to {high}"
            )


def check_class_labels(x: Tensor, class_labels: Tensor | None, num_classes: int | None) -> None:
    """Refuse class labels that do not go with the input or the network.

    The range is checked on the CPU only: elsewhere it would wait for the device.

    Args:
        x: Input (B, ...).
        class_labels: Class labels, expected to be (B,), int64, on the device of x, in
            [0, num_classes); expected to be None if `num_classes` is None.
        num_classes: Number of classes of the network, or None.

    Raises:
        TypeError: If the dtype is wrong, or labels are missing or unexpected.
        ValueError: If the shape, the device or the range is wrong.
    """
    if num_classes is None:
        if class_labels is not None:
            raise TypeError(
                f"class_labels must be None for a network without classes (num_classes=None), "
                f"got a tensor of shape {tuple(class_labels.shape)}"
            )
        return
    if class_labels is None:
        raise TypeError(
            f"class_labels must be a tensor (B,) for a network with num_classes={num_classes}, "
            "got None"
        )
    if class_labels.dtype != torch.int64:
        raise TypeError(f"class_labels must be torch.int64, got {class_labels.dtype}")
    if class_labels.shape != x.shape[:1]:
        raise ValueError(
            f"class_labels must have shape ({x.shape[0]},), got {tuple(class_labels.shape)}"
        )
    if class_labels.device != x.device:
        raise ValueError(f"class_labels must be on {x.device} like x, got {class_labels.device}")
    if _readable(class_labels):
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"class_labels must be in [0, {num_classes}), got values {low} to {high}"
            )


def check_condition(x: Tensor, condition: Tensor | None, features: int | None) -> None:
    """Refuse condition vectors that do not go with the input or the network.

    Args:
        x: Input (B, ...).
        condition: Condition vectors, expected to be (B, features), of the dtype and on the
            device of x, or None.
        features: Size of the vectors that the network takes, or None if it takes none.

    Raises:
        TypeError: If the dtype is wrong, or vectors are unexpected.
        ValueError: If the shape or the device is wrong.
    """
    if condition is None:
        return
    if features is None:
        raise TypeError(
            "condition must be None for a network without one (condition_features=None), "
            f"got a tensor of shape {tuple(condition.shape)}"
        )
    _check_beside(x, condition, "condition")
    if condition.shape != (x.shape[0], features):
        raise ValueError(
            f"condition must have shape ({x.shape[0]}, {features}), got {tuple(condition.shape)}"
        )


def check_low_res(x: Tensor, low_res: Tensor | None, channels: int | None) -> None:
    r"""Refuse a low-resolution image that does not go with the input or the network.

    Args:
        x: Input (B, C, \*spatial).
        low_res: Image, expected to be (B, channels, \*any spatial), of the dtype and on the device
            of x; expected to be None if `channels` is None.
        channels: Number of channels of the image that the network takes, or None.

    Raises:
        TypeError: If the dtype is wrong, or the image is missing or unexpected.
        ValueError: If the shape or the device is wrong.
    """
    if channels is None:
        if low_res is not None:
            raise TypeError(
                "low_res must be None for a network without one (low_res_channels=None), "
                f"got a tensor of shape {tuple(low_res.shape)}"
            )
        return
    if low_res is None:
        raise TypeError(
            f"low_res must be a tensor for a network with low_res_channels={channels}, got None"
        )
    _check_beside(x, low_res, "low_res")
    if low_res.ndim != x.ndim or low_res.shape[:2] != (x.shape[0], channels) or 0 in low_res.shape:
        expected = ", ".join([str(x.shape[0]), str(channels), *_SPATIAL[x.ndim - 2]])
        raise ValueError(f"low_res must have shape ({expected}), got {tuple(low_res.shape)}")


def _check_beside(x: Tensor, other: Tensor, name: str) -> None:
    if other.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {other.device}")
    if other.dtype != x.dtype:
        raise TypeError(f"{name} must be {x.dtype} like x, got {other.dtype}")
