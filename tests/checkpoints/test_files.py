"""Files of torch: read like torch reads them, or rejected with a reason."""

import copy
import io
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from support.nested import same
from torch import nn

import diffusionkit
from diffusionkit import training
from diffusionkit._files import CheckpointError, check_weights, read_torch
from diffusionkit.checkpoints._safetensors import read_safetensors


def rezipped(content: bytes, edit: Any = None, **options: Any) -> bytes:
    """Rewrite the records of a zip file, with correct checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", **options) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, edit(info.filename, data) if edit else data)
    return file.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_are_read_unchanged(tmp_path, torch_content, saved, legacy) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(saved(torch_content, legacy=legacy))
    assert same(read_torch(path), torch_content)
    assert same(read_torch(str(path)), torch_content)


def test_new_dtypes_are_read(tmp_path) -> None:
    value = [torch.ones(3, dtype=d) for d in (torch.uint16, torch.float8_e4m3fn, torch.uint64)]
    torch.save(value, tmp_path / "x.pt")
    read = read_torch(tmp_path / "x.pt")
    assert [t.dtype for t in read] == [t.dtype for t in value]
    assert [t.float().tolist() for t in read] == [[1.0] * 3] * 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_both_numpy_versions_are_read(tmp_path, saved, legacy, name) -> None:
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


def test_torch_itself_reads_nothing(tmp_path, monkeypatch, saved) -> None:
    """Two readers could see two different archives in one file."""
    for name in ("load", "PyTorchFileReader"):
        owner = torch if name == "load" else torch._C
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("called"))
    for legacy in (False, True):
        (tmp_path / "x").write_bytes(saved([torch.ones(3), np.float64(0.1)], legacy=legacy))
        assert same(read_torch(tmp_path / "x"), [torch.ones(3), np.float64(0.1)])


def test_threads_read_without_touching_the_process(tmp_path, torch_content, saved) -> None:
    (tmp_path / "x").write_bytes(saved(torch_content))
    filters, allowed = [*warnings.filters], set(torch.serialization.get_safe_globals())
    with ThreadPoolExecutor(4) as pool:
        for value in pool.map(read_torch, [tmp_path / "x"] * 40):
            assert same(value, torch_content)
    assert [*warnings.filters] == filters
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("legacy", [False, True])
def test_storages_are_read_as_flat_tensors(tmp_path, saved, legacy) -> None:
    (tmp_path / "x").write_bytes(saved(torch.ones(3).untyped_storage(), legacy=legacy))
    assert read_torch(tmp_path / "x").view(torch.float32).tolist() == [1.0] * 3


def test_other_devices_than_those_of_torch_are_refused(tmp_path, saved) -> None:
    (tmp_path / "x").write_bytes(saved(torch.ones(3)))
    with pytest.raises(ValueError, match="map_location: expected a device or None, got 'gpu'"):
        read_torch(tmp_path / "x", map_location="gpu")
    with pytest.raises(TypeError, match=r"map_location: expected a device or None, got 1.5"):
        read_torch(tmp_path / "x", map_location=1.5)


def test_a_missing_device_is_named(tmp_path, saved) -> None:
    def edit(record: str, data: bytes) -> bytes:
        return data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0xpu:99")

    (tmp_path / "x").write_bytes(rezipped(saved(torch.ones(3)), edit))
    with pytest.raises(CheckpointError, match="of a device that is here, got xpu:99"):
        read_torch(tmp_path / "x", map_location=None)
    (tmp_path / "x").write_bytes(saved(torch.ones(3)))
    assert read_torch(tmp_path / "x", map_location=None).tolist() == [1.0] * 3


@pytest.mark.parametrize("legacy", [False, True])
def test_booleans_of_other_bytes_are_refused(rejected, saved, legacy) -> None:
    flags = torch.tensor([2, 0, 1], dtype=torch.uint8)
    content = saved(flags, legacy=legacy)

    def edit(record: str, data: bytes) -> bytes:
        return data.replace(b"ByteStorage", b"BoolStorage")

    content = edit("", content) if legacy else rezipped(content, edit)
    rejected(content, "expected booleans of 0 and 1")


def test_files_of_another_byte_order_are_refused(rejected, saved) -> None:
    def edit(record: str, data: bytes) -> bytes:
        return b"big" if record.endswith("byteorder") else data

    rejected(rezipped(saved(torch.ones(3)), edit), "a file of a machine that is not little-endian")


def test_files_of_more_than_four_gibibytes_are_understood(tmp_path) -> None:
    """Their headers have another form; the values are not written here."""
    path = tmp_path / "x.pt"
    with torch.serialization.skip_data():
        torch.save([torch.empty(2**30 + 5), torch.empty(9)], path)
    first, second = read_torch(path, map_location="meta")
    assert (first.shape, second.shape) == ((2**30 + 5,), (9,))


def test_wide_tensors_count_by_what_they_claim(tmp_path, rejected, saved) -> None:
    tied, wide = torch.ones(1000), torch.ones(1).expand(200_000)
    for value in ([tied] * 12, [wide], {str(n): tied.view(10, 100) for n in range(12)}):
        (tmp_path / "y").write_bytes(saved(value))
        assert same(read_torch(tmp_path / "y"), value)
    for value in ([wide] * 9, {str(n): wide for n in range(9)}, [torch.ones(1).expand(10**9)]):
        rejected(saved(value), "expected tensors of the size of the file, got far larger ones")


def test_map_location_sets_the_device(tmp_path) -> None:
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
def test_error_names_the_format_of_a_foreign_file(rejected, content, match) -> None:
    rejected(content, match)


def test_missing_files_and_directories_are_rejected(tmp_path) -> None:
    for read in (read_torch, read_safetensors):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
            read(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"expected a .*, got a directory or a device"):
            read(tmp_path)


def test_other_zip_files_are_rejected(rejected, saved) -> None:
    content = saved({"a": torch.ones(3)})
    rejected(rezipped(content, compression=zipfile.ZIP_DEFLATED), "compressed records")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b.txt", "hello")
    rejected(file.getvalue(), "a zip file with no record data.pkl")


def test_overlapping_zip_records_are_rejected(rejected, saved) -> None:
    """Two records of one name, or over the same bytes, could differ between readers."""
    file = io.BytesIO(saved({"a": torch.ones(300)}))
    with zipfile.ZipFile(file, "a") as archive:
        (data,) = (info for info in archive.infolist() if info.filename.endswith("data/0"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(data.filename, bytes(1200))
    rejected(file.getvalue(), "overlapping records")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"x" * 2000)
        twin = copy.copy(archive.infolist()[0])
        twin.filename = "a/data/0"
        archive.filelist.append(twin)
        archive._didModify = True
    rejected(file.getvalue(), "overlapping records")


@pytest.mark.parametrize(
    ("local", "central", "value"),
    [
        (6, 8, b"\x09\x08"),  # encrypted
        (6, None, b"\x00\x08"),
        (8, None, b"\x08\x00"),
        (14, None, b"\x07\x07"),
        (18, None, b"\x07\x07"),
        (22, None, b"\x07\x07"),
        (30, None, b"XX"),
        (0, None, b"KP"),
    ],
)
def test_headers_that_contradict_the_directory_are_rejected(
    rejected, saved, local, central, value
) -> None:
    for content in (saved(torch.ones(3)), rezipped(saved(torch.ones(3)))):
        data = bytearray(content)
        start = content.index(b"PK\3\4", 1)
        data[start + local : start + local + 2] = value
        if central is not None:
            second = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
            data[second + central : second + central + 2] = value
        rejected(bytes(data), "a zip file with overlapping records at ")


def test_bytes_that_belong_to_no_record_are_rejected(rejected, saved) -> None:
    content = saved(torch.ones(3))
    described = content.index(b"PK\7\x08")
    for place in range(described, described + 16, 4):
        data = bytearray(content)
        data[place] ^= 1
        rejected(bytes(data), "a zip file with overlapping records at ")
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.filelist.pop(1)
        archive._didModify = True
    rejected(file.getvalue(), "a zip file with overlapping records at ")


def test_records_of_another_size_are_rejected(rejected, saved) -> None:
    content = saved(torch.ones(3))
    for size in (0, 11, 13, 24):
        edited = rezipped(
            content, lambda name, data, n=size: bytes(n) if name.endswith("/0") else data
        )
        rejected(edited, "expected .* at data/0, got another size")


def test_flipped_bit_in_a_tensor_is_detected(rejected, saved) -> None:
    """Every byte of the tensor is changed once."""
    value = torch.arange(7, dtype=torch.float64) + 0.25
    content = saved(value)
    start = content.index(value.numpy().tobytes())
    for position in range(start, start + 56):
        data = bytearray(content)
        data[position] ^= 1 << position % 8
        rejected(bytes(data), "a file damaged at data/0")


def test_flipped_bit_anywhere_is_detected_or_harmless(tmp_path, saved) -> None:
    """Only the padding between the records of a zip file has no checksum, and no meaning."""
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


def test_legacy_files_of_another_length_are_rejected(rejected, saved) -> None:
    content = saved([torch.ones(3), torch.zeros(2)], legacy=True)
    rejected(content[:-1], r"expected (8|12) bytes, got the end of the file")
    rejected(content + b"\0", "expected a file of")
    start = content.index(b"\x03" + bytes(7) + torch.ones(3).numpy().tobytes())
    for numel in (b"\x02", b"\x04", b"\xff"):
        rejected(
            content[:start] + numel + content[start + 1 :],
            "expected 3 values in storage .*, got others",
        )


def test_pickled_module_is_rejected_by_name(rejected, saved) -> None:
    for legacy in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = saved(nn.Linear(1, 1), legacy=legacy)
        rejected(content, r"the global torch\.nn\.modules\.linear\.Linear, which is not")


class Script(nn.Module):
    def forward(self, x):
        return x


def test_torchscript_is_rejected(rejected, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Script()), tmp_path / "x.pt")
    rejected((tmp_path / "x.pt").read_bytes(), "a TorchScript program")


def test_all_packages_export_one_error_class() -> None:
    assert diffusionkit.CheckpointError is training.CheckpointError is CheckpointError


def test_misfits_of_weights_are_listed() -> None:
    network = nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
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
            check_weights("f", "network", network, state)
    check_weights("f", "network", network, good)
