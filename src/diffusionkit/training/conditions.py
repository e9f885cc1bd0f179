"""Conditions left out at random, so that one network learns with and without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_number
from ..random import Generators, rand


def drop_conditions(
    condition: Tensor,
    null: Tensor | float,
    probability: float,
    *,
    generator: Generators = None,
) -> Tensor:
    """Return a condition (B, ...) whose samples are, each with a probability, the null instead.

    Train a conditional network on what this returns, and `ClassifierFreeGuidance` can ask it for
    the score with and without the condition. The papers drop 10 to 20 percent.

    Args:
        condition: labels (B,), or a condition of any shape (B, ...) and dtype.
        null: what stands for "no condition": a number or a tensor like that of one sample.
        probability: the probability of a sample to lose its condition, in [0, 1].
        generator: the source of randomness: one generator, one for each sample, or None.

    Raises:
        ValueError: if probability is outside [0, 1], or null has a shape that does not fit.
        TypeError: if condition is not a tensor, or null a float where condition holds integers.

    Source: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598.

    >>> drop_conditions(torch.tensor([3, 1]), 10, 1.0)
    tensor([10, 10])
    """
    check_number(probability, "probability")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: expected a number in [0, 1], got {probability}")
    if not isinstance(condition, Tensor) or condition.ndim == 0:
        raise TypeError(f"condition: expected a tensor (B, ...), got {condition!r}")
    nothing = null_like(null, condition, "null")
    u = rand(len(condition), generator=generator, device=condition.device)
    return torch.where(u.view(-1, *(1,) * (condition.ndim - 1)) < probability, nothing, condition)


def null_like(null: Any, condition: Tensor, name: str) -> Tensor:
    """Return a null value, a number or tensor, in the shape, dtype and device of a condition."""
    value = torch.as_tensor(null, device=condition.device)
    if value.is_floating_point() and not condition.is_floating_point():
        raise TypeError(f"{name}: expected {condition.dtype}, as the condition, got {value.dtype}")
    try:
        return value.to(condition.dtype).expand_as(condition)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a shape that fits the condition's, {tuple(condition.shape)}, "
            f"got {tuple(value.shape)}"
        ) from error
