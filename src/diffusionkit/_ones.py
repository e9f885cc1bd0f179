"""Ones that need not be multiplied by.

Weights are often 1 for all samples, and so is alpha of a process that only adds noise. Such a
tensor carries a mark, which holds until it is changed in place; no view or copy of it is marked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tracing import traced


def ones_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ones like x, in another dtype if there is one, that are known to be ones."""
    ones: Any = torch.ones_like(x, dtype=dtype)
    # Validated times, which are marked themselves, are not traced.
    plain = hasattr(x, "_within") or not traced()
    if plain and not ones.is_inference():  # which has no version
        ones._ones = id(ones), ones._version
    marked: Tensor = ones
    return marked


def are_ones(x: Any) -> bool:
    """Return whether x is a tensor that is known to be ones."""
    mark = getattr(x, "_ones", None)
    return mark is not None and mark == (id(x), x._version) and not x.requires_grad


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x * y; one of the two, if the other is known to be ones."""
    if are_ones(y):
        return x
    return y if are_ones(x) else x * y
