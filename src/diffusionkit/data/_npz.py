"""Files of numpy arrays."""

from __future__ import annotations

import os
import zlib
from typing import Any
from zipfile import BadZipFile

import numpy as np

_DAMAGED = (
    ValueError, KeyError, EOFError, NotImplementedError, MemoryError, BadZipFile, zlib.error,
)  # fmt: skip

Arrays = dict[str, "np.ndarray[Any, Any]"]


def read_npz(path: str | os.PathLike[str], names: tuple[str, ...]) -> Arrays:
    """Return those arrays of an .npz file that have one of some names; no objects are read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged, or has none of the arrays.
    """
    try:
        # Opened here, as numpy leaves damaged files open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BadZipFile("a single array")
            found = {name: archive[name] for name in names if name in archive.files}
            if not found:
                raise BadZipFile(f"arrays {', '.join(archive.files)}")
    except _DAMAGED as error:
        raise ValueError(
            f"{path}: expected an .npz file of {', '.join(names)}, got {error}"
        ) from error
    return found


def read_npy(path: str | os.PathLike[str]) -> np.ndarray[Any, Any]:
    """Return the array of an .npy file; no objects are read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    try:
        with open(path, "rb") as file:
            array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
    except _DAMAGED as error:
        raise ValueError(f"{path}: expected an .npy file, got {error}") from error
    return array
