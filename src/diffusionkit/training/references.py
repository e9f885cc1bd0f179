"""Batches with reference batches that contain them, for targets that use references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import check_count
from .._repr import Described
from ..distributed._group import rank_and_world_size
from ..random import seeded


class ReferenceBatches(Described):
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

    The position in the epoch is part of the training state: `state_dict` returns it, and after
    `load_state_dict` the next epoch is the rest of the interrupted one.

    Args:
        dataset: a map-style data set of tensors (*D), or of tuples (tensor, class label, ...); a
            tensor (N, *D) is one.
        batch_size: the size B of the batches.
        reference_size: the size n of the references, in each process.
        seed: the seed of the order; the same seed and epoch give the same batches.
        rank: the share of the data to use, by default this process's in torch.distributed when an
            epoch begins.
        world_size: the number of shares.
        loader: options of torch.utils.data.DataLoader, such as num_workers, pin_memory and
            collate_fn.

    Raises:
        ValueError: if batch_size > reference_size, or either exceeds the items of a process.
        TypeError: if the data set has no length, or a size is not an integer.

    >>> import torch
    >>> from diffusionkit import ReferenceBatches
    >>> data = torch.randn(100, 3)
    >>> batches = ReferenceBatches(data, batch_size=8, reference_size=32)
    >>> for batch, reference in batches:
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
        if not isinstance(dataset, Sized) or (isinstance(dataset, Tensor) and not dataset.ndim):
            raise TypeError(
                "dataset: expected a map-style data set with a length, "
                f"got {type(dataset).__name__}"
            )
        check_count(batch_size, "batch_size")
        check_count(reference_size, "reference_size")
        check_count(seed, "seed", least=0, most=2**63 - 1)
        self.dataset: Any = dataset
        self.batch_size, self.reference_size = batch_size, reference_size
        self.seed, self.loader, self.epoch = seed, loader, 0
        self._group = rank, world_size
        # The steps of the next epoch that were taken before, and the place of the current one.
        self._taken, self._place = 0, (0, 0)
        self._loaded_world_size = 0  # of the state that was loaded
        self._share()

    def _share(self) -> tuple[int, int, int]:
        """Return rank, world size and number of items of this process, as they are now.

        Not as they were in the constructor: the process group may have begun later.
        """
        rank, world_size = rank_and_world_size(*self._group)
        share = len(self.dataset) // world_size
        if not self.batch_size <= self.reference_size <= share:
            raise ValueError(
                f"batch_size, reference_size: expected batch_size <= reference_size <= {share}, "
                f"the number of items of each process, got {self.batch_size}, {self.reference_size}"
            )
        return rank, world_size, share

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return self._share()[-1] // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch; by default epochs count up from 0.

        The epoch that `load_state_dict` has set keeps its place.
        """
        check_count(epoch, "epoch", least=0)
        self._taken = self._taken if epoch == self.epoch else 0
        self.epoch, self._place = epoch, (epoch, self._taken)

    def state_dict(self) -> dict[str, int]:
        """Return the place in the data: the epoch and its steps so far, and what they depend on."""
        epoch, step = self._place
        if step == len(self):
            epoch, step = epoch + 1, 0
        return {"epoch": epoch, "step": step, **self._order()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a place returned by `state_dict`.

        Raises:
            ValueError: if it is that of batches of other sizes, of other data or of another seed.
            TypeError: if a value is not an integer.
        """
        wanted = self._order()
        if not isinstance(state, Mapping) or {*state} != {"epoch", "step", *wanted}:
            got = list(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected epoch, step, {', '.join(wanted)}, got {got}")
        for name in ("epoch", "step"):
            check_count(state[name], name, least=0)
        for name, value in wanted.items():
            if state[name] != value:
                raise ValueError(f"{name}: expected {value}, got {state[name]!r}")
        if state["step"] >= len(self):
            raise ValueError(f"step: expected a number below {len(self)}, got {state['step']}")
        self.epoch, self._taken = state["epoch"], state["step"]
        self._place, self._loaded_world_size = (self.epoch, self._taken), state["world_size"]

    def _order(self) -> dict[str, int]:
        """Return what determines the batches of an epoch, in all processes."""
        return {
            "items": len(self.dataset),
            "batch_size": self.batch_size,
            "reference_size": self.reference_size,
            "seed": self.seed,
            "world_size": self._share()[1],
        }

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, reference) for each step of the next epoch, tensors or tuples of them."""
        rank, world_size, share = self._share()
        if self._taken and world_size != (loaded := self._loaded_world_size):
            raise ValueError(f"world_size: expected {loaded}, as in the state, got {world_size}")
        epoch, size, taken = self.epoch, self.batch_size, self._taken
        self.epoch, self._taken, self._place = epoch + 1, 0, (epoch, taken)
        shuffled = torch.randperm(len(self.dataset), generator=seeded(self.seed, epoch))
        order = shuffled[rank::world_size][:share].tolist()
        first = min(taken * size, share - self.reference_size)
        starts = range(first + self.reference_size, share, size)
        new = [order[first : starts.start], *(order[start : start + size] for start in starts)]
        pieces = iter(
            DataLoader(
                self.dataset,
                batch_sampler=new,
                generator=seeded(self.seed, epoch, rank),
                **self.loader,
            )
        )
        piece = next(pieces)
        pool, single = _tensors(piece), isinstance(piece, Tensor)
        for step in range(taken, share // size):
            begin = step * size
            if first < min(begin, share - self.reference_size):
                piece = _tensors(next(pieces))
                count = len(piece[0])
                first += count
                pool = [torch.cat([x[count:], y]) for x, y in zip(pool, piece, strict=True)]
            batch = [x[begin - first : begin - first + size] for x in pool]
            self._place = epoch, step + 1
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
