"""Files that are written as a database writes: completely or not at all.

The content goes to a new file in the same folder, which replaces the old one when it is complete
and on the disk. Where the system allows it the new file has no name before that, so that a killed
process leaves nothing behind; elsewhere the next write of the same file removes what it left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import torch

# Windows has no such locks; there nobody can remove or rename a file that is open.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_PREFIX = ".diffusionkit-"
# Errors of systems that cannot sync a folder, or may not open it to do so.
_UNSYNCED = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that any crash leaves either the previous content or the new one.

    The file keeps its mode and its owner. If the path is a symbolic link, its target is written.

    Args:
        path: the file.
        write: writes the content to a file open for writing and reading.

    Raises:
        OSError: with the path, if the file cannot be written; the previous one is left as it was.
        TypeError: if path is not a path.
    """
    target = checked_path(path)
    # realpath follows links, also those to files that do not exist yet.
    folder, name = os.path.split(os.path.realpath(target))
    real = os.path.join(folder, name)
    try:
        previous = _previous(real)
        # Short, whatever the length of the name; the same for every write of the file.
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        _remove_abandoned(folder, digest)
        temporary = os.path.join(folder, f"{_PREFIX}{digest}-{uuid.uuid4().hex}.tmp")
        with _new_file(temporary) as (file, publish):
            _filled(file, write)
            if previous is not None:
                _keep_rights(file.fileno(), previous)
            file.flush()
            os.fsync(file.fileno())
            publish(real)
        _sync_folder(folder)
    except OSError as error:
        if error.filename == target:
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, target) from error


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], content: str) -> Iterator[str]:
    """Yield a new folder that gets the name of a path at the end, if that is new or empty.

    Of several writers of one path each has a folder of its own, and the first to end has the name.
    The folder that a killed writer left is removed by the next one, as with `atomic_write`.

    Args:
        path: the folder to make.
        content: what it is for, in the error.

    Raises:
        OSError: with the path, if the folder cannot be written, or has files.
    """
    target = checked_path(path)
    real = os.path.realpath(target)  # a link to an empty folder stays one
    parent, name = os.path.split(real)
    taken = FileExistsError(errno.EEXIST, f"a folder for {content} must be new or empty", target)
    if os.path.exists(real) and (not os.path.isdir(real) or os.listdir(real)):
        raise taken
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    temporary, lock = "", None
    try:
        _remove_abandoned(parent, digest)
        while not temporary or not os.path.isdir(temporary):  # removed before it was locked
            temporary = os.path.join(parent, f"{_PREFIX}{digest}-{uuid.uuid4().hex}.tmp")
            os.mkdir(temporary)
            lock = None if fcntl is None else os.open(temporary, os.O_RDONLY)
            if lock is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
        try:
            if fcntl is None and os.path.isdir(real):
                os.rmdir(real)
            os.rename(temporary, real)  # POSIX replaces an empty folder, and no other
        except OSError as error:
            if os.path.isdir(real) and os.listdir(real):
                raise taken from error
            raise
    except OSError as error:
        if error.filename == target:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def save_torch(path: str | os.PathLike[str], content: Any) -> None:
    """Write a file of `torch.save`; see `atomic_write`.

    Raises:
        ValueError: if the name is that of a safetensors file.
    """
    check_suffix(path)
    atomic_write(path, lambda file: torch.save(content, file))


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise if a file that `torch.save` writes would have the name of a safetensors file."""
    if is_safetensors(path):
        raise ValueError(
            "path: expected a name for a file of torch, such as run.pt, "
            f"got {os.path.basename(checked_path(path))}, that of another format"
        )


def checked_path(path: str | os.PathLike[str]) -> str:
    """Return a path as a string, or raise a TypeError or ValueError that names it."""
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: expected a path, got {type(path).__name__}") from None
    if not text or "\0" in text:
        raise ValueError(f"path: expected the name of a file, got {text!r}")
    return text


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file is that of a safetensors file."""
    return checked_path(path).lower().endswith(".safetensors")


def _previous(real: str) -> os.stat_result | None:
    """Return the status of the file to replace, None if there is none."""
    try:
        status = os.stat(real)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), real)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", real)
    return status


@contextlib.contextmanager
def _new_file(temporary: str) -> Iterator[tuple[BinaryIO, Callable[[str], None]]]:
    """Yield a new locked file, and a function that gives it its name in place of another file.

    The lock tells other writers that the file is not abandoned. It is held until the file has
    its name.
    """
    nameless = _nameless(os.path.dirname(temporary))
    file = _named(temporary) if nameless is None else nameless

    def publish(real: str) -> None:
        if nameless is not None:
            _link(file, temporary)
        if fcntl is None:
            file.close()
        os.replace(temporary, real)

    try:
        with file:
            yield file, publish
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _nameless(folder: str) -> BinaryIO | None:
    """Return a locked file without a name, which vanishes with its process, or None."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        file = os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    except OSError:
        return None  # a reason to fail is found again, by the file with a name
    _lock(file)
    return file


def _named(temporary: str) -> BinaryIO:
    """Return a new locked file."""
    while True:
        file = open(temporary, "x+b")  # noqa: SIM115 - the caller closes it
        _lock(file)
        # Another writer may have taken it for an abandoned file before it was locked.
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)


def _link(file: BinaryIO, path: str) -> None:
    """Give a file without a name its first one."""
    # With a folder's descriptor Python asks the system to follow the link in /proc.
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=folder)
    finally:
        os.close(folder)


def _remove_abandoned(folder: str, digest: str) -> None:
    """Remove temporary files and folders of a name that nobody has locked: of killed writers."""
    with os.scandir(folder) as entries:
        start = _PREFIX + digest
        found = [e.path for e in entries if e.name.startswith(start) and e.name.endswith(".tmp")]
    for path in found:
        with contextlib.suppress(OSError):  # locked, removed by another writer, or not lockable
            if fcntl is None:
                os.unlink(path)
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Removed since it was opened: the name may now be that of a writer's new file.
                if os.fstat(descriptor).st_nlink:
                    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            finally:
                os.close(descriptor)


class _Watched:
    """A file that remembers the first error of the system."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.error = file, cast(OSError | None, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _filled(file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
    """Write the content; an error of the system is raised as such, also through torch's writer."""
    watched = _Watched(file)
    try:
        write(cast(BinaryIO, watched))
    except Exception as error:
        if watched.error is not None and error is not watched.error:
            raise watched.error from None
        raise


def _keep_rights(descriptor: int, previous: os.stat_result) -> None:
    """Give a file the owner and the mode of the one that it replaces, as far as is allowed."""
    if not hasattr(os, "fchmod"):
        return
    with contextlib.suppress(OSError):
        os.fchown(descriptor, previous.st_uid, previous.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(previous.st_mode))


def _sync_folder(folder: str) -> None:
    """Write the new name to the disk."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
