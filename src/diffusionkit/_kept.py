"""Tensors that are made once for each device and dtype, and kept there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields
from types import NoneType
from typing import Generic, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _requirements as _requirements  # also where `__init__` is another project's
from ._tracing import traced

T = TypeVar("T")


class Kept(Generic[T]):
    """Tables by what they were made for: a copy to a device would be repeated in every step.

    Nothing is kept of a graph that is traced, of tensors without data, or of those that a transform
    of torch.func wraps, which are invalid after it.
    """

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made for a key, or make it."""
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = make()
            if not (traced() or is_in_torch_dispatch_mode()):
                self._made[key] = found
        return found


def fixed(part: object) -> bool:
    """Return whether a part can never change: a frozen dataclass of constants.

    A class that is not a dataclass declares this with `_unchanging = True`, for itself but not for
    its subclasses. Values that are computed for such a part and kept with it are never out of
    date. A subclass that is not a dataclass itself may have other attributes.
    """
    if isinstance(part, (NoneType, str, int, float)):
        return True
    if isinstance(part, tuple):
        return all(map(fixed, part))
    own = vars(type(part))
    if own.get("_unchanging"):
        return True
    parameters = own.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return False
    return all(fixed(getattr(part, field.name)) for field in fields(part))  # type: ignore[arg-type]
