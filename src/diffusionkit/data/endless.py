"""Batches without an end: a pure function of a seed and a position, at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from .._checks import check_count, check_flag, check_part, check_target_device
from .._repr import Described
from ..distributed._group import rank_and_world_size
from ..random import seeded
from .images import ImageData

_LAST = 2**62


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The share of one process in a batch.

    Args:
        images: the images (b, C, H, W) in uint8.
        class_labels: their class labels (b,), None for data without classes.
        positions: their positions (b,) in the endless order, for use as seeds.
        reference: the reference (R, C, H, W) of the batch of all processes, which it contains;
            None without references.
        reference_class_labels: the class labels (R,) of the reference.
    """

    images: Tensor
    class_labels: Tensor | None
    positions: Tensor
    reference: Tensor | None = None
    reference_class_labels: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with images, class labels and reference on a device.

        The positions stay on the CPU. From pinned memory the copy is asynchronous.
        """
        check_target_device(device)
        images, labels, reference, reference_labels = (
            None if x is None else x.to(device, non_blocking=True)
            for x in (self.images, self.class_labels, self.reference, self.reference_class_labels)
        )
        return Batch(
            self.images if images is None else images,
            labels,
            self.positions,
            reference,
            reference_labels,
        )


class EndlessBatches(Described):
    r"""Batches of a data set without an end, the same at any number of processes.

    The batches are consecutive pieces of an endless order: position p is item
    :math:`\pi_e(p - e N)` of the N items in epoch :math:`e = \lfloor p / N \rfloor`, with a
    uniformly random permutation :math:`\pi_e` for each epoch. Step k of all processes together
    covers the positions k B to (k + 1) B - 1, in rank order. Permutations and flips are functions
    of seed and position alone. So a run can resume at any step (`start`), with any number of
    processes or workers. No loader state is needed, which could be restored only with the number of
    processes that saved it.

    With `reference_size` R > 0, for `StableTarget`, each batch comes with a reference: positions
    k B to k B + R - 1, the same in every process. Its first B items are the batch of all processes.
    No reference contains an item twice, as the order then keeps repeats of an item at least R
    positions apart. Given the items of the reference, each is in the batch with probability B / R,
    so that the target is unbiased in every step.

    Args:
        data: the images.
        batch_size: the number B of images of a step, of all processes together.
        seed: the seed of order and flips.
        start: the number of steps taken before.
        rank: the share to return, by default this process's in torch.distributed.
        world_size: the number of shares, by default that of the processes.
        flip: flip each image left to right with probability 1/2, anew in each epoch.
        reference_size: the number R of images of a reference, 0 for none.
        workers: the number of processes that load images ahead, 0 for none.
        pin_memory: load into pinned memory, from which copies to a GPU are asynchronous.

    Raises:
        ValueError: if world_size does not divide batch_size, or reference_size is neither 0 nor
            between batch_size and a third of the items.
        TypeError: if an argument has another type.

    >>> import torch
    >>> from diffusionkit.data import EndlessBatches, ImageTensors
    >>> images = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8)
    >>> data = EndlessBatches(ImageTensors(images), batch_size=16, start=6)
    >>> next(iter(data)).positions
    tensor([ 96,  97,  98,  99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109,
            110, 111])
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        flip: bool = False,
        reference_size: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_part(data, ImageData, "data")
        check_count(batch_size, "batch_size")
        check_count(seed, "seed", least=0, most=2**63 - 1)
        check_count(start, "start", least=0, most=_LAST // batch_size)
        check_count(reference_size, "reference_size", least=0)
        check_count(workers, "workers", least=0)
        check_flag(flip, "flip")
        check_flag(pin_memory, "pin_memory")
        if reference_size and not batch_size <= reference_size <= len(data) // 3:
            raise ValueError(
                f"reference_size: expected 0 or {batch_size} (batch_size) to {len(data) // 3} "
                f"(a third of the items), got {reference_size}"
            )
        self.data, self.batch_size, self.seed, self.start = data, batch_size, seed, start
        self.rank, self.world_size, self.flip = rank, world_size, flip
        self.reference_size, self.workers, self.pin_memory = reference_size, workers, pin_memory
        self._share()
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}  # of the latest epochs

    def _share(self) -> tuple[int, int]:
        """Return this process's share of a batch: its first place and its size."""
        rank, world_size = rank_and_world_size(self.rank, self.world_size)
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the {world_size} processes, "
                f"got {self.batch_size}"
            )
        size = self.batch_size // world_size
        return rank * size, size

    def items(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the items of the data set at positions (n,), and whether they are flipped.

        Raises:
            ValueError: if a position is negative.
            TypeError: if positions is not a tensor of integers.
        """
        if not isinstance(positions, Tensor) or positions.dtype != torch.int64 or positions.is_meta:
            got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"positions: expected a tensor of int64, got {got}")
        if positions.ndim != 1 or not len(positions) or int(positions.min()) < 0:
            raise ValueError(
                "positions: expected a tensor (n,) of numbers >= 0, "
                f"got {positions.tolist() if positions.ndim == 1 else tuple(positions.shape)}"
            )
        epochs = positions // len(self.data)
        items, flips = torch.empty_like(positions), torch.empty_like(positions, dtype=torch.bool)
        for epoch in sorted({*epochs.tolist()}):
            here = epochs == epoch
            order, flipped = self._epoch(epoch)
            places = positions[here] - epoch * len(self.data)
            items[here], flips[here] = order[places], flipped[places]
        return items, flips

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order of an epoch, kept while it is in use; see `_draw_epoch`."""
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._draw_epoch(epoch)
        return self._orders[epoch]

    def _draw_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order of an epoch (N,), and whether its places are flipped (N,)."""
        count, near = len(self.data), self.reference_size - 1
        order = torch.randperm(count, generator=seeded(self.seed, epoch, 0))
        if near > 0 and epoch > 0:
            # The last items of the epoch before leave the head of this one. They are exchanged
            # with items of the middle, never of the tail, so that an epoch depends on one only.
            before = torch.randperm(count, generator=seeded(self.seed, epoch - 1, 0))
            recent = torch.zeros(count, dtype=torch.bool)
            recent[before[count - near :]] = True
            again = recent[order[:near]].nonzero()[:, 0]
            free = near + (~recent[order[near : count - near]]).nonzero()[: len(again), 0]
            order[again], order[free] = order[free], order[again]
        if not self.flip:
            return order, torch.zeros(count, dtype=torch.bool)
        flips = torch.randint(2, (count,), generator=seeded(self.seed, epoch, 1))
        return order, flips.bool()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this process from step `start` on, without an end."""
        begin, share = self._share()  # only now, as the process group may be younger
        loaded = self._load(begin, share)
        images, labels = next(loaded)
        step = self.start
        while True:
            positions = torch.arange(begin, begin + share) + step * self.batch_size
            if not self.reference_size:
                yield Batch(images, labels, positions)
                images, labels = next(loaded)
            else:
                own = slice(begin, begin + share)
                own_labels = None if labels is None else labels[own]
                yield Batch(images[own], own_labels, positions, images, labels)
                new, new_labels = next(loaded)
                images = torch.cat([images[self.batch_size :], new])
                if labels is not None and new_labels is not None:
                    labels = torch.cat([labels[self.batch_size :], new_labels])
            step += 1

    def _load(self, begin: int, share: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what each step adds: its share, or a first reference and then batches of it."""
        loader: DataLoader[Any] = DataLoader(
            _Flipped(self.data),
            batch_sampler=_Requests(self, begin, share),
            collate_fn=_stacked,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=seeded(self.seed),  # workers draw nothing; torch's own state is left alone
        )
        for loaded in loader:
            if isinstance(loaded, Exception):
                raise loaded
            images, labels = loaded
            yield images, None if self.data.class_labels is None else labels


class _Requests:
    """The items to load for each step, and whether to flip them."""

    def __init__(self, batches: EndlessBatches, begin: int, share: int) -> None:
        self._batches, self._begin, self._share = batches, begin, share

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        own, step = self._batches, self._batches.start
        size, ahead = own.batch_size, own.reference_size
        while True:
            begin, count = step * size + self._begin, self._share
            if ahead and step == own.start:
                begin, count = step * size, ahead
            elif ahead:
                begin, count = (step - 1) * size + ahead, size
            items, flips = own.items(torch.arange(begin, begin + count))
            yield list(zip(items.tolist(), flips.tolist(), strict=True))
            step += 1


class _Flipped(Dataset[tuple[Tensor, int]]):
    """Images, flipped as requested; or the error of one that cannot be read.

    A worker that raised it would bury the name of the file in a trace of its own.
    """

    def __init__(self, data: ImageData) -> None:
        self._data = data

    @override
    def __getitem__(self, request: tuple[int, bool]) -> tuple[Tensor, int]:
        raise NotImplementedError

    def __getitems__(
        self, requests: list[tuple[int, bool]]
    ) -> list[tuple[Tensor, int]] | Exception:
        try:
            loaded = self._data.__getitems__([item for item, _ in requests])
        except (OSError, ValueError) as error:
            return error
        return [
            (image.flip(-1) if flip else image, label)
            for (image, label), (_, flip) in zip(loaded, requests, strict=True)
        ]


def _stacked(items: list[tuple[Tensor, int]] | Exception) -> tuple[Tensor, Tensor] | Exception:
    if isinstance(items, Exception):
        return items
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
