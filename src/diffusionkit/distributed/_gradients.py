"""Gradients that DistributedDataParallel averages over processes, if it is called."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ._group import is_distributed, rank_and_world_size

_averaged: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models once found to be right


def check_gradients_averaged(model: nn.Module) -> None:
    """Raise if a model calls a network around the DistributedDataParallel that trains it.

    Gradients would silently stay those of each process: they are averaged only if the wrapper was
    called. A model is searched once, in the first call with gradients.

    Raises:
        ValueError: if parameters that need gradients are those of a wrapper that is not in the
            model, and not being called.
    """
    if (
        not is_distributed()
        or torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or rank_and_world_size()[1] == 1
        or model in _averaged
    ):
        return
    if _is_called_around(model):
        gc.collect()  # a wrapper that nobody holds any more
        if _is_called_around(model):
            raise ValueError(
                "model: expected the network in its DistributedDataParallel, got the bare network, "
                "whose gradients are not averaged over the processes; use "
                "EpsModel(DistributedDataParallel(network), sde), not EpsModel(ddp.module, sde) or "
                "DistributedDataParallel(model).module; evaluate it inside torch.no_grad()"
            )
    _averaged.add(model)


def _is_called_around(model: nn.Module) -> bool:
    inside = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    wrapper_class: Any = DistributedDataParallel
    if (active := wrapper_class._get_active_ddp_module()) is not None:
        inside.append(active)
    averaged = {id(p) for wrapper in inside for p in wrapper.parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad} - averaged
    # Parameters have no reference to their wrapper.
    wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    return any(
        id(p) in trained
        for wrapper in wrappers
        if not wrapper._use_python_reducer  # it averages whatever was called
        for p in wrapper.parameters()
    )
