"""Images of folders, zip files and .npz files: what is read, converted and refused."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionkit.data import EndlessBatches, ImageTensors, open_images

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def zipped(folder: Path, path: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@pytest.fixture
def pets(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """Two classes, one of them with a folder of its own, and files that are no images."""
    pixels = {}
    for name in ("dog/b.png", "cat/2.png", "cat/old/10.PNG", "dog/a.bmp", "cat/1.webp"):
        pixels[name] = noise(6, 8, 3)
        options = {"lossless": True} if name.endswith("webp") else {}
        save(tmp_path / "pets" / name, pixels[name], **options)
    (tmp_path / "pets" / "README.txt").write_text("Pets.")
    save(tmp_path / "pets" / ".hidden" / "x.png", noise(2, 2))
    save(tmp_path / "pets" / "cat" / "._1.png", noise(2, 2))
    save(tmp_path / "pets" / "__MACOSX" / "x.png", noise(2, 2))
    return tmp_path / "pets", dict(sorted(pixels.items()))


@pytest.mark.parametrize("kind", ["folder", "deflated", "stored", "inside a folder"])
def test_sub_folders_are_classes(pets, tmp_path, kind) -> None:
    path, pixels = pets
    if kind == "inside a folder":
        outer = tmp_path / "outer" / "set"
        outer.mkdir(parents=True)
        path = path.rename(outer / "pets").parents[1]
    elif kind != "folder":
        method = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
        path = zipped(path, tmp_path / "pets.zip", method)
    data = open_images(path)
    assert len(data) == 5
    assert data.shape == (3, 6, 8)
    assert data.classes == ("cat", "dog")
    assert data.class_labels.tolist() == [0, 0, 0, 1, 1]
    for i, (name, expected) in enumerate(pixels.items()):
        image, label = data[i]
        assert data.name(i).endswith(name)
        assert torch.equal(image, as_tensor(expected))
        assert label == data.class_labels[i]
    assert torch.equal(data[-1][0], data[4][0])
    with pytest.raises(IndexError):
        data[5]
    data.check()


def test_images_without_folders_have_no_classes(tmp_path) -> None:
    save(tmp_path / "set" / "a.png", noise(4, 4))
    data = open_images(tmp_path)
    assert data.classes == ()
    assert data.class_labels is None
    assert data.shape == (1, 4, 4)
    assert data[0][1] == 0


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_dataset_json_has_the_labels(tmp_path, kind) -> None:
    """Its folders are no classes, and classes need not all have images."""
    root = tmp_path / "set"
    for n in range(4):
        save(root / f"0000{n // 2}" / f"img{n}.png", noise(4, 4, 3))
    pairs = [[f"0000{n // 2}/img{n}.png", 3 - n] for n in range(3)] + [["00001/img3.png", 5]]
    (root / "dataset.json").write_text(json.dumps({"labels": pairs}))
    path = root if kind == "folder" else zipped(root, tmp_path / "set.zip")
    data = open_images(path)
    assert data.class_labels.tolist() == [3, 2, 1, 5]
    assert data.classes == ("0", "1", "2", "3", "4", "5")
    (root / "dataset.json").write_text('{"labels": null}')
    assert open_images(root).classes == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "dataset.json: expected JSON, got"),
        ("[" * 100_000, "dataset.json: expected JSON, got"),
        ("[1]", r"expected {\"labels\": \[\[name, label\], ...\]}, got \[1\]"),
        ('{"labels": [["a.png", 0]]}', "expected a label of each image, got none of 'b.png'"),
        (
            '{"labels": [["a.png", 0], ["c.png", 1]]}',
            "labels of the images next to it, got 'c.png'",
        ),
        ('{"labels": [["a.png", 0], ["a.png", 1]]}', "one label of 'a.png', got 0 and 1"),
        ('{"labels": [["a.png", [0, 1]]]}', r"expected \[name, class label >= 0\], got"),
        ('{"labels": [["a.png", -1]]}', r"expected \[name, class label >= 0\], got"),
        ('{"labels": [["a.png", true]]}', r"expected \[name, class label >= 0\], got"),
    ],
)
def test_a_dataset_json_must_fit(tmp_path, table, message) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name, noise(4, 4))
    (tmp_path / "dataset.json").write_text(table)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)


def test_grey_palette_cmyk_and_16_bits_among_rgb(tmp_path) -> None:
    rgb, grey = noise(5, 5, 3), noise(5, 5)
    save(tmp_path / "a.png", rgb)
    save(tmp_path / "b.png", grey)
    few = Image.fromarray(rgb).quantize(16)
    save(tmp_path / "c.png", few)
    deep = (grey.astype(np.uint16) * 257).astype(np.uint16)
    save(tmp_path / "d.png", deep)
    save(tmp_path / "e.png", Image.fromarray(grey > 127))
    save(tmp_path / "f.png", Image.fromarray(np.dstack([rgb, np.full((5, 5), 255, np.uint8)])))
    flat = np.zeros((5, 5, 4), np.uint8) + np.array([0, 255, 255, 0], np.uint8)  # red ink
    save(tmp_path / "g.jpg", Image.fromarray(flat, "CMYK"), quality=100)
    data = open_images(tmp_path)
    repeated = torch.from_numpy(grey).expand(3, 5, 5)
    assert torch.equal(data[1][0], repeated)
    assert torch.equal(data[2][0], as_tensor(np.asarray(few.convert("RGB"))))
    assert torch.equal(data[3][0], repeated)
    assert torch.equal(data[4][0], (repeated > 127).to(torch.uint8) * 255)
    assert torch.equal(data[5][0], as_tensor(rgb))
    red = torch.tensor([255, 0, 0])[:, None, None]
    assert (data[6][0].long() - red).abs().max() <= 3
    data.check()


def test_channels_convert_all(tmp_path) -> None:
    rgb = noise(5, 5, 3)
    save(tmp_path / "a.png", noise(5, 5))
    save(tmp_path / "b.png", rgb)
    assert open_images(tmp_path, channels=3).shape == (3, 5, 5)
    grey = open_images(tmp_path, channels=1)[1][0]
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert ((as_tensor(rgb) * luma).sum(0) - grey[0]).abs().max() <= 1
    with pytest.raises(ValueError, match=r"b.png: expected a gray image as the first .*channels=1"):
        open_images(tmp_path)[1]


def test_16_bits_are_scaled_not_cut(tmp_path) -> None:
    save(tmp_path / "a.png", np.array([[0, 128, 129, 257 * 7, 65535, 40000]], np.uint16))
    assert open_images(tmp_path)[0][0].tolist() == [[[0, 0, 1, 7, 255, 156]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_refused(tmp_path, mode) -> None:
    save(tmp_path / "a.png", noise(4, 4, 3))
    image = Image.fromarray(noise(4, 4, 4), "RGBA").convert(mode)
    save(tmp_path / "b.png", image, **({"transparency": 0} if mode == "P" else {}))
    if mode == "P":
        image.putpixel((0, 0), 0)
        save(tmp_path / "b.png", image, transparency=0)
    with pytest.raises(ValueError, match=r"b\.png: expected an opaque image.*background"):
        open_images(tmp_path)[1]


def test_images_are_turned_as_the_camera_was(tmp_path) -> None:
    pixels = noise(4, 6, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # rotate 90 degrees clockwise to view
    save(tmp_path / "a.png", pixels, exif=turned)
    assert torch.equal(open_images(tmp_path)[0][0], as_tensor(np.rot90(pixels, -1).copy()))


def test_size_scales_the_middle(tmp_path) -> None:
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 10:50] = 200  # the square in the middle
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", noise(10, 10, 3))
    save(tmp_path / "c.png", np.repeat(np.repeat(noise(5, 5, 3), 8, 0), 8, 1))
    data = open_images(tmp_path, size=10)
    assert (data[0][0] == 200).all()
    assert torch.equal(data[1][0], as_tensor(np.asarray(Image.open(tmp_path / "b.png"))))
    assert data[2][0].shape == (3, 10, 10)


def test_scaling_is_antialiased(tmp_path) -> None:
    """Stripes of one pixel become grey, not one of the two."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    save(tmp_path / "a.png", stripes)
    small = open_images(tmp_path, size=16)[0][0].long()
    assert (small - 127).abs().max() < 20


