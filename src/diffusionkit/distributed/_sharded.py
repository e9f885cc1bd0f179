"""Tensors of which each process holds a part."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from ._group import gather_objects, rank_and_world_size


def is_sharded(x: object) -> bool:
    """Whether x is a DTensor, of which a process holds a part."""
    # Not by its class: the module that defines it is slow to import.
    return hasattr(x, "full_tensor")


def whole(value: Any, *, keep: bool = True) -> Any:
    """Return a state with its sharded tensors gathered, one at a time, on the CPU.

    All processes must call this. Dictionaries, lists and tuples are searched; what holds no
    sharded tensor is returned unchanged.

    Args:
        value: the state.
        keep: whether this process wants the tensors; else it only takes part, and gets None.
    """
    if is_sharded(value):
        sharded = value.detach()
        # Parameters that are offloaded to the CPU are gathered by the backend of their mesh.
        gathered = sharded.to(sharded.device_mesh.device_type).full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, dict):
        parts = {key: whole(part, keep=keep) for key, part in value.items()}
        if all(parts[key] is value[key] for key in value):
            return value
        gathered = copy.copy(value)  # with the versions of modules, an attribute
        gathered.update(parts)
        return gathered
    if type(value) in (list, tuple):
        items = [whole(part, keep=keep) for part in value]
        same = all(part is old for part, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    return value


def has_sharded(value: Any) -> bool:
    """Whether there are sharded tensors in a state."""
    if isinstance(value, dict):
        return any(map(has_sharded, value.values()))
    if type(value) in (list, tuple):
        return any(map(has_sharded, value))
    return is_sharded(value)


def write_whole(path: str | os.PathLike[str], state: Any, write: Callable[[Any], object]) -> None:
    """Write a file of a state, with sharded tensors gathered in the process that writes.

    If tensors are sharded, all processes must call this. Of those with the same path one writes,
    and all return when every file is complete. Otherwise there is nothing to gather: the process
    writes its own file.

    Args:
        path: the file.
        state: its content.
        write: writes the file, given the whole state.

    Raises:
        Exception: what `write` raises, in every process.
    """
    if not has_sharded(state):
        write(state)
        return
    rank, _ = rank_and_world_size()
    writes = gather_objects(os.path.realpath(path)).index(os.path.realpath(path)) == rank
    gathered, error = whole(state, keep=writes), None
    if writes:
        try:
            write(gathered)
        except Exception as problem:
            error = problem
    del gathered
    errors = gather_objects(_portable(error))
    if error is not None:
        raise error
    if (first := next((e for e in errors if e is not None), None)) is not None:
        raise first


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that can be sent to other processes, with the same text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that cannot be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


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

    # Every process has the data. Before 2.7 torch sends those of the first all the same.
    new = "src_data_rank" in inspect.signature(distribute_tensor).parameters
    here = {"src_data_rank": None} if new else {}
    return distribute_tensor(source.to(like.device), *layouts[1], **here)


def placed_state(state: Mapping[Any, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state with its tensors whole or sharded as those of another state are."""
    return {
        key: placed(value, like[key])
        if isinstance(value, Tensor) and isinstance(like.get(key), Tensor)
        else value
        for key, value in state.items()
    }
