"""Putting together what the processes of torch.distributed have found."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def gathered(x: Tensor) -> Tensor:
    """Return the rows (n, ...) of all processes, in the order of their ranks; n may differ.

    Without torch.distributed these are the process's own.
    """
    if not (dist.is_available() and dist.is_initialized()):
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
