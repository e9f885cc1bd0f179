"""Files of safetensors: read unchanged, or rejected with a reason."""

import sys
from pathlib import Path

import pytest
import torch
from support.nested import same

from diffusionkit.checkpoints._safetensors import read_safetensors


def test_safetensors_are_read_unchanged(tmp_path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    value = {"a.b": torch.randn(2, 3), "c": torch.arange(4), "h": torch.ones(2).bfloat16()}
    save_file(value, tmp_path / "x.safetensors", {"format": "pt", "note": "ü"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert same(dict(sorted(tensors.items())), value)
    assert metadata == {"format": "pt", "note": "ü"}
    save_file(value, tmp_path / "x.safetensors")
    assert read_safetensors(tmp_path / "x.safetensors")[1] == {}


def test_safetensors_are_copied_from_the_file(tmp_path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    tensors, _ = read_safetensors(path)
    with open(path, "r+b") as file:
        file.seek(-12, 2)
        file.write(bytes(12))
    assert tensors["a"].tolist() == [1.0, 1.0, 1.0]


def test_damaged_safetensors_are_rejected(rejected) -> None:
    save = pytest.importorskip("safetensors.torch").save
    content = save({"a": torch.ones(3)})
    for cut in range(1, len(content)):
        rejected(content[:cut], "", read_safetensors)
    rejected(content + b"\0", "SafetensorError", read_safetensors)
    rejected(b"\xff" * 7 + b"\x7f" + content[8:], "SafetensorError", read_safetensors)
    rejected(content.replace(b"[0,12]", b"[0,99]"), "SafetensorError", read_safetensors)
    rejected(b"PK\x03\x04" + content, "a zip file", read_safetensors)


def test_error_without_safetensors_says_how_to_install_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "diffusionkit-torch\[safetensors\]"'):
        read_safetensors(Path("x"))


@pytest.mark.parametrize("length", [0x80, 0x180, 0x4B50, 0x8088])
def test_headers_whose_length_looks_like_another_format_are_read(tmp_path, length) -> None:
    """A header of 128 bytes begins as a pickle does, one of 19,280 bytes almost as a zip file."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    path, tensors = tmp_path / "t.safetensors", {"a": torch.ones(2)}
    for more in range(max(0, length - 110), length):
        save_file(tensors, path, {"note": "x" * more})
        if int.from_bytes(path.read_bytes()[:8], "little") == length:
            break
    assert path.read_bytes()[:2] == length.to_bytes(2, "little")
    found, about = read_safetensors(path)
    assert torch.equal(found["a"], tensors["a"])
    assert about == {"note": "x" * more}
