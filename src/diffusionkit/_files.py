"""Files of tensors: written atomically, read without running code."""

from __future__ import annotations

import os
import struct
import threading
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from reprlib import repr
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from . import _pickles

ZIP, PICKLE, SAFETENSORS = "a zip file", "a pickle", "a safetensors file"

_STARTS = {
    b"PK\x03\x04": ZIP,
    b"\x80": PICKLE,
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x1f\x8b": "a gzip file",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
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
# The first two pickles of a file of torch before 1.6: a magic number and a version.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    np.dtype,
    *{type(dtype) for dtype in _pickles.NUMPY_DTYPES},
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
_LOADING = threading.Lock()


class CheckpointError(ValueError):
    """A file is not the expected checkpoint."""


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name and rename it, so a crash leaves the previous file.

    Args:
        path: the file.
        write: writes the content to a file open for writing and reading.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def opened(path: str | os.PathLike[str], expected: str, *kinds: str) -> Iterator[BinaryIO]:
    """Open a file for reading; any error in the block is raised as a `CheckpointError`.

    Args:
        path: the file.
        expected: a description of the file, for the error.
        *kinds: the formats allowed by its first bytes: `ZIP`, `PICKLE`, `SAFETENSORS`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it has another format, or if the block raises an exception.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: expected {expected}, got a directory or a device")
    with open(path, "rb") as file:
        try:
            if (kind := _kind(file.read(64))) not in kinds:
                raise CheckpointError(kind)
            file.seek(0)
            yield file
        except CheckpointError as error:
            raise CheckpointError(f"{path}: expected {expected}, got {error}") from error.__cause__
        # Damaged or hostile files make the readers raise almost any exception.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: expected {expected}, got {reason:.1000}") from error


def _kind(head: bytes) -> str:
    if not head:
        return "an empty file"
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head[8:9] == b"{":
        return SAFETENSORS
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if head.isascii() and head.decode().isprintable():
        return f"text: {head.decode()!r}"
    return f"a file that starts with {head[:16]!r}"


def read_torch(
    path: str | os.PathLike[str],
    *,
    expected: str = "a file written by torch.save",
    map_location: torch.device | str | None = "cpu",
) -> Any:
    """Read a file written by `torch.save`, of any version, without running code.

    Tensors, numbers of Python and numpy, strings, lists, tuples, sets and dictionaries are read.
    The format of torch 1.6 and later has a checksum of every record, the earlier one none.

    Args:
        path: the file.
        expected: a description of the file, for the error.
        map_location: the device of the tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or foreign, or holds other objects.
    """
    with opened(path, expected, ZIP, PICKLE) as file:
        return load_torch(file, map_location)


def load_torch(file: BinaryIO, map_location: torch.device | str | None = "cpu") -> Any:
    """Load the content of an open file written by `torch.save`; see `read_torch`."""
    check_torch(file)
    file.seek(0)
    if file.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise CheckpointError(f"a file damaged at {damaged}")
    file.seek(0)
    # The list of safe globals belongs to the whole process: restore it.
    with _LOADING:
        known = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([entry for entry in _NUMPY if entry not in known]):
            return torch.load(file, map_location, weights_only=True)


def check_torch(file: BinaryIO) -> None:
    """Check that a file written by `torch.save` holds only plain data and complete tensors.

    `torch.load(weights_only=True)` runs no foreign code, but lets a small file allocate much
    memory, and allows types that checkpoints do not need.

    Raises:
        Exception: of many types, if it does not.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) == b"PK\x03\x04":
        _check_zip(file, length)
    else:
        file.seek(0)
        _check_legacy(file, length)


def _check_zip(file: BinaryIO, length: int) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        sizes = {record.filename: record.file_size for record in records}
        root = next(iter(sizes), "").split("/")[0]
        if f"{root}/constants.pkl" in sizes:
            raise CheckpointError("a TorchScript program")
        if f"{root}/data.pkl" not in sizes:
            raise CheckpointError("a zip file with no record data.pkl")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise CheckpointError("a zip file with compressed records")
        if len(sizes) != len(records) or sum(sizes.values()) > length:
            raise CheckpointError("a zip file with overlapping records")
        content = BytesIO(archive.read(f"{root}/data.pkl"))

    def storage(identity: Any) -> _Storage:
        key, found = _storage(*identity)
        if sizes.get(f"{root}/data/{key}") != found.numel * found.dtype.itemsize:
            raise UnpicklingError(f"expected {found} at data/{key}, got another size")
        return found

    _pickles.run(content, _Globals(length).find, storage)


