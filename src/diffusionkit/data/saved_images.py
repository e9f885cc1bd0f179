"""Images in files: a folder or a zip of PNG files, an array of NumPy, or one picture of many."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .._checks import check_count
from .._writing import atomic_folder, atomic_write, checked_path

_SUFFIXES = (".zip", ".npz", ".npy", "")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # no file says when it was written


def save_images(
    images: Tensor | Iterable[Tensor],
    path: str | os.PathLike[str],
    *,
    class_labels: Tensor | None = None,
) -> None:
    r"""Save images in the format given by the name; `open_images` reads each of them.

    ======== ========================================================================
    name     content
    ======== ========================================================================
    .zip     PNG files 00000000.png, 00000001.png, ...; the class labels in dataset.json
    .npz     arr_0, the images (N, H, W, C); arr_1, the class labels
    .npy     the images (N, H, W, C), without class labels
    none     a new folder, with the files of a .zip
    ======== ========================================================================

    The file or folder appears when it is complete. The same images give the same bytes.

    Args:
        images: images (N, C, H, W) in uint8, or batches of them, such as `load_shards` returns.
            PNG files have 1 or 3 channels.
        path: the file or the folder.
        class_labels: the class labels (N,), None without classes.

    Raises:
        ValueError: if a shape does not fit, there are no images, the name ends like that of
            another format, or class labels cannot be saved in it.
        TypeError: if an argument has another type.
        OSError: with the path, if it cannot be written, or is a folder with other files.
        ImportError: if Pillow, which writes PNG files, is not installed.

    >>> import tempfile
    >>> import zipfile
    >>> import torch
    >>> from diffusionkit.data import save_images
    >>> images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_images(images, f"{folder}/images.zip")
    ...     zipfile.ZipFile(f"{folder}/images.zip").namelist()
    ['00000000.png', '00000001.png']
    """
    target = Path(checked_path(path))
    kind = target.suffix.lower()
    kind = "" if not kind or target.is_dir() else kind
    if kind not in _SUFFIXES:
        raise ValueError(
            f"path: expected a name that ends in .zip, .npz or .npy, or a folder, got {target.name}"
        )
    if class_labels is not None:
        _check_labels(class_labels)
        if kind == ".npy":
            raise ValueError("class_labels: expected None for a .npy file, got a tensor")
    batches = _checked([images] if isinstance(images, Tensor) else images)
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".zip":
        members = _members(batches, class_labels)
        atomic_write(target, lambda file: _write_zip(file, members))
    elif kind == "":
        _write_folder(target, _members(batches, class_labels))
    else:
        arrays = {"arr_0": np.concatenate([_last(batch).numpy() for batch in batches])}
        if class_labels is not None:
            arrays["arr_1"] = _matching(class_labels, len(arrays["arr_0"])).numpy()
        write = _npz(arrays) if kind == ".npz" else lambda file: np.save(file, arrays["arr_0"])
        atomic_write(target, write)


def save_grid(images: Tensor, path: str | os.PathLike[str], *, columns: int | None = None) -> None:
    r"""Save images side by side in one PNG file, row by row; missing ones are black.

    Args:
        images: images (N, C, H, W) in uint8, with 1 or 3 channels.
        path: the file.
        columns: the number of images in a row, by default as many as there are rows.

    Raises:
        ValueError: if the shape is another, there are no images, or columns < 1.
        TypeError: if images is not a tensor in uint8, or columns not an integer.
        OSError: with the path, if the file cannot be written.
        ImportError: if Pillow is not installed.

    >>> import tempfile
    >>> import torch
    >>> from diffusionkit.data import save_grid
    >>> images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_grid(images, f"{folder}/grid.png")
    """
    (images,) = _checked([images])
    n = len(images)
    columns = math.ceil(n**0.5) if columns is None else columns
    check_count(columns, "columns")
    columns = min(columns, n)
    blank = images.new_zeros((-n % columns, *images.shape[1:]))
    full = torch.cat([images, blank])
    rows = full.reshape(-1, columns, *full.shape[1:])
    picture = _png(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))
    target = Path(checked_path(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, lambda file: file.write(picture))


def _checked(batches: Any) -> Iterator[Tensor]:
    """Yield batches on the CPU; raise unless there are some, in uint8 and of one shape."""
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        got = type(batches).__name__
        raise TypeError(f"images: expected a tensor or batches of tensors, got {got}")
    shape = None
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dtype != torch.uint8 or batch.is_meta:
            got = str(batch.dtype) if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"images: expected tensors in uint8 (see to_uint8), got {got}")
        if batch.ndim != 4 or not batch.numel():
            raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(batch.shape)}")
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise ValueError(
                f"images: expected images of shape {tuple(shape)}, as before, "
                f"got {tuple(batch.shape[1:])}"
            )
        yield batch.cpu()
    if shape is None:
        raise ValueError("images: expected at least one, got none")


def _check_labels(labels: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"class_labels: expected a tensor of integers, got {got}")
    if labels.ndim != 1 or labels.is_meta or labels.dtype == torch.bool:
        raise ValueError(f"class_labels: expected integers (N,), got shape {tuple(labels.shape)}")


def _matching(labels: Tensor, n: int) -> Tensor:
    """Return the class labels of n images."""
    if len(labels) != n:
        raise ValueError(
            f"class_labels: expected one for each of the {n} images, got {len(labels)}"
        )
    return labels.detach().to("cpu", torch.int64)


def _last(images: Tensor) -> Tensor:
    """Return images with the channels as the last dimension."""
    return images.permute(0, 2, 3, 1).contiguous()


def _png(image: Tensor) -> bytes:
    """Return an image (C, H, W) as the content of a PNG file."""
    if image.shape[0] not in (1, 3):
        raise ValueError(
            f"images: expected 1 or 3 channels in a PNG file (.npz and .npy take any), "
            f"got {image.shape[0]}"
        )
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    content = io.BytesIO()
    _pillow().fromarray(pixels.contiguous().numpy()).save(content, format="PNG")
    return content.getvalue()


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError("PNG files need Pillow: pip install pillow") from error


def _members(batches: Iterator[Tensor], class_labels: Tensor | None) -> Iterator[tuple[str, bytes]]:
    """Yield the names and the content of the files of some images."""
    _pillow()
    names = (f"{number:08d}.png" for number in itertools.count())
    count = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in batches:
            count += len(batch)
            yield from zip(itertools.islice(names, len(batch)), pool.map(_png, batch), strict=True)
    if class_labels is not None:
        found = _matching(class_labels, count).tolist()
        table = {"labels": [[f"{i:08d}.png", label] for i, label in enumerate(found)]}
        yield "dataset.json", json.dumps(table).encode()


def _write_zip(file: BinaryIO, members: Iterator[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            about = zipfile.ZipInfo(name, _EPOCH)
            about.external_attr, about.create_system = 0o644 << 16, 3
            archive.writestr(about, content)


def _npz(arrays: dict[str, Any]) -> Callable[[BinaryIO], None]:
    def members() -> Iterator[tuple[str, bytes]]:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            yield f"{name}.npy", content.getvalue()

    return lambda file: _write_zip(file, members())


def _write_folder(target: Path, members: Iterator[tuple[str, bytes]]) -> None:
    with atomic_folder(target, "images") as folder:
        for name, content in members:
            Path(folder, name).write_bytes(content)
