"""Tensors in pickles of torch, built by our own code from bytes that were checked."""

from __future__ import annotations

import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from reprlib import repr
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ._pickles import Call, Global
from ._plain_globals import PLAIN

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "storage.UntypedStorage": torch.uint8,
}
# Types without a storage of their own name; their tensors are written as untyped bytes. Not every
# torch has every one of them.
_UNTYPED = {
    getattr(torch, name)
    for name in (
        "uint16", "uint32", "uint64",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
    if hasattr(torch, name)
}  # fmt: skip
_MAX_DIMENSIONS = 64
_CHUNK = 1 << 18


class _StorageType(Global):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Storages:
    """The storages of a file by key, each as a one-dimensional tensor that views all of it.

    Args:
        device: the device of the tensors, None for those named in the file.
        limit: the number of bytes that all storages together may have.
        fill: fills a new storage with a key.
    """

    def __init__(
        self,
        device: torch.device | None,
        limit: int,
        fill: Callable[[str, Tensor], None] = lambda key, flat: None,
    ) -> None:
        self.flat: dict[str, Tensor] = {}
        self._device, self._left, self._fill = device, limit, fill

    def load(self, identity: Any) -> Tensor:
        """Return the storage of a persistent id."""
        if type(identity) is not tuple or len(identity) not in (5, 6):
            raise UnpicklingError(f"expected a storage, got {repr(identity)}")
        # Torch before 1.6 adds the part of the storage that is meant, None for all of it.
        kind, storage_type, key, location, numel, part = (*identity, None)[:6]
        names = type(kind) is type(key) is type(location) is str and kind == "storage"
        if not names or not isinstance(storage_type, _StorageType):
            raise UnpicklingError(f"expected a storage, got {repr(kind)}")
        if part is not None:
            raise UnpicklingError("expected a whole storage, got a view of another")
        if type(numel) is not int or numel < 0:
            raise UnpicklingError(f"expected the size of a storage, got {repr(numel)}")
        if key not in self.flat:
            self._left -= numel * storage_type.dtype.itemsize
            if self._left < 0:
                raise UnpicklingError(f"expected storages within the file, got {numel} values")
            self.flat[key] = self._made(location, numel, storage_type.dtype)
            self._fill(key, self.flat[key])
        flat = self.flat[key].view(storage_type.dtype)
        if len(flat) != numel:
            raise UnpicklingError(f"expected one storage {key}, got {len(flat)} and {numel} values")
        return flat

    def _made(self, location: str, numel: int, dtype: torch.dtype) -> Tensor:
        if self._device is not None:
            return torch.empty(numel, dtype=dtype, device=self._device)
        try:
            return torch.empty(numel, dtype=dtype, device=location)
        except (AssertionError, RuntimeError) as error:
            raise UnpicklingError(
                f"expected tensors of a device that is here, got {location} ({error}); "
                "map_location moves them to another"
            ) from error


def read_into(file: BinaryIO, flat: Tensor) -> int | None:
    """Read a storage from the current position of a file.

    Args:
        file: the file.
        flat: the storage.

    Returns:
        The CRC-32 of its bytes, None on the meta device, where they are skipped.

    Raises:
        UnpicklingError: if the file ends before, or booleans are neither 0 nor 1.
    """
    if flat.is_meta:
        file.seek(flat.nbytes, os.SEEK_CUR)
        return None
    host = flat if flat.device.type == "cpu" else torch.empty_like(flat, device="cpu")
    buffer = memoryview(host.view(torch.uint8).numpy())  # type: ignore[arg-type]
    crc = 0
    for start in range(0, len(buffer), _CHUNK):
        part = buffer[start : start + _CHUNK]
        if file.readinto(part) < len(part):  # type: ignore[attr-defined]
            raise UnpicklingError(f"expected {len(buffer)} bytes, got the end of the file")
        crc = zlib.crc32(part, crc)
    if host.dtype is torch.bool and (host.view(torch.uint8) > 1).any():
        raise UnpicklingError("expected booleans of 0 and 1, got other numbers")
    if host is not flat:
        flat.copy_(host)
    return crc


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check_plain(storage, requires_grad, hooks)
    if storage.dim() != 1 or storage.nbytes != storage.untyped_storage().nbytes():
        raise UnpicklingError("expected the storage of a tensor, got a tensor")
    if metadata is not None and not (type(metadata) is dict and not metadata):
        raise UnpicklingError(f"expected a tensor without metadata, got {repr(metadata)}")
    flat = storage.view(storage.dtype if dtype is None else dtype)
    _check_view(len(flat), offset, size, stride)
    view = torch.empty(0, dtype=flat.dtype, device=flat.device)
    view.set_(flat.untyped_storage(), offset, size, stride)
    return view.requires_grad_() if requires_grad else view


def _tensor_of_dtype(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    if type(dtype) is not torch.dtype or dtype not in _UNTYPED:
        raise UnpicklingError(f"expected the dtype of a tensor, got {repr(dtype)}")
    return _tensor(storage, offset, size, stride, requires_grad, hooks, metadata, dtype=dtype)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> nn.Parameter:
    _check_plain(data, requires_grad, hooks)
    return nn.Parameter(data, requires_grad)


def _check_plain(data: Any, requires_grad: Any, hooks: Any) -> None:
    if not isinstance(data, Tensor) or type(requires_grad) is not bool:
        raise UnpicklingError(f"expected a tensor, got {type(data).__name__}")
    if type(hooks) is not OrderedDict or hooks:
        raise UnpicklingError("expected a tensor without hooks, got hooks")


def _check_view(numel: int, offset: Any, size: Any, stride: Any) -> None:
    """Check that a tensor lies within the elements of its storage."""
    tuples = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not tuples or any(
        type(number) is not int or not 0 <= number < 2**63 for number in (offset, *size, *stride)
    ):
        raise UnpicklingError(
            f"expected shape and strides of a tensor, got {repr(size)}, {repr(stride)}"
        )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (
        len(size) > _MAX_DIMENSIONS
        or math.prod(max(n, 1) for n in size[:_MAX_DIMENSIONS]) >= 2**63
        or (offset > numel if 0 in size else last >= numel)
    ):
        raise UnpicklingError(
            f"expected a tensor within its {numel} values, got shape {repr(size)}"
        )


GLOBALS: Mapping[str, Any] = {
    **PLAIN,
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()},
    "torch._utils._rebuild_tensor_v2": Call(_tensor),
    "torch._utils._rebuild_tensor_v3": Call(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": Call(_parameter),
}
"""The globals that `torch.save` writes for plain data and tensors."""
