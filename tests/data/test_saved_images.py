"""Images in files: formats, equal bytes, class labels, broken disks."""

import errno
import json
import multiprocessing
import os
import zipfile

import numpy as np
import pytest
import torch

from diffusionkit.data import open_images, save_grid, save_images

Image = pytest.importorskip("PIL.Image")


def images(channels: int = 3, n: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, channels, 4, 6), generator=generator, dtype=torch.uint8)


def read(file) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(file)))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_in_a_folder_and_a_zip(tmp_path, channels) -> None:
    x, labels = images(channels), torch.tensor([2, 0, 1, 1, 2])
    save_images(x, tmp_path / "new" / "folder", class_labels=labels)
    save_images(iter(x.split(2)), tmp_path / "all.zip", class_labels=labels)
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.testzip() is None
        for i, name in enumerate(archive.namelist()[:-1]):
            assert name == f"{i:08d}.png"
            assert torch.equal(read(archive.open(name)), x[i])
            assert archive.read(name) == (tmp_path / "new" / "folder" / name).read_bytes()
        table = json.loads(archive.read("dataset.json"))
    assert table == json.loads((tmp_path / "new" / "folder" / "dataset.json").read_text())
    assert table["labels"] == [[f"{i:08d}.png", n] for i, n in enumerate(labels.tolist())]
    assert sorted(os.listdir(tmp_path)) == ["all.zip", "new"]
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_arrays(tmp_path) -> None:
    x, labels = images(2), torch.arange(5)
    save_images(x.split(2), tmp_path / "a.npz", class_labels=labels)
    save_images(x, tmp_path / "a.npy")
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], x.permute(0, 2, 3, 1).numpy())
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(np.load(tmp_path / "a.npy"), x.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.npy"])
def test_equal_images_give_equal_bytes(tmp_path, name, monkeypatch) -> None:
    save_images(images(), tmp_path / name)
    first = (tmp_path / name).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    save_images(images().split(3), tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


def test_a_grid(tmp_path) -> None:
    x = images(n=5)
    save_grid(x, tmp_path / "new" / "grid.png")
    grid = read(tmp_path / "new" / "grid.png")
    assert grid.shape == (3, 8, 18)
    for i in range(5):
        row, column = divmod(i, 3)
        assert torch.equal(grid[:, 4 * row : 4 * row + 4, 6 * column : 6 * column + 6], x[i])
    assert not grid[:, 4:, 12:].any()
    save_grid(x[:2, :1], tmp_path / "grid.png", columns=7)
    assert torch.equal(read(tmp_path / "grid.png"), torch.cat(list(x[:2, :1]), 2))


class Full:
    """A disk that is full after some bytes."""

    def __init__(self, real, room: int) -> None:
        self.real, self.room = real, room

    def __call__(self, *arguments):
        self.room -= len(arguments[-1])
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(*arguments)


def test_nothing_is_lost_on_a_full_disk(tmp_path, monkeypatch) -> None:
    save_images(images(), tmp_path / "a.zip")
    before = (tmp_path / "a.zip").read_bytes()
    full = Full(zipfile.ZipFile.writestr, 150)
    monkeypatch.setattr(
        zipfile.ZipFile, "writestr", lambda self, info, data: full(self, info, data)
    )
    with pytest.raises(OSError, match=r"No space left on device: .*a.zip"):
        save_images(images(), tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == before
    write = Full(type(tmp_path).write_bytes, 150)
    monkeypatch.setattr(type(tmp_path), "write_bytes", lambda self, data: write(self, data))
    with pytest.raises(OSError, match=r"No space left on device: .*folder"):
        save_images(images(), tmp_path / "folder")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_what_a_killed_process_left_is_replaced(tmp_path) -> None:
    def slow():
        yield images()
        os._exit(1)

    context = multiprocessing.get_context("fork")
    killed = context.Process(target=save_images, args=(slow(), tmp_path / "a"))
    killed.start()
    killed.join()
    assert len(os.listdir(tmp_path)) == 1
    (tmp_path / "a").mkdir()
    save_images(images(), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert len(os.listdir(tmp_path / "a")) == 5
    with pytest.raises(FileExistsError, match=r"a folder for images must be new or empty: .*a'"):
        save_images(images(), tmp_path / "a")


def test_two_writers_of_a_folder_do_not_touch_each_other(tmp_path) -> None:
    """The first to end has the name; the other one says so, and leaves nothing."""

    def slow():
        yield images()
        save_images(1 - images(), tmp_path / "a")  # meanwhile
        yield images()

    with pytest.raises(FileExistsError, match=r"must be new or empty: .*a'"):
        save_images(slow(), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    data = open_images(tmp_path / "a")
    assert len(data) == 5
    assert torch.equal(data[3][0], 1 - images()[3])


def test_bad_input(tmp_path) -> None:
    for x, error, message in (
        (images().float(), TypeError, r"images: expected tensors in uint8 .* got torch.float32"),
        ([images(), images(1)], ValueError, r"images of shape \(3, 4, 6\), as before, got \(1, 4"),
        (images()[0], ValueError, r"images: expected shape \(N, C, H, W\), got \(3, 4, 6\)"),
        ([], ValueError, "images: expected at least one, got none"),
        (3, TypeError, "images: expected a tensor or batches of tensors, got int"),
        (["a"], TypeError, "images: expected tensors in uint8 .* got str"),
        (images(2), ValueError, r"images: expected 1 or 3 channels in a PNG file .* got 2"),
    ):
        for name in ("a.zip", "a"):
            with pytest.raises(error, match=message):
                save_images(x, tmp_path / name)
    labels = torch.arange(5)
    for name, given, error, message in (
        ("a.jpg", None, ValueError, "path: expected a name that ends in .zip, .npz or .npy, or"),
        ("a.npy", labels, ValueError, "class_labels: expected None for a .npy file"),
        ("a.npz", labels[:4], ValueError, "each of (the )?5 images, got 4"),
        ("a.zip", labels[:4], ValueError, "each of (the )?5 images, got 4"),
        ("a.zip", labels.float(), TypeError, "tensor of integers, got torch.float32"),
        ("a.zip", [1], TypeError, "tensor of integers, got list"),
        ("a.zip", labels[:, None], ValueError, r"integers \(N,\), got shape \(5, 1\)"),
    ):
        with pytest.raises(error, match=message):
            save_images(images(), tmp_path / name, class_labels=given)
    for columns in (0, -1):
        with pytest.raises(ValueError, match="columns"):
            save_grid(images(), tmp_path / "grid.png", columns=columns)
    assert os.listdir(tmp_path) == []
