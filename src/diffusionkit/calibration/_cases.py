"""Ensembles and observations: validation, and means over independent cases."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_device, check_finite, check_known, check_state
from .._masks import masked, zeroed
from .._precision import at_least_float32


def checked(
    ensemble: Tensor, observation: Tensor, *, least: int = 1, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """Return an ensemble (n, m, *D) and observations (n, *D) in one dtype, at least float32.

    Args:
        ensemble: the members.
        observation: the truth of each case.
        least: the least number of members.
        names: the names of both in errors.

    Raises:
        ValueError: if shapes or devices do not fit, or there are too few members.
        TypeError: if either is not a floating-point tensor.
    """
    for value, name in zip((ensemble, observation), names, strict=True):
        check_state(value, name)
        check_known(value, name)
    check_device(ensemble, observation, *names)
    shape = tuple(ensemble.shape)
    if ensemble.ndim < 2 or (shape[0], *shape[2:]) != tuple(observation.shape):
        raise ValueError(
            f"{names[0]}: expected shape (n, m, *D) for {names[1]} of shape (n, *D), "
            f"{tuple(observation.shape)}, got {shape}"
        )
    if shape[1] < least:
        raise ValueError(f"{names[0]}: expected at least {least} members, got {shape[1]}")
    dtype = torch.promote_types(ensemble.dtype, observation.dtype)
    return at_least_float32(ensemble.to(dtype)), at_least_float32(observation.to(dtype))


def weighted(
    weights: Tensor | None, ensemble: Tensor, observation: Tensor, names: tuple[str, str]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return weights (n, *D), and both tensors set to 0 where they are 0; all are finite.

    Raises:
        ValueError: if the weights do not fit or are negative, or a value is not finite where a
            weight is not 0 (read on the CPU only).
        TypeError: if the weights are not a tensor.
    """
    if weights is not None:
        weights, observation = masked(weights, observation, name="weights")
        ensemble = zeroed(ensemble, weights.unsqueeze(1))
    for value, name in zip((ensemble, observation), names, strict=True):
        check_finite(value, name)
    return weights, ensemble, observation
