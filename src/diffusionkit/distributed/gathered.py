"""Whole weights in every process, of networks that are sharded or replicated over processes."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._checks import check_part
from ._dealing import ranks_are_independent
from ._group import is_distributed
from ._sharded import is_sharded
from ._wrappers import is_fully_sharded

# Threads may share modules: weights are sharded again when the last block that gathered them ends.
# Blocks keep their modules alive, and so their ids.
_lock = threading.RLock()
_blocks: Counter[int] = Counter()  # modules
_settings: dict[int, list[tuple[Any, Any, bool]]] = {}


@contextlib.contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a model sharded by fully_shard, so that each process has all of them.

    Inside the block a call of the model needs no other process: each may call it any number of
    times, with batches of any size. Outside it, every call of a sharded model involves all
    processes, and a process that makes more calls than the others waits for them until the timeout
    of the process group. `sample_to_shards`, and your own loops, need the block; adaptive solvers,
    `evaluate_bits_per_dim` and `extract_features` gather the weights themselves.

    All processes must enter the block together. It is for evaluation; the weights are sharded
    again at its end. For a model without sharded weights it does nothing. To sample from an
    average, enter `ema.applied(model)` first.

    Args:
        model: the model, or a network.

    Raises:
        ValueError: if the model is in FullyShardedDataParallel, the older wrapper.
        TypeError: if model is not a Module.

    >>> import torch
    >>> from torch import nn
    >>> from diffusionkit.distributed import gathered_weights
    >>> network = nn.Linear(1, 1)
    >>> with gathered_weights(network):
    ...     y = network(torch.ones(3, 1))
    """
    check_part(model, nn.Module, "model")
    modules = sharded_modules(model)
    with _lock, torch.inference_mode(False), torch.no_grad():
        if ranks_are_independent() and not all(id(module) in _blocks for module in modules):
            check_whole(model)
        for module in modules:
            _blocks[id(module)] += 1
            if _blocks[id(module)] == 1:
                _settings[id(module)] = _gather(module)
    try:
        yield
    finally:
        with _lock, torch.no_grad():
            for module in modules:
                _blocks[id(module)] -= 1
                if not _blocks[id(module)]:
                    del _blocks[id(module)]
                    _shard(module, _settings.pop(id(module)))


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that were passed to fully_shard."""
    if not is_distributed():
        return []
    found = []
    for module in model.modules():
        if is_fully_sharded(module):
            found.append(module)
        elif type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model: expected weights sharded by fully_shard, got FullyShardedDataParallel"
            )
    return found


def check_whole(model: nn.Module) -> None:
    """Raise if this process holds a part of a model that others do not call at the same time."""
    for module in model.modules():
        old = type(module).__name__ == "FullyShardedDataParallel"
        if old or any(is_sharded(x) for x in module._parameters.values()):
            raise ValueError(
                "model: expected all weights in each process, where processes call it "
                "independently, as inside `with gathered_weights(model):`, got weights sharded "
                "over processes"
            )


def _gather(module: Any) -> list[tuple[Any, Any, bool]]:
    """Gather the weights of one module permanently; return the settings that prevented it."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    settings = [(g, g.post_forward_mesh_info, g.reshard_after_backward) for g in groups]
    for group in groups:
        group.post_forward_mesh_info = None  # not sharded after forward
        group.reshard_after_backward = False
    module.unshard()
    return settings


def _shard(module: Any, settings: list[tuple[Any, Any, bool]]) -> None:
    state = module._get_fsdp_state()
    # The first call finds the root, which stays gathered after forward by default.
    stays = state._is_root and state._auto_reshard_after_forward
    for group, after_forward, after_backward in settings:
        group.post_forward_mesh_info = None if stays else after_forward
        group.reshard_after_backward = after_backward
    module.reshard()
