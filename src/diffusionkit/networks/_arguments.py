"""Validation of the arguments of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._checks import (
    autocast_enabled,
    check_choice,
    check_count,
    check_data_range,
    check_device,
    check_flag,
    check_number,
    check_sequence,
    check_state,
    readable,
)
from .._hints import label_advice, layout_advice, number_advice

MOST_CHANNELS = 2**20
# What is a number of modules takes seconds to build, and rather more would take days.
_MOST = {"depth": 1000, "blocks": 1000, "dims": 3}
_SPATIAL = {0: "", 1: "L", 2: "HW", 3: "DHW"}  # one letter per spatial dimension


def check_counts(**values: int) -> None:
    """Raise unless all named values are positive integers of a size that can be built."""
    for name, value in values.items():
        check_count(value, name, most=_MOST.get(name, MOST_CHANNELS))


def check_optional_counts(**values: int | None) -> None:
    """Raise unless all named values are positive integers or None."""
    check_counts(**{name: value for name, value in values.items() if value is not None})


def check_flags(**values: bool) -> None:
    """Raise unless all named values are True or False."""
    for name, value in values.items():
        check_flag(value, name)


def check_fir_kernel(kernel: Sequence[float] | None) -> None:
    """Raise unless the taps can resample by two: at least two, with a finite nonzero sum."""
    if kernel is None:
        return
    check_sequence(kernel, "fir_kernel")
    for tap in kernel:
        check_number(tap, "fir_kernel")
    total = sum(kernel)
    if len(kernel) < 2 or not math.isfinite(total) or total == 0:
        raise ValueError(f"fir_kernel: expected at least two taps of nonzero sum, got {kernel}")


def check_dropout(dropout: float) -> None:
    """Raise unless the dropout probability is in [0, 1)."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float, np.floating)):
        raise TypeError(f"dropout: expected a number, got {number_advice(dropout, float)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_layout(
    dims: int, width: int, multipliers: Sequence[float], attention_levels: Sequence[int]
) -> list[int]:
    """Return the number of channels of each level of a U-Net, or raise if it cannot be built.

    Args:
        dims: number of spatial dimensions.
        width: number of channels that the multipliers multiply.
        multipliers: channels of each level over `width`.
        attention_levels: indices of the levels with attention.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if an argument is out of range.
    """
    check_counts(dims=dims, width=width)
    if width < 4 or width % 2:  # the embedding of the noise label has as many features
        raise ValueError(f"width: expected an even integer >= 4, got {width}")
    check_choice("dims", dims, (1, 2, 3))
    check_sequence(multipliers, "multipliers")
    check_sequence(attention_levels, "attention_levels")
    if not multipliers:
        raise ValueError("multipliers: expected one entry per level, got none")
    for multiplier in multipliers:
        check_number(multiplier, "multipliers")
        if not 1 <= width * multiplier <= MOST_CHANNELS:
            raise ValueError(
                f"multipliers: expected at least one of {width} channels, and no more than "
                f"{MOST_CHANNELS}, got {multiplier!r:.40}"
            )
    for level in attention_levels:
        check_count(level, "attention_levels", least=0)
        if level not in range(len(multipliers)):
            raise ValueError(
                f"attention_levels: expected levels in [0, {len(multipliers)}), got {level}; there "
                f"is one level for each of multipliers={multipliers!r:.80}"
            )
    return [int(width * multiplier) for multiplier in multipliers]


def default_levels(
    levels: Sequence[int] | None, default: Sequence[int], multipliers: Sequence[float]
) -> Sequence[int]:
    """Return the levels with attention: if None, those of a default that the network has."""
    if levels is not None or not isinstance(multipliers, Sequence):
        return default if levels is None else levels
    return tuple(level for level in default if level < len(multipliers))


def unit_range(data_range: tuple[float, float]) -> tuple[float, float]:
    """Return scale and shift of the affine map from a data range to [-1, 1], or raise."""
    low, high = check_data_range(data_range)
    return 2 / (high - low), -(high + low) / (high - low)


def check_divisible(x: Tensor, factor: int) -> None:
    """Raise unless all spatial sizes of an input are divisible by the total downsampling factor."""
    if any(size % factor for size in x.shape[2:]):
        raise ValueError(
            f"x: expected spatial sizes divisible by {factor}, got {tuple(x.shape[2:])}"
        )


