"""Modules without the wrappers that torch puts around networks: their names, tensors and copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# The submodule that torch.compile, activation checkpointing and Lightning Fabric wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_original_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers such as torch.compile or DistributedDataParallel."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return unwrapped(module.module)
    for name in _WRAPPED:
        if (inner := module._modules.get(name)) is not None:
            return unwrapped(inner)
    return module


def bare_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all modules in it, each with the prefix of its tensors' names.

    Wrappers are skipped, so the names are those of the unwrapped model. Weights sharded by
    fully_shard are brought back to their shards: a network that was only evaluated may still hold
    the gathered ones.
    """
    module = unwrapped(module)
    if hasattr(type(module), "_get_fsdp_state"):
        cast(Any, module).reshard()
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from bare_modules(child, f"{prefix}{name}.")


def bare_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name, tied ones under each of theirs."""
    return {
        prefix + name: tensor
        for prefix, module in bare_modules(model)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def bare_copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of an unwrapped model that holds other tensors, given by name.

    Raises:
        Exception: of many types, if the model cannot be copied.
    """
    memo: dict[int, object] = {id(x): tensors[name] for name, x in bare_tensors(model).items()}
    for module in reversed(list(model.modules())):  # the inner ones first
        if (inner := unwrapped(module)) is not module:
            memo[id(module)] = copy.deepcopy(inner, memo)
    return copy.deepcopy(unwrapped(model), memo)
