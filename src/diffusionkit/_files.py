"""Files of tensors, read without running code."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from . import _archives, _pickles
from ._tensors import GLOBALS, Storages, read_into

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
# The first two pickles of a file of torch before 1.6: a magic number and a version.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
_CPU = torch.device("cpu")
_LONGEST_HEADER = 2**32  # of a safetensors file, in bytes


class CheckpointError(ValueError):
    """A file is not the expected checkpoint."""


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
            reason = f"one that cannot be read: {_reason(error)}"
            raise CheckpointError(f"{path}: expected {expected}, got {reason:.1000}") from error


def _reason(error: Exception) -> str:
    ours = isinstance(error, (UnpicklingError, BadZipFile))
    return str(error) if ours else f"{type(error).__name__}: {error}"


def _kind(head: bytes) -> str:
    if not head:
        return "an empty file"
    # The length of a safetensors header may begin like a pickle; a pickle is no such length.
    short = int.from_bytes(head[:8], "little") < _LONGEST_HEADER
    if not (short and head[8:9] == b"{"):
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


def read_json(path: str | os.PathLike[str], expected: str) -> Any:
    """Read a JSON file, strictly.

    Args:
        path: the file.
        expected: a description of the file, for the error.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not JSON, names a value twice or holds NaN or infinity.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file at {path}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected {expected}, got {error}") from error
    return parsed_json(path, text, expected)


def parsed_json(path: str | os.PathLike[str], text: str, expected: str) -> Any:
    """Return the value of the JSON of a file, or raise a `CheckpointError`; see `read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := dict(pairs)) < len(pairs):
            raise ValueError("expected different names, got some twice")
        return names

    def constant(text: str) -> None:
        raise ValueError(f"expected a number, got {text}")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected {expected}, got {error}") from error


def read_torch(
    path: str | os.PathLike[str],
    *,
    expected: str = "a file written by torch.save",
    map_location: torch.device | str | None = "cpu",
    known: Mapping[str, Any] = GLOBALS,
) -> Any:
    """Read a file written by `torch.save`, of any version, without running code.

    Tensors, numbers of Python and numpy, strings, lists, tuples, sets and dictionaries are read.
    The format of torch 1.6 and later has a checksum of every record, the earlier one none.

    Args:
        path: the file.
        expected: a description of the file, for the error.
        map_location: the device of the tensors, None for those named in the file.
        known: the globals that the file may name; see `_pickles.run`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or of another kind, or holds other
            objects.
        ValueError: if there is no such device.
        TypeError: if `map_location` is not a device.
    """
    device = None if map_location is None else _device(map_location)
    with opened(path, expected, ZIP, PICKLE) as file:
        return load_torch(file, device, known)


def _device(map_location: torch.device | str) -> torch.device:
    message = f"map_location: expected a device or None, got {map_location!r}"
    try:
        return torch.device(map_location)
    except RuntimeError as error:
        raise ValueError(message) from error
    except TypeError as error:
        raise TypeError(message) from error


def load_torch(
    file: BinaryIO, device: torch.device | None = _CPU, known: Mapping[str, Any] = GLOBALS
) -> Any:
    """Load the content of an open file written by `torch.save`; see `read_torch`."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    zipped = file.read(4) == b"PK\3\4"
    file.seek(0)
    return (_load_zip if zipped else _load_legacy)(file, device, length, known)


def check_torch(file: BinaryIO) -> None:
    """Check that an open file written by `torch.save` can be read, without reading tensors.

    Raises:
        Exception: of many types, if it cannot.
    """
    load_torch(file, torch.device("meta"))


def _load_zip(
    file: BinaryIO, device: torch.device | None, length: int, known: Mapping[str, Any]
) -> Any:
    records = _archives.records(file, length)

    def fill(name: str, flat: Tensor) -> None:
        record = records.get(name)
        if record is None or record.size != flat.nbytes:
            raise UnpicklingError(f"expected {flat.nbytes} bytes at {name}, got another size")
        file.seek(record.start)
        if read_into(file, flat) not in (None, record.crc):
            raise CheckpointError(f"a file damaged at {name}")

    def content(name: str) -> bytes:
        flat = torch.empty(records[name].size, dtype=torch.uint8, device="cpu")
        fill(name, flat)
        return flat.numpy().tobytes()

    if "byteorder" in records and content("byteorder") != sys.byteorder.encode():
        raise CheckpointError(f"a file of a machine that is not {sys.byteorder}-endian")
    storages = Storages(device, length, lambda key, flat: fill(f"data/{key}", flat))
    return _pickles.run(BytesIO(content("data.pkl")), known, storages.load, limit=length)


def _load_legacy(
    file: BinaryIO, device: torch.device | None, length: int, known: Mapping[str, Any]
) -> Any:
    if tuple(_pickles.run(file, {}) for _ in _LEGACY) != _LEGACY:
        raise UnpicklingError("expected the first numbers of a file of torch, got others")
    _pickles.run(file, {})  # the machine that wrote it
    storages = Storages(device, length)
    value = _pickles.run(file, known, storages.load, limit=length)
    keys = _pickles.run(file, {})
    if type(keys) is not list or sorted(keys) != sorted(storages.flat):
        raise UnpicklingError(f"expected the values of {len(storages.flat)} storages, got others")
    for key in keys:
        flat = storages.flat[key]
        if file.read(8) != struct.pack("<q", len(flat)):
            raise UnpicklingError(f"expected {len(flat)} values in storage {key}, got others")
        read_into(file, flat)
    if file.tell() != length:
        raise UnpicklingError(f"expected a file of {file.tell()} bytes, got {length}")
    return value


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
