"""The process group of torch.distributed, and collectives that also work without one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process belongs to an initialized process group."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return the given rank and world size, with those of the process group as defaults.

    Without a process group the defaults are 0 and 1.
    """
    if rank is None:
        rank = dist.get_rank() if is_distributed() else 0
    if world_size is None:
        world_size = dist.get_world_size() if is_distributed() else 1
    return rank, world_size


def barrier() -> None:
    """Wait for all processes of the group, if there is one."""
    if is_distributed():
        dist.barrier()


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows (n, ...) of all processes, in rank order; n may differ between processes.

    They are exchanged on the device of x, which the backend must support. Without a process
    group, return x.
    """
    if not is_distributed():
        return x
    world = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(counts, counts[0].new_tensor([len(x)]))
    sizes = [int(count) for count in counts]
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: len(x)] = x
    everyone = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])


def gather_objects(value: T) -> list[T]:
    """Return the picklable values of all processes, in rank order, on any backend."""
    if not is_distributed():
        return [value]
    everyone: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def largest(x: Tensor) -> Tensor:
    """Return the elementwise largest of the tensors of all processes, infinity for NaN.

    All processes must call this, with tensors of one shape and dtype. With a single process,
    return x.
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return x
    x = x.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN has no order
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
