"""The bytes of image files, in a folder or in a zip file, by number.

Both are a few arrays, however many the images: cheap to send to worker processes, and without
Python objects whose reference counts would copy the memory of each worker page by page. No file is
kept open, so that processes and threads do not share a place in it.
"""

from __future__ import annotations

import abc
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from ._pictures import PictureError

_LARGEST = 2**30  # bytes of an image file
_IGNORED = "__MACOSX"


class Names(Sequence[str]):
    """Strings in two arrays."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @override
    def __len__(self) -> int:
        return len(self._ends) - 1

    @override
    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        begin, end = self._ends[index], self._ends[index + 1]
        return self._bytes[begin:end].tobytes().decode("utf-8", "surrogateescape")


class Members(abc.ABC):
    """Image files by number.

    Args:
        names: their names, relative, with slashes.
        sizes: their sizes in bytes.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        self.names, self.sizes = Names(names), np.array(sizes, dtype=np.int64)

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """Return the bytes of a file.

        Raises:
            PictureError: if they are damaged.
        """


class FolderMembers(Members):
    """Image files in a folder.

    Args:
        root: the folder.
        names: their names.
        sizes: their sizes.
    """

    def __init__(self, root: str, names: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__(names, sizes)
        self._root = root

    @override
    def read(self, index: int) -> bytes:
        with open(os.path.join(self._root, self.names[index]), "rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise PictureError(f"at most {_LARGEST} bytes, got more")
        return data


class ZipMembers(Members):
    """Image files in a zip file.

    Args:
        path: the zip file.
        entries: their entries in the directory of the file.
    """

    def __init__(self, path: str, entries: Sequence[zipfile.ZipInfo]) -> None:
        super().__init__([e.filename for e in entries], [e.file_size for e in entries])
        self._path = path
        self._starts = np.array([e.header_offset for e in entries], dtype=np.int64)
        self._packed = np.array([e.compress_size for e in entries], dtype=np.int64)
        self._sums = np.array([e.CRC for e in entries], dtype=np.int64)
        self._deflated = np.array([e.compress_type == zipfile.ZIP_DEFLATED for e in entries])

    @override
    def read(self, index: int) -> bytes:
        packed, size = int(self._packed[index]), int(self.sizes[index])
        with open(self._path, "rb") as file:
            file.seek(int(self._starts[index]))
            header = file.read(30)
            if len(header) < 30 or not header.startswith(b"PK\3\4"):
                raise PictureError("the entry of the zip file, got other bytes; was it replaced?")
            file.seek(sum(struct.unpack("<2H", header[26:])), os.SEEK_CUR)
            data = file.read(packed)
        if self._deflated[index]:
            try:
                # Never more than the directory states, whatever the bytes unpack to.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise PictureError(f"a whole entry of the zip file, got {error}") from error
        if len(data) != size or zlib.crc32(data) != self._sums[index]:
            raise PictureError("a whole entry of the zip file, got a damaged one")
        return data


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder around it, is hidden."""
    return any(part.startswith(".") or part == _IGNORED for part in name.split("/"))


def list_folder(root: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return names and sizes of all files in a folder and its sub-folders, and the sub-folders.

    Symbolic links are followed. Hidden files and folders are left out.

    Raises:
        ValueError: if a link leads nowhere, or to a folder around it.
    """
    files: list[tuple[str, int]] = []
    folders: list[str] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while waiting:
        prefix, above = waiting.pop()
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                    if real in above:
                        raise ValueError(f"{entry.path}: expected a folder, got a circular link")
                    folders.append(name)
                    waiting.append((name + "/", (*above, real)))
                elif entry.is_file():
                    files.append((name, entry.stat().st_size))
                elif entry.is_symlink():
                    raise ValueError(f"{entry.path}: expected a file, got a broken link")
    return files, folders


def list_zip(path: str) -> tuple[list[zipfile.ZipInfo], list[str]]:
    """Return the entries of a zip file that are files, and its folders, without hidden ones.

    Raises:
        ValueError: if it is not a zip file, or an entry is not one of an image folder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"{path}: expected a zip file, got a damaged one: {error}") from error
    names = set()
    for entry in listed:
        name = entry.filename
        kind = stat.S_IFMT(entry.external_attr >> 16)
        problem = (
            "a path out of the archive"
            if name.startswith("/") or "\\" in name or ".." in name.split("/")
            else "a link"
            if kind == stat.S_IFLNK
            else "an encrypted file"
            if entry.flag_bits & 1
            else "a file packed by another method than deflate"
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            else f"a file of {entry.file_size} bytes"
            if entry.file_size > _LARGEST
            else "two files of one name"
            if name in names
            else ""
        )
        if problem:
            raise ValueError(f"{path}: expected files of images, got {problem}: {name!r}")
        names.add(name)
    shown = [entry for entry in listed if not is_hidden(entry.filename)]
    folders = [entry.filename.rstrip("/") for entry in shown if entry.is_dir()]
    return [entry for entry in shown if not entry.is_dir()], folders
