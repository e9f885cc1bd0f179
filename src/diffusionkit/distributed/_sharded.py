"""Tensors of which each process holds a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor


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
