"""What the metrics share: checks of features, and what the processes put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist


class Accumulator(Protocol):
    """What is known of a stream of samples, and can be joined with what another knows."""

    def merge(self, other: Any, /) -> None:
        """Take in what another accumulator has seen."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that is known, on the CPU."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Know what a state says, and nothing else."""


Found = TypeVar("Found", bound=Tensor | Accumulator)


def gather(found: Found) -> Found:
    """Return what all processes of torch.distributed have found, the same on each of them.

    Args:
        found: features (n, d) or logits (n, C), of which n may differ between the processes: their
            rows come back in the order of the ranks. Or `FeatureMoments` or an `InceptionScore`,
            which stay as they are: the merged one is new. Without torch.distributed it is what
            the process has.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return found
    everyone: list[Any] = [None] * dist.get_world_size()
    if isinstance(found, Tensor):
        dist.all_gather_object(everyone, found.detach().cpu())
        return cast(Found, torch.cat(everyone).to(found.device))
    dist.all_gather_object(everyone, found.state_dict())
    total = type(found)()
    total.load_state_dict(everyone[0])
    for state in everyone[1:]:
        other = type(found)()
        other.load_state_dict(state)
        total.merge(other)
    return total


def check_features(x: Tensor, name: str, *, least: int = 1) -> None:
    """Raise unless x is floating-point, (n, d), finite, and n at least `least`.

    Unlike the checks of states, this reads the values on every device: one bad row would spoil
    a number that took hours.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape (n, d), got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{name}: expected shape (n, d), one row for each sample, got {tuple(x.shape)}"
        )
    if len(x) < least:
        raise ValueError(f"{name}: expected at least {least} rows, got {len(x)}")
    bad = int((~torch.isfinite(x)).any(1).sum())
    if bad:
        raise ValueError(
            f"{name}: expected finite values, got {bad} of {len(x)} rows with NaN or infinity"
        )


def check_pair(real: Tensor, fake: Tensor, *, least: int) -> None:
    """Raise unless real (m, d) and fake (n, d) are features of one kind, on one device."""
    check_features(real, "real", least=least)
    if isinstance(fake, Tensor) and fake.device != real.device:
        raise ValueError(f"fake: expected the device of real, {real.device}, got {fake.device}")
    check_features(fake, "fake", least=least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"fake: expected features of {real.shape[1]} dimensions as real's, got {fake.shape[1]}"
        )


def from_numpy(x: Any) -> Any:
    """Return an array of numpy as a tensor of its own, and anything else as it is."""
    return torch.tensor(x) if isinstance(x, np.ndarray) else x


def double(x: Tensor) -> Tensor:
    """Return values in float64, on the CPU where their device has none."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)