def _check_legacy(file: BinaryIO, length: int) -> None:
    storages: dict[str, _Storage] = {}

    def storage(identity: Any) -> _Storage:
        if type(identity) is not tuple or identity[-1] is not None:
            raise UnpicklingError("expected a whole storage, got a view of another")
        key, found = _storage(*identity[:-1])
        if storages.setdefault(key, found) != found:
            raise UnpicklingError(f"expected one storage {key}, got {found} and {storages[key]}")
        return found

    find = _Globals(length).find
    if tuple(_pickles.run(file, find) for _ in _LEGACY) != _LEGACY:
        raise UnpicklingError("expected the first numbers of a file of torch, got others")
    _pickles.run(file, find)  # the machine that wrote it
    _pickles.run(file, find, storage)
    keys = _pickles.run(file, find)
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise UnpicklingError(f"expected the values of {len(storages)} storages, got others")
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storages[key].numel:
            raise UnpicklingError(f"expected {storages[key]}, got {numel} values")
        file.seek(numel * storages[key].dtype.itemsize, os.SEEK_CUR)
    if file.tell() != length:
        raise UnpicklingError(f"expected a file of {file.tell()} bytes, got {length}")


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


def _storage(
    kind: Any, storage_type: Any, key: Any, location: Any, numel: Any
) -> tuple[str, _Storage]:
    if kind != "storage" or not isinstance(storage_type, _StorageType) or type(key) is not str:
        raise UnpicklingError(f"expected a storage, got {repr(kind)} {repr(storage_type)}")
    if type(numel) is not int or numel < 0:
        raise UnpicklingError(f"expected the size of a storage, got {repr(numel)}")
    return key, _Storage(storage_type.dtype, numel)


class _Globals:
    """The globals that `torch.save` writes for tensors, checked without building any."""

    def __init__(self, length: int) -> None:
        self._length = length
        types = {f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()}
        self._table = {
            **_pickles.PLAIN_GLOBALS,
            **types,
            "torch._utils._rebuild_tensor_v2": _pickles.Call(self._tensor),
            "torch._utils._rebuild_tensor_v3": _pickles.Call(self._tensor),
            "torch._utils._rebuild_parameter": _pickles.Call(self._parameter),
        }

    def find(self, name: str) -> Any:
        if name not in self._table:
            raise UnpicklingError(f"the global {name}, which is not among the safe ones")
        return self._table[name]

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any = None,
    ) -> _Storage:
        self._parameter(storage, requires_grad, hooks)
        dtype = storage.dtype if dtype is None else dtype
        if type(dtype) is not torch.dtype:
            raise UnpicklingError(f"expected the dtype of a tensor, got {repr(dtype)}")
        numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
        _pickles.check_view(numel, offset, size, stride, limit=self._length)
        return _Storage(dtype, numel)

    def _parameter(self, data: Any, requires_grad: Any, hooks: Any) -> _Storage:
        if not isinstance(data, _Storage):
            raise UnpicklingError(f"expected a tensor, got {type(data).__name__}")
        if type(hooks) is not OrderedDict or hooks:
            raise UnpicklingError("expected a tensor without hooks, got hooks")
        return data


def check_weights(
    path: str | os.PathLike[str], what: str, module: nn.Module, state: Mapping[str, Any]
) -> None:
    """Check that a state dict has the names and shapes of a module's own.

    Args:
        path: the file of the state dict, for the error.
        what: the part of the file, for the error.
        module: the module.
        state: the state dict.

    Raises:
        CheckpointError: if not; it lists missing, unexpected and misshapen tensors.
    """
    wanted = module.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    problems += [
        f"{key}: expected shape {tuple(value.shape)}, got {_shape(state[key])}"
        for key, value in wanted.items()
        if key in state and isinstance(value, Tensor) and _shape(state[key]) != tuple(value.shape)
    ]
    if problems:
        raise CheckpointError(f"{path}: the {what} does not fit, {listed(problems)}")


def listed(problems: list[str]) -> str:
    """Return the number of problems and the first 20, for an error."""
    shown = "; ".join(problems[:20]) + ("; ..." if len(problems) > 20 else "")
    return f"{len(problems)} problems: {shown}"


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def assign(
    path: str | os.PathLike[str], what: str, module: nn.Module, state: Mapping[str, Any]
) -> None:
    """Load a state dict into a module, after `check_weights`."""
    check_weights(path, what, module, state)
    module.load_state_dict(state)
