"""The globals of plain data in pickles: numbers of numpy, sets, shapes, devices and the like."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from pickle import UnpicklingError
from reprlib import repr
from typing import Any

import numpy as np
import torch

from ._pickles import Call, check_key

_NUMBERS = {"b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise UnpicklingError("expected a numpy number, got something else")
    (value,) = np.frombuffer(data, dtype)
    return value


def _dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    if type(code) is not str or code not in _NUMBERS or {type(align), type(copy)} - {bool, int}:
        raise UnpicklingError(f"expected the dtype of a number, got {repr(code)}")
    return np.dtype(f"<{code}")


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise UnpicklingError(f"expected bytes as latin1, got encoding {repr(encoding)}")
    return text.encode("latin1")


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise UnpicklingError(f"expected the items of a set, got {type(items).__name__}")
    return set(map(check_key, items))


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise UnpicklingError("expected the two parts of a complex number, got something else")
    return complex(real, imaginary)


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise UnpicklingError(f"expected the name of a device, got {repr(kind)}")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _size(items: Any) -> torch.Size:
    if type(items) is not tuple or any(type(n) is not int for n in items):
        raise UnpicklingError(f"expected a shape, got {repr(items)}")
    return torch.Size(items)


def _counter(counts: Any) -> Counter[Any]:
    if type(counts) is not dict or any(type(n) is not int for n in counts.values()):
        raise UnpicklingError(f"expected numbers by key, got {repr(counts)}")
    return Counter(counts)


PLAIN: Mapping[str, Any] = {
    **{f"torch.{name}": dtype for name, dtype in vars(torch).items() if type(dtype) is torch.dtype},
    "torch.Size": Call(_size),
    "torch.device": Call(_device),
    "collections.OrderedDict": Call(lambda: OrderedDict()),
    "collections.Counter": Call(_counter),
    "_codecs.encode": Call(_encoded),
    "numpy.dtype": Call(_dtype),
    # Names of Python 2 and protocol 2, then of Python 3; of numpy 1, then of numpy 2.
    "__builtin__.bytes": Call(lambda: b""),
    "__builtin__.set": Call(_set),
    "builtins.set": Call(_set),
    "__builtin__.complex": Call(_complex),
    "builtins.complex": Call(_complex),
    "numpy.core.multiarray.scalar": Call(_scalar),
    "numpy._core.multiarray.scalar": Call(_scalar),
}
"""The globals that are allowed in any file; their values are plain data."""
