"""Comparison of nested values."""

from typing import Any

import numpy as np
from torch import Tensor


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal in types, order, strides and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (Tensor, np.ndarray)):
        strides = a.stride() == b.stride() if isinstance(a, Tensor) else True
        return a.dtype == b.dtype and strides and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
