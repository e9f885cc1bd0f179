"""The process group of torch.distributed, and collectives that also work without one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .._checks import check_count, check_flag

T = TypeVar("T")

_AVAILABLE = dist.is_available()


def is_distributed() -> bool:
    """Whether this process belongs to an initialized process group."""
    return _AVAILABLE and dist.is_initialized()


def rank_and_world_size(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return the given rank and world size, with those of the process group as defaults.

    Without a process group the defaults are 0 and 1. Ask when work begins, not before: an object
    may be made before the group.

    Raises:
        ValueError: if they are not 0 <= rank < world_size.
        TypeError: if one is not an integer.
    """
    if rank is None:
        rank = dist.get_rank() if is_distributed() else 0
    if world_size is None:
        world_size = dist.get_world_size() if is_distributed() else 1
    check_count(world_size, "world_size")
    check_count(rank, "rank", least=0)
    if rank >= world_size:
        raise ValueError(f"rank: expected a number below {world_size}, got {rank}")
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


def first_of_all(x: Tensor) -> Tensor:
    """Return the tensor of the first process, in all; with a single process, return x.

    All processes must call this, with tensors of one shape and dtype. The host does not wait.
    """
    if is_distributed() and dist.get_world_size() > 1:
        dist.broadcast(x, 0)
    return x


def broadcast_object(value: T) -> T:
    """Return the value of rank 0 in every process, such as the checkpoint to resume from.

    All processes must call this. Without a process group, return the value.

    Args:
        value: a picklable value; that of other ranks is ignored.
    """
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether a flag is set in any process, such as a request to stop; the same in all.

    All processes must call this. The host waits for the result, so call it only every few steps.

    Raises:
        TypeError: if flag is not a bool.
    """
    check_flag(flag, "flag")
    if not is_distributed():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total)
    return bool(total)
