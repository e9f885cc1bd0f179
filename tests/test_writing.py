"""Files are written completely or not at all, wherever the process ends."""

import itertools
import os
import random
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusionkit import EMA, PowerEMA, load_checkpoint, save_checkpoint
from diffusionkit import _writing as writing
from diffusionkit._writing import atomic_write, is_safetensors, save_torch

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="locks of files")


@pytest.fixture(params=["nameless", "named"])
def kind(request, monkeypatch) -> str:
    """Run with files that have no name until they are complete, and as where there are none."""
    if request.param == "named":
        monkeypatch.setattr(writing, "_nameless", lambda folder: None)
    return request.param


def write(path: Path, content: bytes) -> None:
    atomic_write(path, lambda file: file.write(content))


def test_atomic_write_replaces_the_file_or_leaves_it(tmp_path, kind) -> None:
    path = tmp_path / "x"
    write(path, b"one")
    assert path.read_bytes() == b"one"

    def fail(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(str(path), fail)
    assert path.read_bytes() == b"one"

    def late(file) -> None:
        file.write(b"three")
        assert path.read_bytes() == b"one"  # until the end

    atomic_write(os.fsencode(path), late)
    assert path.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [path]


def killed(save: Callable[[int], object], seconds: float) -> None:
    """Save number after number in a process, and kill it after some time."""
    started, starts = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(starts, b"x")
            for number in itertools.count(1):
                save(number)
        finally:
            os._exit(1)
    os.read(started, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(started)
    os.close(starts)


@needs_locks
def test_killed_writers_lose_nothing_and_leave_nothing(tmp_path, kind, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only matters when the machine stops
    path, size, draw = tmp_path / "x", 500_000, random.Random(0)
    write(path, bytes(size))
    left, found = 0, set()
    for kill in range(30):
        killed(
            lambda n, k=kill: write(path, bytes([n % 256, k]) * (size // 2)), 0.008 * draw.random()
        )
        content = path.read_bytes()
        assert content == content[:2] * (size // 2)
        found.add(content[:2])
        left = max(left, len(list(tmp_path.iterdir())) - 1)
    assert len(found) >= 5  # some were killed between and others in saves
    assert left <= 1  # each save removes what the last one left
    write(path, b"end")
    assert list(tmp_path.iterdir()) == [path]


@needs_locks
@pytest.mark.slow
def test_hundred_kills_lose_no_checkpoint(tmp_path) -> None:
    path, draw = tmp_path / "run.pt", random.Random(0)
    model = torch.nn.Linear(20_000, 1, bias=False).requires_grad_(False)

    def save(step: int) -> None:
        model.weight.fill_(step)
        save_checkpoint(path, model, step=step)

    save(0)
    for _ in range(100):
        killed(save, 0.1 * draw.random())
        step = load_checkpoint(path, model).step
        assert bool((model.weight == step).all())
    save(0)
    assert list(tmp_path.iterdir()) == [path]


@needs_locks
def test_files_of_living_writers_are_kept_and_those_of_dead_ones_removed(tmp_path, kind) -> None:
    path, entered, leave = tmp_path / "x", threading.Event(), threading.Event()

    def slow(file) -> None:
        file.write(b"slow")
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=atomic_write, args=(path, slow))
    thread.start()
    assert entered.wait(10)
    held = list(tmp_path.iterdir())
    assert len(held) == (kind == "named")
    write(tmp_path / "y", b"another file")
    write(path, b"fast")
    assert set(tmp_path.iterdir()) == {path, tmp_path / "y", *held}
    leave.set()
    thread.join()
    assert path.read_bytes() == b"slow"
    assert set(tmp_path.iterdir()) == {path, tmp_path / "y"}
    # What a dead writer left has the same name and no lock.
    digest = writing.hashlib.blake2b(b"x", digest_size=8).hexdigest()
    for name in ("1", "2"):
        (tmp_path / f".diffusionkit-{digest}-{name}.tmp").write_bytes(b"half")
    write(tmp_path / "y", b"of another name")
    assert len(list(tmp_path.iterdir())) == 4
    write(path, b"new")
    assert set(tmp_path.iterdir()) == {path, tmp_path / "y"}


@needs_locks
def test_a_file_that_has_the_name_of_a_removed_one_is_not_removed(tmp_path, monkeypatch) -> None:
    path = tmp_path / ".diffusionkit-0-1.tmp"
    path.write_bytes(b"abandoned")

    class Slow:
        """Between a cleaner's opening and locking of a file another one removes it."""

        LOCK_EX, LOCK_NB = writing.fcntl.LOCK_EX, writing.fcntl.LOCK_NB

        def flock(self, file, operation) -> None:
            path.unlink()
            path.write_bytes(b"new")

    monkeypatch.setattr(writing, "fcntl", Slow())
    writing._remove_abandoned(str(tmp_path), "0")
    assert path.read_bytes() == b"new"


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path, kind) -> None:
    path = tmp_path / "x"
    contents = [bytes([number]) * 100_000 for number in range(8)]

    def many(content: bytes) -> None:
        for _ in range(10):
            write(path, content)

    threads = [threading.Thread(target=many, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_the_mode_of_the_file_is_kept(tmp_path, kind, mode) -> None:
    path = tmp_path / "x"
    write(path, b"old")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(mode)
    write(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_symbolic_links_are_kept(tmp_path, kind) -> None:
    (tmp_path / "runs").mkdir()
    link, chain, target = tmp_path / "latest", tmp_path / "chain", tmp_path / "runs" / "7.pt"
    link.symlink_to(Path("runs") / "7.pt")  # relative, and to no file yet
    chain.symlink_to(link)
    for path in (link, chain):
        write(path, path.name.encode())
        assert link.is_symlink()
        assert chain.is_symlink()
        assert target.read_bytes() == path.name.encode()
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "." + "a b\n" * 50])
def test_names_may_be_as_long_as_the_system_allows(tmp_path, kind, name) -> None:
    path = tmp_path / name
    write(path, b"one")
    write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="too long") as caught:
        write(tmp_path / (name + "x" * 255), b"")
    assert len(caught.value.filename) > 255


def test_a_full_disk_is_an_error_with_path_and_reason(tmp_path, kind) -> None:
    path, model = tmp_path / "run.pt", torch.nn.Linear(300, 300)
    save_checkpoint(path, model, step=1)
    old, before = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ema = PowerEMA(model)
    ema.update(model)
    saves = {
        "run.pt": lambda: save_checkpoint(path, model, ema=EMA(model), step=2),
        "one": lambda: write(tmp_path / "one", bytes(300_000)),
        "000000001-0.05.pt": lambda: ema.save(tmp_path),
    }
    for name, save in saves.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.filename == str(tmp_path / name)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_system_name_the_file(tmp_path, kind, monkeypatch) -> None:
    missing = tmp_path / "none" / "x"
    with pytest.raises(FileNotFoundError) as caught:
        write(missing, b"")
    assert caught.value.filename == str(missing)
    with pytest.raises(IsADirectoryError) as caught:
        write(tmp_path, b"")
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        write(Path("/dev/full"), b"")  # to replace a device would be a loss
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file" / "x", b"")
    for called in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(os, called, fail)
            with pytest.raises(OSError, match=rf"\[Errno 28\] No space .*: '{tmp_path}/file'"):
                write(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
def test_a_folder_without_write_permission_is_an_error(tmp_path, kind) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError) as caught:
            write(tmp_path / "x", b"")
        assert caught.value.filename == str(tmp_path / "x")
    finally:
        tmp_path.chmod(0o700)


def test_file_and_folder_are_synced_in_this_order(tmp_path, kind, monkeypatch) -> None:
    calls, sync, replace = [], os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def replaced(*names) -> None:
        calls.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path / "x", b"x")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize("path", [None, 3.5, b"\0", "", "a\0b", ["x"]], ids=repr)
def test_paths_that_are_none_are_named(path) -> None:
    with pytest.raises((TypeError, ValueError), match="path: expected"):
        atomic_write(path, lambda file: None)


@pytest.mark.parametrize("name", ["x.safetensors", "X.SafeTensors"])
def test_files_of_torch_have_no_name_of_another_format(tmp_path, name) -> None:
    assert is_safetensors(name)
    for save in (
        lambda: save_torch(tmp_path / name, {}),
        lambda: save_checkpoint(tmp_path / name, torch.nn.Linear(1, 1)),
    ):
        with pytest.raises(ValueError, match=r"path: expected a name for a file of torch"):
            save()
    assert not list(tmp_path.iterdir())
