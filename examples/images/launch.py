"""Join the processes that torchrun started, and spread a network over them."""

import contextlib
import gc
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from diffusionkit.networks.unet import Stage


@dataclass(frozen=True)
class Place:
    """The place of this process among all of a run.

    Args:
        rank: the number of this process.
        world_size: the number of processes.
        device: the device of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; all must call this."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


@contextlib.contextmanager
def launched(minutes: float = 10) -> Iterator[Place]:
    """Join the process group if torchrun started this process, and leave it at the end.

    Without torchrun there is one process. A GPU is used if there is one for each process of this
    machine; processes on GPUs communicate by NCCL, those on CPUs by gloo.

    Args:
        minutes: how long a process waits for another one that does not respond.
    """
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= here:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    joins = "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized()
    if joins:
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=minutes)
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps one store when it starts processes again: without names of their own they
        # may find the addresses of the ones before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"attempt-{attempt}-of-{world_size}", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    alone = not dist.is_initialized()
    yield Place(0, 1, device) if alone else Place(dist.get_rank(), dist.get_world_size(), device)
    if joins:  # after an error the others are not waited for
        # A DDP module that is freed after its group may wait forever: torch then joins the group's
        # threads while it holds the interpreter's lock, which they may need.
        gc.collect()
        dist.destroy_process_group()


def spread(network: nn.Module, place: Place, *, shard: bool, compile: bool) -> nn.Module:
    """Return a network whose gradients are means over all processes.

    Args:
        network: the network, on the device of this process, equal in all processes.
        place: the place of this process.
        shard: whether each process holds a part of the weights (FSDP2), instead of all (DDP).
        compile: whether the network is compiled.
    """
    if shard:
        from torch.distributed.fsdp import fully_shard

        for stage in [module for module in network.modules() if isinstance(module, Stage)]:
            fully_shard(stage)
        fully_shard(network)
    if compile:
        network.compile()
    learns = any(parameter.requires_grad for parameter in network.parameters())
    if learns and not shard and place.world_size > 1:
        ids = None if place.device.type == "cpu" else [place.device.index]
        # Buffers are tables, which no process changes. Older torch has another name for the option.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings: dict[str, Any] = {"device_ids": ids, option: False}
        network = DistributedDataParallel(network, **settings)
    return network


@contextlib.contextmanager
def accumulated(network: Any, *, last: bool) -> Iterator[None]:
    """Add up gradients in each process; only after the last micro-batch are they averaged."""
    if isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
        return
    if hasattr(network, "set_requires_gradient_sync"):  # fully_shard
        network.set_requires_gradient_sync(last)
        network.set_is_last_backward(last)
    yield


def average_gradients(parameters: list[nn.Parameter], place: Place) -> None:
    """Average the gradients of parameters outside the network over all processes."""
    if place.world_size > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= place.world_size
