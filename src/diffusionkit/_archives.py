"""Uncompressed zip files, read strictly: each byte belongs to one record or to the directory.

Readers of zip files disagree about a file with two directories, overlapping records or headers
that contradict the directory. Here such a file is an error: the records follow each other without
gaps from the first byte to the directory, which ends the file, and the headers agree with it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

_HEADER = struct.Struct("<4s5H3L2H")
# Flags of a header: a checksum and the sizes follow the record; its name is in UTF-8.
_FOLLOWED, _UTF8 = 1 << 3, 1 << 11
_DESCRIPTORS = {0: "", 16: "<4s3L", 24: "<4sL2Q"}
_WIDE = 0xFFFFFFFF  # in a header: the size has 64 bits and stands elsewhere
_END = 22


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of a record in a file.

    Args:
        start: the position of the first one.
        size: their number.
        crc: their CRC-32.
    """

    start: int
    size: int
    crc: int


def records(file: BinaryIO, length: int) -> dict[str, Record]:
    """Return the records of a file of `torch.save` by name, without the folder of all names.

    Args:
        file: the file.
        length: its number of bytes.

    Raises:
        BadZipFile: if it has any other structure, or two names that differ only in case.
    """
    last = _read(file, length - _END, _END)
    if not last.startswith(b"PK\5\6") or not last.endswith(b"\0\0"):
        raise BadZipFile("a zip file that is cut off or has bytes after its end")
    archive = ZipFile(file)
    entries = archive.infolist()
    folder = entries[0].filename.split("/")[0] + "/" if entries else ""
    names = [entry.filename.removeprefix(folder) for entry in entries]
    if "constants.pkl" in names:
        raise BadZipFile("a TorchScript program")
    if "data.pkl" not in names or any(not e.filename.startswith(folder) for e in entries):
        raise BadZipFile("a zip file with no record data.pkl")
    if len({name.lower() for name in names}) < len(names):
        raise BadZipFile("a zip file with overlapping records: two have one name")
    ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    if entries[0].header_offset != 0:
        raise BadZipFile("a zip file with bytes before its first record")
    return {
        name: _record(file, entry, end)
        for name, entry, end in zip(names, entries, ends, strict=True)
    }


def _record(file: BinaryIO, entry: ZipInfo, end: int) -> Record:
    """Check that a header and a record fill the file from the header's place to an end."""
    if entry.compress_type != ZIP_STORED or entry.file_size != entry.compress_size:
        raise BadZipFile("a zip file with compressed records")
    head = _HEADER.unpack(_read(file, entry.header_offset, _HEADER.size))
    signature, _, flags, method, _, _, *numbers, name_length, extra_length = head
    name = file.read(name_length)
    start = entry.header_offset + _HEADER.size + name_length + extra_length
    wanted = [entry.CRC, entry.file_size, entry.file_size]
    form = _DESCRIPTORS.get(end - start - entry.file_size, "")
    followed = struct.unpack(form, _read(file, end - struct.calcsize(form), struct.calcsize(form)))
    if (
        (signature, flags, method) != (b"PK\3\4", entry.flag_bits, ZIP_STORED)
        or flags & ~(_FOLLOWED | _UTF8)
        or name != entry.filename.encode()
        or start + entry.file_size + struct.calcsize(form) != end
        or followed not in ((), (b"PK\7\x08", *wanted))
        or bool(followed) != bool(flags & _FOLLOWED)
        or any(
            given not in ((0, size) if flags & _FOLLOWED else (size, _WIDE))
            for given, size in zip(numbers, wanted, strict=True)
        )
    ):
        raise BadZipFile(f"a zip file with overlapping records at {entry.filename}")
    return Record(start, entry.file_size, entry.CRC)


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(max(start, 0))
    data = file.read(count)
    if len(data) < count:
        raise BadZipFile("a part of a zip file")
    return data
