"""Modules without the wrappers that torch puts around networks: their names, tensors and copies."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# The submodule that torch.compile, activation checkpointing and Lightning Fabric wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_original_module")


def _wrapped(module: nn.Module) -> str | None:
    """Return the name of the submodule that a wrapper wraps, None for other modules."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return "module"
    return next((name for name in _WRAPPED if module._modules.get(name) is not None), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers such as torch.compile or DistributedDataParallel."""
    while (name := _wrapped(module)) is not None:
        module = cast(nn.Module, module._modules[name])
    return module


def casts_inputs(module: nn.Module) -> bool:
    """Whether a module, or a wrapper around it, may cast floating-point inputs.

    So do `fully_shard`, DistributedDataParallel with a mixed precision, and Lightning Fabric.
    """
    name: str | None = ""
    while name is not None:
        mixed = isinstance(module, DistributedDataParallel) and module.mixed_precision is not None
        if mixed or is_fully_sharded(module) or "_original_module" in module._modules:
            return True
        if (name := _wrapped(module)) is not None:
            module = cast(nn.Module, module._modules[name])
    return False


def bare_class(part: object) -> type:
    """Return the class of an object, without what fully_shard adds to that of a network."""
    kind = type(part)
    return kind.__bases__[-1] if "FSDP" in kind.__name__ and is_fully_sharded(part) else kind


def is_fully_sharded(part: object) -> bool:
    """Whether a module was passed to fully_shard."""
    return hasattr(type(part), "_get_fsdp_state")


def bare_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all modules in it, each with the prefix of its tensors' names.

    Wrappers are skipped, so the names are those of the unwrapped model. Weights sharded by
    fully_shard are brought back to their shards: a network that was only evaluated may still hold
    the gathered ones.
    """
    module = unwrapped(module)
    if is_fully_sharded(module):
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


def bare_state(module: nn.Module, *, keep_vars: bool = False) -> OrderedDict[str, Any]:
    """Return the state dict of a module under the names of the unwrapped module."""
    state, prefixes = module.state_dict(keep_vars=keep_vars), dict(_prefixes(module))
    bare = OrderedDict((_bare(name, prefixes), value) for name, value in state.items())
    # The versions of modules, by which torch reads states of earlier ones.
    versions = getattr(state, "_metadata", {})
    if found := {b[:-1]: versions[n[:-1]] for n, b in prefixes.items() if n[:-1] in versions}:
        bare._metadata = found  # type: ignore[attr-defined]
    return bare


def load_bare_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict with the names of the unwrapped module."""
    prefixes = dict(_prefixes(module))
    own = OrderedDict((name, state[_bare(name, prefixes)]) for name in module.state_dict())
    versions = getattr(state, "_metadata", {})
    if found := {n[:-1]: versions[b[:-1]] for n, b in prefixes.items() if b[:-1] in versions}:
        own._metadata = found  # type: ignore[attr-defined]
    module.load_state_dict(own)


def _prefixes(module: nn.Module, name: str = "", bare: str = "") -> Iterator[tuple[str, str]]:
    """Yield how names of the modules in a module begin, each with the beginning without wrappers.

    Some wrappers name their part in a state dict, and others leave it out.
    """
    yield name, bare
    if (part := _wrapped(module)) is not None:
        inner = cast(nn.Module, module._modules[part])
        yield from _prefixes(inner, name, bare)
        yield from _prefixes(inner, f"{name}{part}.", bare)
        return
    for part, child in module._modules.items():
        if child is not None:
            yield from _prefixes(child, f"{name}{part}.", f"{bare}{part}.")


def _bare(name: str, prefixes: Mapping[str, str]) -> str:
    start = name
    while start not in prefixes:  # the longest beginning that is a module
        start = start[: start[:-1].rfind(".") + 1]
    return prefixes[start] + name[len(start) :]


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
