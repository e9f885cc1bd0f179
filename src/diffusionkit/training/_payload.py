"""The content of a file of training state, which is written only if it can be read back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any, BinaryIO

import torch

from .._files import check_torch
from .._writing import atomic_write

_STATES = {"model", "ema", "optimizer"}
_NAMED_STATES = {"objective", "stateful"}


def save_payload(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write a file of `torch.save`, unless it could not be read back without running code.

    Args:
        path: the file.
        payload: its content by part.

    Raises:
        ValueError: if it could not; it names the smallest part that is to blame.
        OSError: if the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(payload, file)
            check_torch(file)
        except (OSError, MemoryError):
            raise
        # Users' objects may raise anything when they are pickled.
        except Exception as error:
            if (culprit := _culprit(payload)) is None:
                raise  # the disk is to blame
            name, reason = culprit
            raise ValueError(
                f"{name}: expected tensors, numbers, strings, lists and dictionaries only, "
                f"got values that cannot be read back safely: {reason}"
            ) from error

    atomic_write(path, write)


def _culprit(payload: Mapping[str, Any]) -> tuple[str, str] | None:
    for name, value in _parts(payload):
        if (reason := _reason(value)) is not None:
            return _smallest(name, value, reason)
    return None


def _parts(payload: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, part in payload.items():
        if name in _NAMED_STATES:
            yield from ((f"{name}[{key!r}].state_dict()", value) for key, value in part.items())
        else:
            yield f"{name}.state_dict()" if name in _STATES else name, part


def _smallest(name: str, value: Any, reason: str) -> tuple[str, str]:
    """Return the name of the smallest part of a value that cannot be read back, and why."""
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    for key, part in parts:
        if (found := _reason(part)) is not None:
            return _smallest(f"{name}[{key!r:.100}]", part, found)
    return name, reason


def _reason(value: Any) -> str | None:
    """Return why a value cannot be read back, or None."""
    file = BytesIO()
    try:
        torch.save(value, file)
        check_torch(file)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
