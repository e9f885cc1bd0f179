"""torch.distributed: the process group, collectives that also work alone, and sharded tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

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


def first_of_all(x: Tensor) -> Tensor:
    """Return the tensor of the first process, in all; with a single process, return x.

    All processes must call this, with tensors of one shape and dtype. The host does not wait.
    """
    if is_distributed() and dist.get_world_size() > 1:
        dist.broadcast(x, 0)
    return x


def is_sharded(x: object) -> bool:
    """Whether x is a DTensor, of which a process holds a part."""
    # Not by its class: the module that defines it is slow to import.
    return hasattr(x, "full_tensor")


def whole(value: Any) -> Any:
    """Return a state with its sharded tensors gathered, on the CPU, in every process.

    All processes must call this. Dictionaries, lists and tuples are searched; what holds no
    sharded tensor is returned unchanged.
    """
    if is_sharded(value):
        return value.detach().full_tensor().cpu()
    if isinstance(value, dict):
        gathered = {key: whole(part) for key, part in value.items()}
        return value if all(gathered[key] is value[key] for key in value) else gathered
    if type(value) in (list, tuple):
        parts = [whole(part) for part in value]
        same = all(part is old for part, old in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    return value


def placed(x: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is whole or sharded over processes as another is.

    All processes must call this, with the same x if it is whole.
    """
    if not is_sharded(x) and not is_sharded(like):
        return x
    source, target = cast(Any, x), cast(Any, like)
    layouts = [(y.device_mesh, y.placements) if is_sharded(y) else None for y in (source, target)]
    if layouts[0] == layouts[1]:
        return x
    if layouts[0] is not None:
        source = source.full_tensor()
    if layouts[1] is None:
        return cast(Tensor, source)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source.to(like.device), *layouts[1], src_data_rank=None)


def placed_state(state: Mapping[Any, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state with its tensors whole or sharded as those of another state are."""
    return {
        key: placed(value, like[key])
        if isinstance(value, Tensor) and isinstance(like.get(key), Tensor)
        else value
        for key, value in state.items()
    }
