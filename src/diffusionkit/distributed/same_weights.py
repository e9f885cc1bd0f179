"""Agreement of the ranks on the weights that they hold copies of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .._checks import check_part
from ._group import gather_objects
from ._sharded import is_sharded
from ._wrappers import bare_modules


def check_same_weights(model: nn.Module) -> None:
    """Raise an error on every rank if ranks disagree in their weights.

    Parameters and buffers are compared bit by bit, except the running statistics of batch
    normalization, which differ between steps. Of a sharded tensor the ranks that hold the same
    shard are compared. All processes must call this, for example before the first step and at every
    snapshot; it reads all weights once on the CPU, about a second per gigabyte, and exchanges a few
    bytes.

    Args:
        model: the model, in whatever wrappers.

    Raises:
        ValueError: if not all ranks have the same; it names the ranks in the minority, and the
            first tensor.
        TypeError: if model is not a Module.
    """
    check_part(model, nn.Module, "model")
    mine = _fingerprints(model)
    summary = hashlib.blake2b(repr(mine).encode(), digest_size=16).hexdigest()
    if len(set(gather_objects(summary))) == 1:
        return
    everyone = gather_objects(mine)
    odd_ranks: set[int] = set()
    odd_names = []
    for name in dict.fromkeys(name for part in everyone for name in part):
        found = [part.get(name, ("", "missing")) for part in everyone]
        odd = set().union(*(_minority(found, place) for place, _ in set(found)))
        odd_ranks |= odd
        odd_names += [name] if odd else []
    if odd_ranks:
        raise ValueError(
            f"model: expected the same weights on all {len(everyone)} ranks, got others on ranks "
            f"{sorted(odd_ranks)}, first in {odd_names[0]}; tensors that differ: {len(odd_names)}"
        )


def _minority(found: Sequence[tuple[str, str]], place: str) -> set[int]:
    """Return the ranks with other digests at a place than most; of two, the higher rank."""
    digests = {rank: digest for rank, (where, digest) in enumerate(found) if where == place}
    (usual, _), *_ = Counter(digests.values()).most_common(1)
    return {rank for rank, digest in digests.items() if digest != usual}


def _fingerprints(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Return the place and a digest of each tensor of which this process holds values, by name."""
    found = {}
    x: Any
    for prefix, module in bare_modules(model):
        buffers = {} if isinstance(module, _NormBase) else module._buffers
        for name, x in {**module._parameters, **buffers}.items():
            if x is not None and (place := _place(x)) is not None:
                found[prefix + name] = place, _digest(x.to_local() if is_sharded(x) else x)
    return found


def _place(x: Any) -> str | None:
    """Return where in a mesh a part of a tensor is, the same for its copies; None without part."""
    if not is_sharded(x):
        return ""
    coordinate = x.device_mesh.get_coordinate()
    if coordinate is None or any(placement.is_partial() for placement in x.placements):
        return None
    pairs = zip(coordinate, x.placements, strict=True)
    return str([None if placement.is_replicate() else at for at, placement in pairs])


def _digest(x: Tensor) -> str:
    about = f"{x.dtype} {tuple(x.shape)}"
    if x.is_meta:
        return about
    content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{about} {hashlib.blake2b(content, digest_size=16).hexdigest()}"
