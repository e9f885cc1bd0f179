"""The standard deviation of data: one number, or one for each channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ._checks import check_positive
from ._kept import Kept
from ._schedules import exact, schedule_dtype

SigmaData: TypeAlias = float | Sequence[float] | Tensor

_ON_DEVICES: Kept[Tensor] = Kept()


def as_sigma_data(value: Any, name: str = "sigma_data") -> float | tuple[float, ...]:
    """Return a standard deviation as it is, and those of channels as a tuple.

    Args:
        value: a number; or a sequence or a tensor (C,), or (C, 1, ...) as it multiplies a sample.
        name: the name of the argument.

    Raises:
        ValueError: if a number is not finite and positive, there are none, or a tensor has other
            values than one for each channel.
        TypeError: if it is none of these.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        shape = tuple(value.shape)
        if not shape or math.prod(shape) != shape[0]:
            raise ValueError(
                f"{name}: expected a number, or one for each channel, (C,) or (C, 1, ...), got a "
                f"{type(value).__name__} of shape {shape}"
                + ("" if shape else "; convert it by float(x)")
            )
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name}: expected values, got a meta tensor")
        value = value.reshape(-1).tolist()
    if not isinstance(value, (list, tuple)):
        check_positive(value, name)
        number: float = value
        return number
    if not value:
        raise ValueError(f"{name}: expected at least one number, got none")
    for one in value:
        check_positive(one, name)
    return tuple(float(one) for one in value)


def overall(sigma_data: float | tuple[float, ...]) -> float:
    """Return the standard deviation over all channels: their root mean square."""
    if not isinstance(sigma_data, tuple):
        return sigma_data
    return math.sqrt(sum(one * one for one in sigma_data) / len(sigma_data))


def for_channels(sigma_data: tuple[float, ...], c: Tensor) -> Tensor:
    """Return standard deviations (C,) on the device of coefficients, in float64 where it has it."""
    place, dtype = c.device, schedule_dtype(c.device)

    def made() -> Tensor:
        return torch.tensor(sigma_data, device=place, dtype=dtype)

    return _ON_DEVICES.get((sigma_data, place, dtype), made)


def check_channels(sigma_data: tuple[float, ...], x: Tensor) -> None:
    """Raise unless a state (B, C, ...) has as many channels as there are standard deviations."""
    if x.ndim < 2 or x.shape[1] != len(sigma_data):
        raise ValueError(
            f"x: expected {len(sigma_data)} channels, as sigma_data has, got shape {tuple(x.shape)}"
        )


def over_channels(values: Tensor, x: Tensor) -> Tensor:
    """Shape numbers (B, C) so that they multiply a state (B, C, ...), in its dtype."""
    return values.to(x.dtype).view(*values.shape, *(1,) * (x.ndim - 2))


def spread(alpha: Tensor, sigma: Tensor, sigma_data: tuple[float, ...]) -> Tensor:
    """Return sqrt(alpha^2 sd^2 + sigma^2) (B, C), the standard deviation of a state's channels."""
    alpha, sigma = exact(alpha).unsqueeze(1), exact(sigma).unsqueeze(1)
    return torch.hypot(sigma, alpha * for_channels(sigma_data, alpha))
