"""Comparison of nested values."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal in types, order, strides and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        kinds = [(t.dtype, t.device, t.shape, t.stride(), t.requires_grad) for t in (a, b)]
        return kinds[0] == kinds[1] and bytes_of(a) == bytes_of(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def bytes_of(value: Tensor) -> list[int]:
    flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().flatten())
    return flat.view(torch.uint8).tolist()
