"""Files of torch and safetensors: read as torch reads them, or refused with a reason."""

import copy
import io
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffusionkit
from diffusionkit import training
from diffusionkit._files import CheckpointError, assign, atomic_write, read_torch
from diffusionkit.checkpoints._safetensors import read_safetensors


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal in types, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def rezipped(content: bytes, edit: Any = None, **options: Any) -> bytes:
    """Write the records of a zip file again, with right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", **options) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, edit(info.filename, data) if edit else data)
    return file.getvalue()


@pytest.fixture
def refused(tmp_path):
    """Check that a file's content is refused, with the path and a reason."""

    def check(content: bytes, match: str, read: Any = read_torch) -> None:
        path = tmp_path / "x.bin"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"(?s)x\.bin: expected a .*, got .*{match}"):
            read(path)

    return check


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_comes_back(tmp_path, torch_content, saved, legacy) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(saved(torch_content, legacy=legacy))
    assert same(read_torch(path), torch_content)
    assert same(read_torch(str(path)), torch_content)


def test_new_dtypes_come_back(tmp_path) -> None:
    value = [torch.ones(3, dtype=d) for d in (torch.uint16, torch.float8_e4m3fn, torch.uint64)]
    torch.save(value, tmp_path / "x.pt")
    read = read_torch(tmp_path / "x.pt")
    assert [t.dtype for t in read] == [t.dtype for t in value]
    assert [t.float().tolist() for t in read] == [[1.0] * 3] * 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_either_numpy(tmp_path, saved, legacy, name) -> None:
    content = saved({"lr": np.float64(0.1), "t": torch.ones(1)}, legacy=legacy)
    own = np.float64(0).__reduce__()[0].__module__.encode()

    def edit(record: str, data: bytes) -> bytes:
        return data.replace(b"c" + own + b"\n", b"c" + name + b"\n")

    path = tmp_path / "x.pt"
    path.write_bytes(edit("", content) if legacy else rezipped(content, edit))
    assert name in path.read_bytes()
    lr = read_torch(path)["lr"]
    assert type(lr) is np.float64
    assert lr == 0.1


def test_reading_leaves_the_safe_globals_as_they_were(tmp_path, saved) -> None:
    (tmp_path / "good").write_bytes(saved(np.float64(0.1)))
    (tmp_path / "bad").write_bytes(saved(np.float64(0.1))[:-1])
    for own in ([], [np.dtype]):
        with torch.serialization.safe_globals(own):
            before = set(torch.serialization.get_safe_globals())
            read_torch(tmp_path / "good")
            assert set(torch.serialization.get_safe_globals()) == before
            with pytest.raises(CheckpointError):
                read_torch(tmp_path / "bad")
            assert set(torch.serialization.get_safe_globals()) == before


def test_tensors_are_read_to_where_they_are_asked(tmp_path) -> None:
    torch.save(torch.ones(3), tmp_path / "x.pt")
    assert read_torch(tmp_path / "x.pt").device.type == "cpu"
    assert read_torch(tmp_path / "x.pt", map_location="meta").device.type == "meta"


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_another_device_are_read(tmp_path, saved, legacy) -> None:
    content, path = saved(torch.arange(3.0), legacy=legacy), tmp_path / "x.pt"

    def edit(record: str, data: bytes) -> bytes:
        return data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")

    path.write_bytes(edit("", content) if legacy else rezipped(content, edit))
    assert b"cuda:0" in path.read_bytes()
    assert read_torch(path).tolist() == [0.0, 1.0, 2.0]


def test_reading_never_warns(tmp_path, saved) -> None:
    storage = torch.ones(3).untyped_storage()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = saved(torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32,
                                                   _internal=True), legacy=True)  # fmt: skip
    (tmp_path / "x").write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_torch(tmp_path / "x")
    assert not caught


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
        (b"\x1f\x8b\x08" + bytes(99), "a gzip file"),
        (b"\x89HDF\r\n" + bytes(99), "an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"<html><body>Sign in</body>", "an HTML page"),
        (b"Not Found", "text: 'Not Found'"),
        (b"\x00\x01\x02" * 9, r"a file that starts with b'\\x00\\x01"),
        (b"\x10\0\0\0\0\0\0\0{            }", "a safetensors file"),
    ],
)
def test_a_foreign_file_is_named(refused, content, match) -> None:
    refused(content, match)


def test_no_file_and_no_folder(tmp_path) -> None:
    for read in (read_torch, read_safetensors):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
            read(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"expected a .*, got a directory or a device"):
            read(tmp_path)


def test_other_zip_files(refused, saved) -> None:
    content = saved({"a": torch.ones(3)})
    refused(rezipped(content, compression=zipfile.ZIP_DEFLATED), "compressed records")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b.txt", "hello")
    refused(file.getvalue(), "a zip file with no record data.pkl")