def network_input(x: Tensor, channels: int, dims: int, weight: Tensor) -> Tensor:
    r"""Return an input in the network's dtype, or raise unless it has the expected shape.

    Under autocast, which casts it, the input is returned unchanged.

    Args:
        x: input, expected to be (B, channels, \*spatial).
        channels: expected number of channels.
        dims: expected number of spatial dimensions, zero for vectors.
        weight: a weight of the network, for its dtype and device.

    Raises:
        TypeError: if the input is not a floating-point tensor.
        ValueError: if the shape or the device is wrong or the batch is empty.
    """
    check_state(x)
    if x.ndim != dims + 2 or x.shape[1] != channels:
        expected = ", ".join(["B", str(channels), *_SPATIAL[dims]])
        got = f"{tuple(x.shape)}{layout_advice(x, channels, dims)}"
        raise ValueError(f"x: expected shape ({expected}), got {got}")
    check_device(x, weight, "x", "the network")
    return x if x.dtype == weight.dtype or autocast_enabled(x) else x.to(weight.dtype)


def check_noise_label(x: Tensor, noise_label: Tensor) -> None:
    """Raise unless the noise label is real, (B,), and on the device of the input."""
    _check_tensor(noise_label, "noise_label")
    if noise_label.shape != x.shape[:1]:
        raise ValueError(
            f"noise_label: expected shape ({x.shape[0]},), got {tuple(noise_label.shape)}"
        )
    if noise_label.dtype == torch.bool or noise_label.is_complex():
        raise TypeError(f"noise_label: expected real numbers, got {noise_label.dtype}")
    check_device(noise_label, x, "noise_label")


def check_label_dtype(noise_label: Tensor) -> None:
    """Raise if noise labels are in half precision, which rounds 999 t to a multiple of 4."""
    if noise_label.is_floating_point() and noise_label.dtype.itemsize < 4:
        raise TypeError(
            f"noise_label: expected float32, float64 or integers, got {noise_label.dtype}, which "
            "rounds it; pass the score model what casts the network's inputs, such as a network "
            "sharded by fully_shard, or let it cast no inputs (cast_forward_inputs=False)"
        )


def check_label_values(noise_label: Tensor, use: str, *, positive: bool) -> None:
    """Raise unless noise labels are finite, and positive if they must be (read on the CPU only).

    Args:
        noise_label: the noise labels (B,).
        use: what the network does with them, for the error.
        positive: whether they must be positive.

    Raises:
        TypeError: if they are in half precision.
    """
    check_label_dtype(noise_label)
    if readable(noise_label) and len(noise_label):
        low, high = (end.item() for end in noise_label.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)) or (positive and low <= 0):
            kind, advice = "finite numbers", "check the model's label at this time"
            if positive:
                kind = "finite numbers > 0"
                advice = (
                    'make the network with embedding="positional" and scale_by_sigma=False, or use '
                    "a model with label=SigmaLabel(), such as RawScoreModel"
                )
            raise ValueError(
                f"noise_label: expected {kind}, since the network {use}, got values from "
                f"{low:g} to {high:g}; {advice}"
            )


def check_level_index(noise_label: Tensor, count: int) -> None:
    """Raise unless noise labels are indices in [0, count) (read on the CPU only)."""
    check_label_dtype(noise_label)
    if readable(noise_label) and len(noise_label):
        low, high = noise_label.min().item(), noise_label.max().item()
        if not (low >= 0 and high < count):
            raise ValueError(
                f"noise_label: expected the index of a noise level, in [0, {count}), "
                f"got values from {low} to {high}"
            )


