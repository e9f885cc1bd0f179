"""Data in the wrong range: outside the one that a model states, in a part of it, or of 8 bits."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ._checks import readable
from .distributed._wrappers import unwrapped

logger = logging.getLogger(__name__)

_ENOUGH = 64  # elements of a batch, of which none is in one half of the range by chance
_CALLS = 8  # after which data in a part of the range are believed
_LARGEST_BYTE = 255

# How often models were called for training, until their data were seen to fit.
_calls: WeakKeyDictionary[object, int] = WeakKeyDictionary()


def check_range(x: Tensor, model: object, name: str = "x", mask: Tensor | None = None) -> None:
    """Raise if x is outside the data range of a model where a mask is not 0 (read on the CPU)."""
    data_range = getattr(model, "data_range", None)
    if data_range is None or not readable(x):
        return
    low, high = (end.item() for end in _selected(x, mask).aminmax())
    _check_ends(low, high, data_range, name)


def check_training_data(x0: Tensor, model: Any, mask: Tensor | None = None) -> None:
    """Raise if data for training, which can be read, are outside the model's range.

    In the first call with a model values are read on every device, and further mistakes found:
    data that fill only the upper half of the range, such as images in [0, 1] for [-1, 1], and
    images of 8 bits for a model without a range.

    Raises:
        ValueError: if the data are in another range.
    """
    if (calls := _calls.get(model, 0)) >= _CALLS:
        if getattr(model, "data_range", None) is not None:
            check_range(x0, model, "x0", mask)
        return
    x = _selected(x0, mask).float()
    if x.numel() == 0:
        return
    ends = torch.stack([*x.aminmax(), x.square().mean().sqrt()])
    low, high, size = ends.tolist()
    data_range = getattr(model, "data_range", None)
    if data_range is None:
        _check_size(low, high, size, model, images=x0.ndim >= 3)
        stated = _range_of_network(model)
        if x0.ndim >= 3 and stated is not None and _in_part(low, high, stated):
            logger.warning(
                "the data, from %g to %g, fill a part of the range %s of the network%s; or make "
                "the network with data_range=(0, 1)",
                low,
                high,
                list(stated),
                _scaling(low, high, stated),
            )
        _calls[model] = _CALLS
        return
    _check_ends(low, high, data_range, "x0")
    doubtful = _in_part(low, high, data_range)
    if doubtful and x.numel() >= _ENOUGH and low <= 0.1:
        least, most = data_range
        raise ValueError(
            f"x0: expected data that fill the model's range [{least:g}, {most:g}], got values from "
            f"{low:g} to {high:g}{_scaling(low, high, data_range)}; or pass the model "
            "data_range=(0, 1) if they are meant"
        )
    _calls[model] = calls + 1 if doubtful else _CALLS


def _range_of_network(model: Any) -> tuple[float, float] | None:
    """Return the data range of a network of the library, None for others."""
    network = getattr(model, "network", None)
    config = getattr(unwrapped(network), "config", None) if isinstance(network, nn.Module) else None
    data_range = config.get("data_range") if isinstance(config, dict) else None
    return data_range if isinstance(data_range, tuple) and len(data_range) == 2 else None


def _in_part(low: float, high: float, data_range: tuple[float, float]) -> bool:
    """Return whether data are in [0, 1] where the range of a model is [-1, 1] or [0, 255]."""
    least, most = data_range
    return 0 <= low < high <= 1 and (least == -most or (least == 0 and most >= 32))


def _selected(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x.detach()
    return x if mask is None else x[mask.expand_as(x) != 0]


def _check_ends(low: float, high: float, data_range: tuple[float, float], name: str) -> None:
    """Raise unless the ends of the data are within the range of a model."""
    least, most = data_range
    slack = 1e-3 * (most - least)
    if least - slack <= low and high <= most + slack:
        return
    raise ValueError(
        f"{name}: expected data within the model's range [{least:g}, {most:g}], "
        f"got values from {low:g} to {high:g}{_scaling(low, high, data_range)}"
    )


def _scaling(low: float, high: float, data_range: tuple[float, float]) -> str:
    """Return the line that scales data of a usual range to that of a model, "; ..." or ""."""
    least, most = data_range
    width = most - least
    if low >= 0 and most < high <= _LARGEST_BYTE and high > 1:
        return f"; scale 8-bit images first, to {_line(least, width / _LARGEST_BYTE)}"
    if low >= 0 and high <= 1.001:
        return f"; scale images in [0, 1] first, to {_line(least, width)}"
    if -1.001 <= low < 0 and high <= 1.001:
        return f"; scale images in [-1, 1] first, to {_line(least + 0.5 * width, 0.5 * width)}"
    return ""


def _line(shift: float, scale: float) -> str:
    return f"{shift:g} + x * {scale:.6g}" if shift else f"x * {scale:.6g}"


def _check_size(low: float, high: float, size: float, model: Any, *, images: bool) -> None:
    """Raise if data look like images of 8 bits, and warn if they are large for the process.

    Args:
        low: the least value.
        high: the largest value.
        size: the root mean square.
        model: a model without a data range.
        images: whether the data may be images.
    """
    prior = float(model.sde.prior_std)
    sigma_data = getattr(model, "sigma_data", 0.0)
    meant = (max(sigma_data) if isinstance(sigma_data, tuple) else sigma_data) > 0.25 * size
    if images and not meant and low >= 0 and 20 < high <= _LARGEST_BYTE and size > 0.5 * prior:
        raise ValueError(
            "x0: expected data on the scale of the process, whose prior has standard deviation "
            f"{prior:g}, got values from {low:g} to {high:g}; scale 8-bit images to [-1, 1] by "
            "x / 127.5 - 1, standardize other data, or pass the model their data_range"
        )
    if size > 20 * prior:
        logger.warning(
            "the data, from %g to %g, are large for a process whose prior has standard deviation "
            "%g: samples cannot reach them; standardize them first",
            low,
            high,
            prior,
        )
