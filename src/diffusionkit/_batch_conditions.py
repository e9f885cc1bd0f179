"""Conditions of a batch: one for each sample, or one for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def for_batch(cond: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Return conditions with one for each of n samples where there is one for all.

    A tensor (1, ...) with two dimensions or more becomes (n, ...), and class_labels () or (1,)
    become (n,), without a copy. Anything else is unchanged: a tensor with one dimension may be a
    number for each sample as well as one vector, which only the network can decide.
    """
    return {
        name: value.expand(n, *value.shape[1:]) if _is_for_all(name, value) else value
        for name, value in cond.items()
    }


def _is_for_all(name: str, value: object) -> bool:
    if not isinstance(value, Tensor):
        return False
    if name == "class_labels" and value.ndim < 2:
        return value.ndim == 0 or value.shape[0] == 1
    return value.ndim > 1 and value.shape[0] == 1


def repeated(value: Any, n: int, times: int) -> Any:
    """Return a tensor (n, ...) that belongs to a batch of n repeated `times` along the batch.

    Other values apply to the whole batch and are returned unchanged.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n:
        return value
    return value.repeat(times, *(1,) * (value.ndim - 1))


def rows_of(value: Any, n: int, samples: Tensor) -> Any:
    """Return the rows of a tensor (n, ...) that belong to samples (m,) out of a batch of n.

    Other values apply to the whole batch and are returned unchanged.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n:
        return value
    return value[samples]
