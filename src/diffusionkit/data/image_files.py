"""Images of a folder, of a zip file or of arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_count
from ._folder_classes import (
    MOST_CLASSES,
    TABLE,
    Labels,
    by_folder,
    by_table,
    folder_of_all,
    pictures,
)
from ._members import FolderMembers, Members, ZipMembers, list_folder, list_zip
from ._npz import read_npy, read_npz
from ._pictures import PictureError, check_pillow, decoded, from_array
from .images import ImageData, ImageTensors, check_index


def open_images(
    path: str | os.PathLike[str], *, size: int | None = None, channels: int | None = None
) -> ImageData:
    """Open the images of a folder, a zip file or a file of arrays.

    - A folder, or a zip file of one, with PNG, JPEG, WebP or BMP files, in sub-folders or not. If
      it has a `dataset.json`, `{"labels": [["00000/img.png", 3], ...]}`, that has the class labels.
      Otherwise sub-folders are classes, in the order of their names. Hidden files are ignored.
      Images are read when they are used; the files must not change meanwhile.
    - An .npz file with images `arr_0` (N, H, W, C) or (N, H, W) in uint8 and class labels `arr_1`
      (N,), if any, or an .npy file with images. It is read into memory.

    Images are rotated according to their EXIF orientation. Gray images among color images, palettes
    and CMYK are converted, and 16 bits are scaled to 8. Images with transparent pixels raise an
    error: put them on a background first. Color profiles are ignored.

    With `size` the largest centered square is cropped and scaled to size x size, by Lanczos
    resampling; images of that size are unchanged. Without it, all images must have the size of the
    first. An error about a file names it. Files are read one by one, so errors may come late:
    `check` of the data reads all of them.

    Args:
        path: the folder or file.
        size: the height and width of the images.
        channels: 1 for gray, 3 for RGB; by default those of the first image.

    Returns:
        the images, an `ImageData`.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if it is none of these, or its first image cannot be used.
        TypeError: if an argument has another type.
        ImportError: if Pillow is not installed.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    if size is not None:
        check_count(size, "size", most=2**15)
    if channels is not None:
        check_count(channels, "channels")
        check_choice("channels", channels, [1, 3])
    where = os.fspath(path)
    if not where or not os.path.exists(where):
        raise FileNotFoundError(f"no images at {where!r}")
    check_pillow()
    if os.path.isdir(where):
        return _open_folder(where, size, channels)
    suffix = Path(where).suffix.lower()
    if suffix == ".zip":
        return _open_zip(where, size, channels)
    if suffix == ".npz":
        arrays = read_npz(where, ("arr_0", "arr_1"))
        if "arr_0" not in arrays:
            raise ValueError(f"{where}: expected images in arr_0, got no such array")
        return _from_arrays(where, arrays["arr_0"], arrays.get("arr_1"), size, channels)
    if suffix == ".npy":
        return _from_arrays(where, read_npy(where), None, size, channels)
    raise ValueError(f"path: expected a folder, a .zip, .npz or .npy file, got {where}")


