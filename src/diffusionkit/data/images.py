"""The interface of image data sets, and the one of images in memory."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from .._checks import check_count, check_sequence
from .._repr import Described


class ImageData(Described, Dataset[tuple[Tensor, int]], abc.ABC):
    """Images of one shape with class labels, a map-style data set.

    `data[i]` is a tuple: an image (C, H, W) in uint8, and its class label, an index of `classes`.
    Without classes every label is 0.

    Attributes:
        shape: the shape (C, H, W) of an image.
        classes: the names of the classes, () without classes.
        class_labels: the class labels (N,) of all images in int64, None without classes.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    class_labels: Tensor | None

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A digest of the data, the same in every process and run until the data change."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number N of images."""

    @abc.abstractmethod
    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image (C, H, W) in uint8 and its class label."""

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several images with their class labels, which a DataLoader asks for at once."""
        return [self[index] for index in indices]

    def check(self, *, workers: int = 0) -> None:
        """Load all images once, and name those that cannot be used.

        Args:
            workers: the number of processes that load them, 0 for this one.

        Raises:
            ValueError: if there are any; it states the number of them and the first 20.
        """
        check_count(workers, "workers", least=0)
        loader: DataLoader[Any] = DataLoader(
            _Problems(self),
            batch_size=64,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),
        )
        found = [problem for batch in loader for problem in batch if problem]
        if found:
            raise ValueError(
                f"data: expected {len(self)} images, got {len(found)} that cannot be used:\n"
                + "\n".join([*found[:20], *(["..."] if len(found) > 20 else [])])
            )

    def _label(self, index: int) -> int:
        return 0 if self.class_labels is None else int(self.class_labels[index])


class ImageTensors(ImageData):
    """Images in memory.

    Args:
        images: the images (N, C, H, W) in uint8.
        class_labels: their class labels (N,), indices of `classes`.
        classes: the names of the classes.

    Raises:
        ValueError: if a shape does not fit, or a class label is no index of `classes`.
        TypeError: if an argument has another type.

    >>> import torch
    >>> from diffusionkit.data import ImageTensors
    >>> ones = torch.ones(2, 1, 8, 8, dtype=torch.uint8)
    >>> classes = ["square", "circle"]
    >>> data = ImageTensors(ones, torch.tensor([1, 0]), classes=classes)
    >>> len(data), data.shape, data[0][1]
    (2, (1, 8, 8), 1)
    """

    def __init__(
        self,
        images: Tensor,
        class_labels: Tensor | None = None,
        *,
        classes: Sequence[str] = (),
    ) -> None:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.is_meta:
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a tensor in uint8, got {got}")
        if images.ndim != 4 or not images.numel():
            raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
        self.classes = checked_classes(classes)
        self.class_labels = checked_labels(class_labels, len(images), self.classes)
        _, channels, height, width = images.shape
        self.shape = (channels, height, width)
        self._images = images.cpu().contiguous()
        self._digest = ""

    @property
    @override
    def fingerprint(self) -> str:
        if not self._digest:
            digest = hashlib.blake2b(repr((self.shape, self.classes)).encode(), digest_size=16)
            digest.update(self._images.numpy().data)
            if self.class_labels is not None:
                digest.update(self.class_labels.numpy().data)
            self._digest = digest.hexdigest()
        return self._digest

    @override
    def __len__(self) -> int:
        return len(self._images)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        check_index(index, len(self))
        return self._images[index], self._label(index)


class _Problems(Dataset[str]):
    """The error of each image, or an empty string."""

    def __init__(self, data: ImageData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    @override
    def __getitem__(self, index: int) -> str:
        try:
            self._data[index]
        except (ValueError, OSError) as error:
            return str(error)
        return ""


def check_index(index: int, length: int) -> None:
    """Raise unless an index is that of an item, IndexError beyond the last as in a list."""
    check_count(index, "index", least=-length)
    if index >= length:
        raise IndexError(f"index: expected an integer < {length}, got {index}")


def checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes, or raise unless they are distinct strings."""
    check_sequence(classes, "classes")
    names = tuple(classes)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"classes: expected strings, got {type(name).__name__}")
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"classes: expected distinct names, got {twice!r} twice")
    return names


def checked_labels(labels: Tensor | None, count: int, classes: tuple[str, ...]) -> Tensor | None:
    """Return class labels in int64, or raise unless they are indices of `classes`."""
    if labels is None:
        if classes:
            raise ValueError("class_labels: expected a tensor, as there are classes, got None")
        return None
    if not isinstance(labels, Tensor) or labels.is_meta or labels.is_floating_point():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"class_labels: expected a tensor of integers, got {got}")
    if labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(f"class_labels: expected a tensor of integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"class_labels: expected shape ({count},), got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise ValueError(
            f"class_labels: expected indices of the {len(classes)} classes, got {low} to {high}"
        )
    return labels.to("cpu", torch.int64).contiguous()