def test_other_sizes_are_named(tmp_path) -> None:
    save(tmp_path / "a.png", noise(4, 4))
    save(tmp_path / "b.png", noise(4, 5))
    with pytest.raises(ValueError, match=r"b\.png: expected 4 x 4 as the first.*got 4 x 5; size="):
        open_images(tmp_path)[1]


def broken(tmp_path) -> Path:
    whole = BytesIO()
    Image.fromarray(noise(30, 30, 3)).save(whole, "PNG")
    save(tmp_path / "a.png", noise(30, 30, 3))
    (tmp_path / "b.png").write_bytes(whole.getvalue()[:900])
    (tmp_path / "c.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "d.jpg").write_bytes(b"")
    save(tmp_path / "e.png", noise(30, 30, 3))
    frames = [Image.fromarray(noise(30, 30, 3)) for _ in range(2)]
    frames[0].save(tmp_path / "f.webp", save_all=True, append_images=frames[1:])
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_check_names_every_broken_image(tmp_path, kind, workers) -> None:
    path = broken(tmp_path / "set")
    if kind == "zip":
        path = zipped(path, tmp_path / "set.zip")
    with pytest.raises(ValueError, match="data: expected 6 images, got 4 that cannot be") as error:
        open_images(path).check(workers=workers)
    lines = str(error.value).splitlines()[1:]
    for line, (name, reason) in zip(
        lines,
        [
            ("b.png", "expected a whole image, got a damaged one"),
            ("c.png", "expected an image in PNG, JPEG, WEBP, BMP, got another file"),
            ("d.jpg", "expected an image in PNG, JPEG, WEBP, BMP, got an empty one"),
            ("f.webp", "expected one picture, got an animation of 2"),
        ],
        strict=True,
    ):
        assert os.path.join(path, name) + ": " + reason in line


def test_a_broken_first_image_is_named(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png: expected an image in PNG"):
        open_images(tmp_path)


def test_a_huge_image_is_refused_unread(tmp_path) -> None:
    """A PNG file of 60 bytes that claims 4 gigapixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        sums = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + sums

    header = struct.pack(">IIBBBBB", 65536, 65536, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(ValueError, match=r"a\.png: expected an image of reasonable size"):
        open_images(tmp_path)


def test_folders_that_do_not_make_classes(tmp_path) -> None:
    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path)

    fails("expected images in .png, .*, got 0 other files")
    save(tmp_path / "cat" / "a.png", noise(4, 4))
    (tmp_path / "dog").mkdir()
    fails("expected images in each sub-folder, got none in 'dog'")
    save(tmp_path / "dog" / "a.png", noise(4, 4))
    save(tmp_path / "b.png", noise(4, 4))
    fails("expected all images in sub-folders.* got 'b.png' next to the folder 'cat'")
    (tmp_path / "b.png").unlink()
    (tmp_path / "dog" / "b.gif").write_bytes(b"GIF89a")
    fails("expected images in .png, .*, got 'dog/b.gif'")
    (tmp_path / "dog" / "b.gif").unlink()
    for name in ("caf\u00e9", "cafe\u0301"):
        save(tmp_path / name / "a.png", noise(4, 4))
    fails("expected distinct classes, got")


def test_the_folder_of_all_parts_is_refused(tmp_path) -> None:
    for part in ("train", "val"):
        save(tmp_path / part / "cat" / "a.png", noise(4, 4))
    with pytest.raises(ValueError, match=r"expected the folder of one part.*, got train, val"):
        open_images(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path) -> None:
    save(tmp_path / "real" / "a.png", noise(4, 4))
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "cat").symlink_to(tmp_path / "real")
    save(inside / "dog" / "a.png", noise(4, 4))
    assert open_images(inside).classes == ("cat", "dog")
    (inside / "dog" / "b.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="expected a file, got a broken link"):
        open_images(inside)
    (inside / "dog" / "b.png").unlink()
    (inside / "dog" / "up").symlink_to(inside)
    with pytest.raises(ValueError, match="expected a folder, got a circular link"):
        open_images(inside)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "x\\..\\a.png"])
def test_paths_out_of_a_zip_file_are_refused(tmp_path, name) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(ValueError, match="expected files of images, got a path out of the archive"):
        open_images(tmp_path / "set.zip")


def test_zip_files_that_are_damaged(tmp_path) -> None:
    for n in range(3):
        save(tmp_path / "set" / f"{n}.png", noise(20, 20, 3))
    path = zipped(tmp_path / "set", tmp_path / "set.zip", zipfile.ZIP_STORED)
    data, content = open_images(path), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1\.png: expected a whole entry of the zip file, got a"):
        data[1]
    path.write_bytes(b"x" * len(content))
    with pytest.raises(ValueError, match=r"2\.png: expected the entry of the zip file.*replaced"):
        data[2]
    with pytest.raises(ValueError, match=r"set\.zip: expected a zip file, got a damaged one"):
        open_images(path)


def test_an_entry_unpacks_to_no_more_than_it_claims(tmp_path) -> None:
    save(tmp_path / "set" / "a.png", np.zeros((500, 500, 3), np.uint8), compress_level=0)
    path = zipped(tmp_path / "set", tmp_path / "set.zip")
    content = path.read_bytes()
    size = (tmp_path / "set" / "a.png").stat().st_size
    path.write_bytes(content.replace(struct.pack("<I", size), struct.pack("<I", 100)))
    with pytest.raises(ValueError, match="expected a whole entry of the zip file, got a damaged"):
        open_images(path)


def test_arrays_of_an_npz_file(tmp_path) -> None:
    images, labels = noise(7, 4, 6, 3), np.array([0, 2, 1, 2, 0, 0, 4])
    path = tmp_path / "set.npz"
    np.savez(path, images, labels)
    data = open_images(path)
    assert data.shape == (3, 4, 6)
    assert data.classes == ("0", "1", "2", "3", "4")
    assert data.class_labels.tolist() == labels.tolist()
    assert torch.equal(data[3][0], as_tensor(images[3]))
    assert open_images(path, size=8, channels=1).shape == (1, 8, 8)
    np.savez(path, images[..., 0])
    assert open_images(path).shape == (1, 4, 6)
    np.save(tmp_path / "set.npy", images)
    assert torch.equal(open_images(tmp_path / "set.npy")[2][0], as_tensor(images[2]))
    assert open_images(path, channels=3)[1][0].tolist() == [images[1, ..., 0].tolist()] * 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": np.zeros(3)}, "expected an .npz file of arr_0, arr_1, got arrays data"),
        ({"arr_0": np.zeros((2, 4, 4))}, r"expected images of uint8.*got float64 and \(2, 4, 4\)"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"got uint8 and \(2, 3, 8, 8\)"),
        ({"arr_0": noise(2, 4, 4), "arr_1": np.zeros(3, int)}, r"arr_1 of integers and shape \(2"),
        ({"arr_0": noise(2, 4, 4), "arr_1": np.array([0, -1])}, "class labels >= 0 in arr_1"),
        ({"arr_0": np.array([None])}, "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, message) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "set.npz")


def test_what_is_no_image_set_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no images at"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "set.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"path: expected a folder, a \.zip, \.npz or \.npy file"):
        open_images(tmp_path / "set.tar")
    (tmp_path / "set.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"set\.npy: expected an \.npy file, got"):
        open_images(tmp_path / "set.npy")
    (tmp_path / "set.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"set\.npz: expected an \.npz file of arr_0"):
        open_images(tmp_path / "set.npz")


def test_the_fingerprint_changes_with_the_data(pets) -> None:
    path, _ = pets
    first = open_images(path).fingerprint
    assert open_images(path).fingerprint == first
    assert open_images(path, size=4).fingerprint != first
    (path / "dog").rename(path / "ant")
    renamed = open_images(path).fingerprint
    save(path / "cat" / "new.png", noise(6, 8, 3))
    assert len({first, renamed, open_images(path).fingerprint}) == 3


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_workers_and_copies_read_the_same(pets, tmp_path, kind) -> None:
    path, _ = pets
    data = open_images(path if kind == "folder" else zipped(path, tmp_path / "pets.zip"))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint == data.fingerprint
    alone, workers = (iter(EndlessBatches(data, 4, workers=n, seed=2)) for n in (0, 2))
    for _ in range(4):
        one, other = next(alone), next(workers)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.class_labels, other.class_labels)


def test_images_in_memory_are_checked() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    data = ImageTensors(images, labels, classes=["a", "b"])
    assert data.fingerprint != ImageTensors(images, 1 - labels, classes=["a", "b"]).fingerprint
    for arguments, message in [
        ((images.float(),), "images: expected a tensor in uint8, got torch.float32"),
        ((images[0],), r"images: expected shape \(N, C, H, W\), got \(1, 4, 4\)"),
        ((images, labels[:1]), r"class_labels: expected shape \(2,\), got \(1,\)"),
        ((images, labels.float()), "class_labels: expected a tensor of integers"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            ImageTensors(*arguments, classes=["a", "b"])
    with pytest.raises(ValueError, match="expected indices of the 1 classes, got 0 to 1"):
        ImageTensors(images, labels, classes=["a"])
    with pytest.raises(ValueError, match="classes: expected distinct names, got 'a' twice"):
        ImageTensors(images, labels, classes=["a", "a"])
    with pytest.raises(ValueError, match="class_labels: expected a tensor, as there are classes"):
        ImageTensors(images, classes=["a"])
