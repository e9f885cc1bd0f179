"""Random dropping of conditions, so that one network learns with and without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_number
from ..random import Generators, rand


def drop_conditions(
    condition: Tensor, null: Tensor | float, probability: float, *, generator: Generators = None
) -> Tensor:
    """Replace a condition (B, ...) by the null condition, independently for each sample.

    A network trained on the result gives `ClassifierFreeGuidance` both the conditional and the
    unconditional score. The papers drop 10 to 20 percent.

    Args:
        condition: class labels (B,), or a condition of any shape (B, ...) and dtype.
        null: the null condition: a number, or a tensor that broadcasts to the condition.
        probability: the probability of dropping a sample's condition, in [0, 1].
        generator: one generator, one for each sample, or None.

    Raises:
        ValueError: if probability is outside [0, 1], or the shape of null does not fit.
        TypeError: if condition is not a tensor, or null is a float and condition holds integers.

    Source: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598.

    >>> import torch
    >>> from diffusionkit import drop_conditions
    >>> drop_conditions(torch.tensor([3, 1]), 10, 1.0)
    tensor([10, 10])
    """
    check_number(probability, "probability")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: expected a number in [0, 1], got {probability}")
    if not isinstance(condition, Tensor) or condition.ndim == 0:
        raise TypeError(f"condition: expected a tensor (B, ...), got {condition!r}")
    value = null_like(null, condition, "null")
    u = rand(len(condition), generator=generator, device=condition.device)
    return torch.where(u.view(-1, *(1,) * (condition.ndim - 1)) < probability, value, condition)


def null_like(null: Any, condition: Tensor, name: str) -> Tensor:
    """Return a null condition, a number or tensor, with another's shape, dtype and device."""
    if isinstance(null, bool) or not isinstance(null, (int, float, Tensor)):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(null).__name__}")
    if isinstance(null, Tensor) and null.is_meta and not condition.is_meta:
        raise ValueError(f"{name}: expected values, got a meta tensor")
    if isinstance(null, int):
        check_count(null, name, least=-(2**63), most=2**63 - 1)
    value = torch.as_tensor(null, device=condition.device)
    whole = not (condition.is_floating_point() or condition.is_complex())
    if (value.is_floating_point() and whole) or (value.is_complex() and not condition.is_complex()):
        raise TypeError(f"{name}: expected {condition.dtype}, as the condition, got {value.dtype}")
    try:
        return value.to(condition.dtype).expand_as(condition)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a shape that fits the condition's, "
            f"{tuple(condition.shape)}, got {tuple(value.shape)}"
        ) from error
