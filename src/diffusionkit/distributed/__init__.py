"""Training in several processes: seeds, random states, agreement of the ranks.

Every function also works without a process group, as rank 0 of one. They exchange small values
only, on the device of the backend: NCCL takes the current one, so call ``torch.cuda.set_device``
in each process first.
"""

from __future__ import annotations

from .. import _requirements as _requirements  # also where `__init__` is another project's
from ._group import any_rank, broadcast_object
from .gathered import gathered_weights
from .same_weights import check_same_weights
from .seeds import gather_random_states, seed_ranks

__all__ = [
    "any_rank",
    "broadcast_object",
    "check_same_weights",
    "gather_random_states",
    "gathered_weights",
    "seed_ranks",
]