def test_records_of_a_zip_file_lie_apart(refused, saved) -> None:
    """Two of one name, and two that are the same bytes: a reader could be shown another file."""
    file = io.BytesIO(saved({"a": torch.ones(300)}))
    with zipfile.ZipFile(file, "a") as archive:
        (data,) = (info for info in archive.infolist() if info.filename.endswith("data/0"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(data.filename, bytes(1200))
    refused(file.getvalue(), "records one over another")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"x" * 2000)
        twin = copy.copy(archive.infolist()[0])
        twin.filename = "a/data/0"
        archive.filelist.append(twin)
        archive._didModify = True
    refused(file.getvalue(), "records one over another")


def test_records_of_another_size_are_refused(refused, saved) -> None:
    content = saved(torch.ones(3))
    for size in (0, 11, 13, 24):
        edited = rezipped(
            content, lambda name, data, n=size: bytes(n) if name.endswith("/0") else data
        )
        refused(edited, "expected .* at data/0, got another size")


def test_a_flipped_bit_of_a_tensor_is_an_error(refused, saved) -> None:
    """The bytes of each tensor are found in the file, and each of them is changed once."""
    value = torch.arange(7, dtype=torch.float64) + 0.25
    content = saved(value)
    start = content.index(value.numpy().tobytes())
    for position in range(start, start + 56):
        data = bytearray(content)
        data[position] ^= 1 << position % 8
        refused(bytes(data), "a file damaged at .*/data/0")


def test_a_flipped_bit_anywhere_is_an_error_or_harmless(tmp_path, saved) -> None:
    """Only what stands between the records of a zip file has no checksum, and no meaning."""
    value = {"a": torch.arange(7.0), "b": [1, 0.5, "x"], "lr": np.float64(0.1)}
    content, path, errors = saved(value), tmp_path / "x", 0
    for position in range(0, len(content), 5):
        data = bytearray(content)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            assert same(read_torch(path), value)
        except CheckpointError:
            errors += 1
    assert errors > len(content) / 5 / 3


def test_legacy_files_end_where_they_say(refused, saved) -> None:
    content = saved([torch.ones(3), torch.zeros(2)], legacy=True)
    refused(content[:-1], "expected a file of")
    refused(content + b"\0", "expected a file of")
    start = content.index(b"\x03" + bytes(7) + torch.ones(3).numpy().tobytes())
    for numel in (b"\x02", b"\x04", b"\xff"):
        refused(content[:start] + numel + content[start + 1 :], "expected _Storage.* values")


def test_a_module_is_refused_by_name(refused, saved) -> None:
    for legacy in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = saved(nn.Linear(1, 1), legacy=legacy)
        refused(content, r"the global torch\.nn\.modules\.linear\.Linear, which is not")


class Script(nn.Module):
    def forward(self, x):
        return x


def test_a_program_is_refused(refused, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Script()), tmp_path / "x.pt")
    refused((tmp_path / "x.pt").read_bytes(), "a TorchScript program")


def test_one_error_class() -> None:
    assert diffusionkit.CheckpointError is training.CheckpointError is CheckpointError


def test_atomic_write_replaces_a_file_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "x"
    atomic_write(path, lambda file: file.write(b"one"))
    assert path.read_bytes() == b"one"

    def fail(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(str(path), fail)
    assert path.read_bytes() == b"one"

    def write(file) -> None:
        file.write(b"three")
        assert path.read_bytes() == b"one"  # not before the end

    atomic_write(path, write)
    assert path.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [path]


def test_assigned_tensors_fit_or_nothing_changes() -> None:
    network = nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    before = network.weight.clone()
    for state, match in [
        (
            {**good, "other": torch.ones(1)},
            r"f: the network does not fit, 1 problems: unexpected o",
        ),
        ({"weight": good["weight"]}, "1 problems: missing bias"),
        ({**good, "bias": torch.ones(3)}, r"bias: expected shape \(2,\), got \(3,\)"),
        ({**good, "bias": 1.0}, r"bias: expected shape \(2,\), got float"),
        ({f"k{n}": torch.ones(1) for n in range(30)}, r"32 problems: .*k17; \.\.\.$"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            assign("f", "network", network, state)
        assert torch.equal(network.weight, before)
    assign("f", "network", network, good)
    assert torch.equal(network.weight, good["weight"])


def test_safetensors_come_back(tmp_path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    value = {"a.b": torch.randn(2, 3), "c": torch.arange(4), "h": torch.ones(2).bfloat16()}
    save_file(value, tmp_path / "x.safetensors", {"format": "pt", "note": "ü"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert same(dict(sorted(tensors.items())), value)
    assert metadata == {"format": "pt", "note": "ü"}
    save_file(value, tmp_path / "x.safetensors")
    assert read_safetensors(tmp_path / "x.safetensors")[1] == {}


def test_safetensors_do_not_change_with_their_file(tmp_path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    tensors, _ = read_safetensors(path)
    with open(path, "r+b") as file:
        file.seek(-12, 2)
        file.write(bytes(12))
    assert tensors["a"].tolist() == [1.0, 1.0, 1.0]


def test_damaged_safetensors(refused) -> None:
    save = pytest.importorskip("safetensors.torch").save
    content = save({"a": torch.ones(3)})
    for cut in range(1, len(content)):
        refused(content[:cut], "", read_safetensors)
    refused(content + b"\0", "SafetensorError", read_safetensors)
    refused(b"\xff" * 7 + b"\x7f" + content[8:], "SafetensorError", read_safetensors)
    refused(content.replace(b"[0,12]", b"[0,99]"), "SafetensorError", read_safetensors)
    refused(b"PK\x03\x04" + content, "a zip file", read_safetensors)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "diffusionkit-torch\[safetensors\]"'):
        read_safetensors(Path("x"))