class ImageFiles(ImageData):
    """Images in files, read when they are used; see `open_images`.

    Args:
        path: the folder or zip file.
        members: the files.
        labels: class labels and classes.
        size: the height and width of the images, None for those of the first.
        channels: 1 or 3, None for those of the first.
    """

    def __init__(
        self, path: str, members: Members, labels: Labels, size: int | None, channels: int | None
    ) -> None:
        indices, self.classes = labels
        self.class_labels = None if indices is None else torch.tensor(indices)
        self._path, self._members, self._size, self._channels = path, members, size, channels
        first, height, width = self._read(0).shape
        self.shape = (first, height, width)
        # Grey images among colored ones are converted, but colors are never dropped unasked.
        self._channels = 3 if first == 3 else channels

    @property
    @override
    def fingerprint(self) -> str:
        """A digest of names, sizes and class labels of the files; their content is not read."""
        digest = hashlib.blake2b(repr((self.shape, self.classes)).encode(), digest_size=16)
        for name in self._members.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self._members.sizes.tobytes())
        if self.class_labels is not None:
            digest.update(self.class_labels.numpy().tobytes())
        return digest.hexdigest()

    def name(self, index: int) -> str:
        """Return the name of the file of an image, relative to the folder or zip file."""
        check_index(index, len(self))
        return self._members.names[index % len(self)]

    @override
    def __len__(self) -> int:
        return len(self._members.names)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        check_index(index, len(self))
        image = self._read(index % len(self))
        if image.shape != self.shape:
            name = self._path_of(index % len(self))
            raise ValueError(f"{name}: expected {self._misfit(image.shape)}")
        return image, self._label(index)

    def _read(self, index: int) -> Tensor:
        try:
            content = BytesIO(self._members.read(index))
            return decoded(content, self._channels, self._size)
        except PictureError as error:
            raise ValueError(f"{self._path_of(index)}: expected {error}") from error.__cause__

    def _path_of(self, index: int) -> str:
        return os.path.join(self._path, self._members.names[index])

    def _misfit(self, shape: Sequence[int]) -> str:
        if shape[0] != self.shape[0]:
            kinds = {1: "a gray image", 3: "an RGB image"}
            return (
                f"{kinds[self.shape[0]]} as the first one is, "
                f"got {kinds[shape[0]]}; channels=1 or channels=3 converts all"
            )
        return (
            f"{self.shape[1]} x {self.shape[2]} as the first image is, "
            f"got {shape[1]} x {shape[2]}; size=... scales all"
        )


def _open_folder(path: str, size: int | None, channels: int | None) -> ImageFiles:
    listed, folders = list_folder(path)
    sizes = dict(listed)
    names = pictures(path, sizes)
    members = FolderMembers(path, names, [sizes[name] for name in names])

    def read_table(name: str) -> bytes:
        return Path(path, name).read_bytes()

    labels = _labels(path, names, sizes, folders, read_table)
    return ImageFiles(path, members, labels, size, channels)


def _open_zip(path: str, size: int | None, channels: int | None) -> ImageFiles:
    listed, folders = list_zip(path)
    entries = {entry.filename: entry for entry in listed}
    names = pictures(path, entries)
    members = ZipMembers(path, [entries[name] for name in names])

    def read_table(name: str) -> bytes:
        return ZipMembers(path, [entries[name]]).read(0)

    labels = _labels(path, names, entries, folders, read_table)
    return ImageFiles(path, members, labels, size, channels)


def _labels(
    path: str,
    names: Sequence[str],
    files: Collection[str],
    folders: Sequence[str],
    read_table: Callable[[str], bytes],
) -> Labels:
    """Return the labels of the dataset.json in the folder of all images or above, or of folders."""
    root = folder_of_all(names)
    while True:
        table = root + TABLE
        if table in files:
            where = os.path.join(path, table)
            try:
                return by_table(where, read_table(table), root, names)
            except PictureError as error:
                raise ValueError(f"{where}: expected {error}") from error.__cause__
        if not root:
            return by_folder(path, names, files, folders)
        root = root[: root.rfind("/", 0, -1) + 1]


def _from_arrays(
    path: str,
    array: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any] | None,
    size: int | None,
    channels: int | None,
) -> ImageTensors:
    shape, array = array.shape, array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise ValueError(
            f"{path}: expected images of uint8 and shape (N, H, W, 1 or 3) or (N, H, W), "
            f"got {array.dtype} and {shape}"
        )
    if size is not None and array.shape[1:3] != (size, size):
        images = torch.stack([from_array(image, channels, size) for image in array])
    elif channels not in (None, array.shape[3]):
        images = torch.stack([from_array(image, channels, None) for image in array])
    else:
        images = torch.from_numpy(array).permute(0, 3, 1, 2)
    if labels is None:
        return ImageTensors(images)
    if labels.shape != (len(array),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: expected labels arr_1 of integers and shape ({len(array)},), "
            f"got {labels.dtype} and {labels.shape}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise ValueError(f"{path}: expected class labels >= 0 in arr_1, got {low} to {high}")
    classes = [str(n) for n in range(high + 1)]
    return ImageTensors(images, torch.from_numpy(labels.astype(np.int64)), classes=classes)
