"""Random numbers that differ between ranks, from their first seeds to the end of a resumed run."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .._checks import check_count
from ._group import gather_objects, rank_and_world_size
from ._random_states import check_generators, own_random_states, seeds_of


def seed_ranks(seed: int) -> None:
    """Seed the global generators of Python, numpy, torch and all devices, differently on each rank.

    The seeds are a function of seed and rank, and no two ranks have the same. With one seed for
    all, as after ``torch.manual_seed(0)`` everywhere, ranks would draw the same times and the same
    noise, and their gradients would average nothing.

    Build the model first, from one seed for all ranks: `fully_shard` does not make weights equal,
    and no wrapper does so for all buffers. `check_same_weights` checks whether they are equal.

    Args:
        seed: the seed, in [0, 2^63).

    Raises:
        ValueError: if seed is out of range.
        TypeError: if seed is not an integer.

    >>> from diffusionkit.distributed import seed_ranks
    >>> seed_ranks(0)
    """
    check_count(seed, "seed", least=0, most=2**63 - 1)
    rank, _ = rank_and_world_size()
    python, words, number = seeds_of(seed, rank)
    random.seed(python)
    np.random.seed(words)
    torch.manual_seed(number)


def gather_random_states(
    generators: Mapping[str, torch.Generator] | None = None,
) -> list[dict[str, Any]]:
    """Return the states of the global random generators of every rank, for `save_checkpoint`.

    All processes must call this; the result is some ten kilobytes per rank. A checkpoint that holds
    them resumes every rank with its own noise, bit for bit at the same number of ranks.

    Args:
        generators: the torch generators of your loop, by name, that differ between ranks.

    Raises:
        ValueError: if numpy's global generator is of another kind than its default.
        TypeError: if a generator has the wrong type.

    >>> from diffusionkit.distributed import gather_random_states
    >>> len(gather_random_states())  # the number of processes
    1
    """
    check_generators(generators)
    return gather_objects(own_random_states(generators))