def check_class_labels(x: Tensor, class_labels: Tensor | None, num_classes: int | None) -> None:
    """Raise unless class labels match the input and the network.

    Args:
        x: input (B, ...).
        class_labels: class labels, expected to be (B,), int64, on the device of x, in
            [0, num_classes) (read on the CPU only); expected to be None if `num_classes` is None.
        num_classes: number of classes of the network, or None.

    Raises:
        TypeError: if the dtype is wrong, or labels are missing or unexpected.
        ValueError: if the shape, the device or a value is wrong.
    """
    if num_classes is None:
        if class_labels is not None:
            raise TypeError(
                "class_labels: expected None for a network without classes (num_classes=None), "
                f"got {_described(class_labels)}; make the network with num_classes=..."
            )
        return
    if class_labels is None:
        raise TypeError(
            f"class_labels: expected a tensor (B,) for a network with num_classes={num_classes}, "
            f"got None{label_advice(None, len(x))}"
        )
    if not isinstance(class_labels, Tensor):
        raise TypeError(
            f"class_labels: expected a tensor, got {type(class_labels).__name__}"
            f"{label_advice(class_labels, len(x))}"
        )
    if class_labels.dtype != torch.int64:
        got = f"{class_labels.dtype}{label_advice(class_labels, len(x))}"
        raise TypeError(f"class_labels: expected torch.int64, got {got}")
    if class_labels.shape != x.shape[:1]:
        got = f"{tuple(class_labels.shape)}{label_advice(class_labels, len(x))}"
        raise ValueError(f"class_labels: expected shape ({x.shape[0]},), got {got}")
    check_device(class_labels, x, "class_labels")
    if readable(class_labels):
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high >= num_classes:
            hint = "; count classes from 0" if low == 1 and high == num_classes else ""
            if low >= 0 and high == num_classes and not hint:
                hint = (
                    f"; one more class, num_classes={num_classes + 1}, is needed where one stands "
                    "for no class, as in ClassifierFreeGuidance"
                )
            raise ValueError(
                f"class_labels: expected classes in [0, {num_classes}), "
                f"got values from {low} to {high}{hint}"
            )


def _check_tensor(x: object, name: str) -> None:
    """Raise unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _described(x: object) -> str:
    """Return a value's type, and its shape if it is a tensor."""
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_floating(x: Tensor, name: str) -> None:
    """Raise unless x is a floating-point tensor."""
    _check_tensor(x, name)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def network_condition(
    x: Tensor, condition: Tensor | None, features: int | None, *, required: bool = False
) -> Tensor | None:
    """Return condition vectors (B, features), or raise unless they match the input and network.

    Args:
        x: input (B, ...).
        condition: condition vectors, expected to be (B, features), or (features,) or (1, features)
            for one that all samples have, floating-point, and on the device of x; or None.
        features: size of the network's condition vectors, or None if it takes none.
        required: whether a network with a condition needs one.

    Raises:
        TypeError: if the dtype is wrong, or vectors are missing or unexpected.
        ValueError: if the shape or the device is wrong.
    """
    if condition is None:
        if required and features is not None:
            raise TypeError(
                f"condition: expected a tensor (B, {features}), or ({features},) for all samples, "
                f"for a network with condition_features={features}, got None"
            )
        return None
    if features is None:
        raise TypeError(
            "condition: expected None for a network without one (condition_features=None), "
            f"got {_described(condition)}"
        )
    check_floating(condition, "condition")
    check_device(condition, x, "condition")
    n = x.shape[0]
    # By dimension, not as tuples: torch.export would compare n with the number of features.
    fits = condition.ndim in (1, 2) and condition.shape[-1] == features
    if not fits or (condition.ndim == 2 and condition.shape[0] not in (1, n)):
        raise ValueError(
            f"condition: expected shape ({n}, {features}), or ({features},) for all samples, "
            f"got {tuple(condition.shape)}"
        )
    return condition.expand(n, features)


def check_low_res(x: Tensor, low_res: Tensor | None, channels: int | None) -> None:
    r"""Raise unless a low-resolution image matches the input and the network.

    Args:
        x: input (B, C, \*spatial).
        low_res: image, expected to be (B, channels, \*any spatial), floating-point, and on the
            device of x; expected to be None if `channels` is None.
        channels: number of channels of the network's low-resolution image, or None.

    Raises:
        TypeError: if the dtype is wrong, or the image is missing or unexpected.
        ValueError: if the shape or the device is wrong.
    """
    if channels is None:
        if low_res is not None:
            raise TypeError(
                "low_res: expected None for a network without one (low_res_channels=None), "
                f"got {_described(low_res)}"
            )
        return
    if low_res is None:
        raise TypeError(
            f"low_res: expected a tensor for a network with low_res_channels={channels}, got None"
        )
    check_floating(low_res, "low_res")
    check_device(low_res, x, "low_res")
    if low_res.ndim != x.ndim or low_res.shape[:2] != (x.shape[0], channels) or 0 in low_res.shape:
        expected = ", ".join([str(x.shape[0]), str(channels), *_SPATIAL[x.ndim - 2]])
        raise ValueError(f"low_res: expected shape ({expected}), got {tuple(low_res.shape)}")
