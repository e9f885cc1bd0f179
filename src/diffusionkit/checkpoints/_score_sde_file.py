"""Stage 1 of `load_score_sde`: the weights and noise levels in a file of score_sde."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._files import CheckpointError, read_torch
from .._weights import FLOATS, unwrapped

FOURIER = "all_modules.0.W"
"""The fixed frequencies of a Fourier embedding."""

_EXPECTED = "a checkpoint of score_sde, {optimizer, model, ema, step}"


def read_score_sde(
    path: str | os.PathLike[str], *, ema: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """Read the weights and the noise levels of a checkpoint.

    Args:
        path: the file.
        ema: whether to read the averaged weights rather than the last ones.

    Returns:
        The tensors by name, without prefixes such as ``module.``, and the noise levels, the
        largest first.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, malicious or of another kind.
    """
    data = read_torch(path, expected=_EXPECTED)
    wanted = ("model", "ema") if ema else ("model",)
    if not isinstance(data, Mapping) or any(key not in data for key in wanted):
        keys = list(data) if isinstance(data, Mapping) else type(data).__name__
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got {keys!s:.200}")
    model = data["model"]
    tensors_only = isinstance(model, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in model.items()
    )
    if not tensors_only or not model:
        raise CheckpointError(f"{path}: expected tensors by name under 'model', got something else")
    _check_counts(path, data)
    tensors = unwrapped(path, model)
    if ema:
        tensors |= _averages(path, data["ema"], tensors)
    return tensors, _levels(path, tensors.pop("sigmas", None))


def _check_counts(path: str | os.PathLike[str], data: Mapping[Any, Any]) -> None:
    """Raise unless the numbers in addition to the weights, if there are any, are valid."""
    ema = data.get("ema")
    averages = ema if isinstance(ema, Mapping) else {}
    decay = averages.get("decay")
    real = isinstance(decay, int | float) and not isinstance(decay, bool)
    if decay is not None and not (real and 0 <= decay <= 1):
        raise CheckpointError(f"{path}: ema.decay: expected a number in [0, 1], got {decay!r:.50}")
    counts = {"ema.num_updates": averages.get("num_updates"), "step": data.get("step")}
    for name, count in counts.items():
        if isinstance(count, Tensor) and count.numel() == 1 and not count.is_floating_point():
            count = count.item()
        if count is not None and not (type(count) is int and count >= 0):
            raise CheckpointError(f"{path}: {name}: expected an integer >= 0, got {count!r:.50}")


def _averages(
    path: str | os.PathLike[str], ema: Any, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Name the averages, a list in the order of the trained parameters."""
    shadows = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadows, list) or not all(isinstance(s, Tensor) for s in shadows):
        raise CheckpointError(
            f"{path}: expected a list of tensors under 'ema', 'shadow_params', got something else"
        )
    names = [name for name in tensors if name not in ("sigmas", FOURIER)]
    if len(shadows) != len(names):
        raise CheckpointError(
            f"{path}: expected {len(names)} averaged tensors, one for each trained one, "
            f"got {len(shadows)}"
        )
    for name, shadow in zip(names, shadows, strict=True):
        if shadow.shape != tensors[name].shape:
            raise CheckpointError(
                f"{path}: expected an average of {name} of shape {tuple(tensors[name].shape)}, "
                f"got {tuple(shadow.shape)}"
            )
    return dict(zip(names, shadows, strict=True))


def _levels(path: str | os.PathLike[str], sigmas: Tensor | None) -> list[float]:
    # Rounded to 12 digits: the file's levels were computed from logarithms.
    given = sigmas.flatten().tolist() if sigmas is not None and sigmas.dtype in FLOATS else []
    levels = [float(f"{sigma:.12g}") for sigma in given]
    if len(levels) < 2 or not all(a > b for a, b in itertools.pairwise((math.inf, *levels, 0.0))):
        raise CheckpointError(
            f"{path}: expected sigmas, decreasing noise levels, got {len(levels)}: {levels[:6]}"
        )
    return levels
