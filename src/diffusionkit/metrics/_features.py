"""Shared by the metrics: feature validation, and gathering across processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .._hints import batch_advice
from ..distributed._group import gather_objects, is_distributed


class Accumulator(Protocol):
    """Statistics of a stream of samples that can be merged with those of another stream."""

    def merge(self, other: Any, /) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


_ROWS = 4096  # converted to float64 at once

Result = TypeVar("Result", bound=Tensor | Accumulator)


def all_gather(result: Result) -> Result:
    """Return the combined results of all processes of torch.distributed, the same on each.

    Args:
        result: features (n, d) or logits (n, C), whose rows are concatenated in rank order; n may
            differ between processes. Or `FeatureMoments` or an `InceptionScore`, merged into a
            new object. Without a process group, it is returned unchanged.
    """
    if not is_distributed():
        return result
    if isinstance(result, Tensor):
        rows = gather_objects(result.detach().cpu())
        return cast(Result, torch.cat(rows).to(result.device))
    first, *others = gather_objects(result.state_dict())
    total = type(result)()
    total.load_state_dict(first)
    for state in others:
        other = type(result)()
        other.load_state_dict(state)
        total.merge(other)
    return total


def check_features(x: Tensor, name: str, *, least: int = 1) -> None:
    """Raise unless x is floating-point, (n, d), finite, and n at least `least`.

    Unlike the checks of states, this reads the values on every device: one bad row would ruin
    a result that took hours.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape (n, d), got {batch_advice(x)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (n, d), one row per sample, got {tuple(x.shape)}")
    if len(x) < least:
        raise ValueError(f"{name}: expected at least {least} rows, got {len(x)}")
    bad = int((~torch.isfinite(x)).any(1).sum())
    if bad:
        raise ValueError(
            f"{name}: expected finite values, got {bad} of {len(x)} rows with NaN or infinity"
        )


def check_pair(real: Tensor, fake: Tensor, *, least: int) -> None:
    """Raise unless real (m, d) and fake (n, d) are valid features with the same d and device."""
    check_features(real, "real", least=least)
    if isinstance(fake, Tensor) and fake.device != real.device:
        raise ValueError(f"fake: expected the device of real, {real.device}, got {fake.device}")
    check_features(fake, "fake", least=least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"fake: expected {real.shape[1]} dimensions, as in real, got {fake.shape[1]}"
        )


def from_numpy(x: Any) -> Any:
    """Return a copy of a NumPy array as a tensor, and anything else unchanged."""
    return torch.tensor(x) if isinstance(x, np.ndarray) else x


def center(*features: Tensor) -> Tensor:
    """Return the mean of the means of several sets of features (n, d), (d,), in float64.

    Differences of features far from zero keep their digits relative to it.
    """
    means = [
        torch.stack([double(part).sum(0) for part in torch.split(x, _ROWS)]).sum(0) / len(x)
        for x in features
    ]
    return torch.stack(means).mean(0)


def double(x: Tensor) -> Tensor:
    """Return values in float64, on the CPU if their device does not support it."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)
