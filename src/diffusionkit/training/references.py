"""Batches with reference batches that contain them, for targets that use references."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import check_count
from .._distributed import rank_and_world_size
from ..random import seeded


class ReferenceBatches:
    r"""Batches of a data set, each with a reference batch that contains it.

    An epoch slides a window of `reference_size` items, the reference, over the shuffled data. The
    batch is the oldest items in the window; they leave it when new ones are loaded. Once all data
    are loaded, the batch moves through the last window. So an epoch loads each item at most once,
    uses it in at most one batch, and no window contains it twice.

    Batch and window are fixed positions of a uniformly random order: given the items of the
    window, each is in the batch with equal probability. Therefore `StableTarget` is unbiased in
    every single step.

    The first step of an epoch loads a whole window and the last steps load nothing; worker
    processes even this out. An item is loaded, and augmented, once for both batch and reference.
    They share memory, which later steps use again: do not modify them in place. Of a data set with
    class labels each is a tuple: `for (batch, labels), (reference, reference_labels) in ...`.

    Args:
        dataset: a map-style data set of tensors (*D), or of tuples (tensor, class label, ...); a
            tensor (N, *D) is one.
        batch_size: the size B of the batches.
        reference_size: the size n of the references, in each process.
        seed: the seed of the order; the same seed and epoch give the same batches.
        rank: the share of the data to use, by default this process's in torch.distributed.
        world_size: the number of shares.
        loader: options of torch.utils.data.DataLoader, such as num_workers, pin_memory and
            collate_fn.

    Raises:
        ValueError: if batch_size > reference_size, or either exceeds the items of a process.
        TypeError: if the data set has no length, or a size is not an integer.

    >>> data = torch.randn(100, 3)
    >>> for batch, reference in ReferenceBatches(data, batch_size=8, reference_size=32):
    ...     pass
    >>> batch.shape, reference.shape
    (torch.Size([8, 3]), torch.Size([32, 3]))
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        reference_size: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        **loader: Any,
    ) -> None:
        """Check the sizes; nothing is loaded yet."""
        if not isinstance(dataset, Sized):
            raise TypeError(
                "dataset: expected a map-style data set with a length, "
                f"got {type(dataset).__name__}"
            )
        rank, world_size = rank_and_world_size(rank, world_size)
        check_count(batch_size, "batch_size")
        check_count(reference_size, "reference_size")
        check_count(world_size, "world_size")
        check_count(rank, "rank", least=0)
        check_count(seed, "seed", least=0)
        share = len(dataset) // world_size
        if not batch_size <= reference_size <= share:
            raise ValueError(
                f"batch_size, reference_size: expected batch_size <= reference_size <= {share}, "
                f"the number of items of each process, got {batch_size}, {reference_size}"
            )
        if rank >= world_size:
            raise ValueError(f"rank: expected an integer < {world_size}, got {rank}")
        self.dataset: Any = dataset
        self.batch_size, self.reference_size = batch_size, reference_size
        self.seed, self.rank, self.world_size, self.loader = seed, rank, world_size, loader
        self.epoch, self._share = 0, share

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return self._share // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch, to resume a run; by default epochs count up from 0."""
        check_count(epoch, "epoch", least=0)
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, reference) for each step of the next epoch, tensors or tuples of them."""
        epoch, size = self.epoch, self.batch_size
        self.epoch += 1
        shuffled = torch.randperm(len(self.dataset), generator=seeded(self.seed, epoch))
        order = shuffled[self.rank :: self.world_size][: self._share].tolist()
        starts = range(self.reference_size, self._share, size)
        new = [order[: self.reference_size], *(order[start : start + size] for start in starts)]
        pieces = iter(
            DataLoader(
                self.dataset,
                batch_sampler=new,
                generator=seeded(self.seed, epoch, self.rank),
                **self.loader,
            )
        )
        piece = next(pieces)
        pool, single, first = _tensors(piece), isinstance(piece, Tensor), 0
        for begin in range(0, len(self) * size, size):
            if first < min(begin, self._share - self.reference_size):
                piece = _tensors(next(pieces))
                count = len(piece[0])
                first += count
                pool = [torch.cat([x[count:], y]) for x, y in zip(pool, piece, strict=True)]
            batch = [x[begin - first : begin - first + size] for x in pool]
            yield (batch[0], pool[0]) if single else (tuple(batch), tuple(pool))


def _tensors(piece: Any) -> list[Tensor]:
    parts = list(piece) if isinstance(piece, (tuple, list)) else [piece]
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                "dataset: expected items of tensors or tuples of tensors and numbers, "
                f"got {type(part).__name__}"
            )
    return parts
