"""The states of random generators by rank, validated before any of them is set."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_part

_KEYS = 624  # of the Mersenne twister
_CUDA_BYTES = 16
_GLOBAL = ("python", "numpy", "torch", "cuda")


def own_random_states(generators: Mapping[str, torch.Generator] | None = None) -> dict[str, Any]:
    """Return the states of this process's generators: Python's, numpy's, torch's and some of yours.

    The first state of CUDA is that of the current device, which is the one that a rank uses.

    Args:
        generators: further generators of torch, by name.

    Raises:
        ValueError: if numpy's is of another kind than its default.
    """
    state: Any = np.random.get_state()
    if not isinstance(state, tuple) or state[0] != "MT19937":
        raise ValueError(
            "numpy: expected its global generator to be MT19937, the default, got "
            f"{state['bit_generator'] if isinstance(state, dict) else state[0]}"
        )
    _, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _cuda_devices()],
        "generators": {name: g.get_state() for name, g in (generators or {}).items()},
    }


def _cuda_devices() -> list[int]:
    """Return the numbers of the CUDA devices, the current one first."""
    if not torch.cuda.is_available():
        return []
    current, count = torch.cuda.current_device(), torch.cuda.device_count()
    return [current, *(device for device in range(count) if device != current)]


def saved_states(
    gathered: Any, generators: Mapping[str, torch.Generator], rank: int, world_size: int
) -> dict[str, Any]:
    """Return what a checkpoint stores of random generators, by part and rank.

    Args:
        gathered: the states of all ranks by `gather_random_states`, None for this process's alone.
        generators: further generators of torch, by name.
        rank: the rank of this process.
        world_size: the number of processes.

    Raises:
        ValueError: if the states are of another number of ranks, or cannot be set.
        TypeError: if they are no list of states.
    """
    own = own_random_states(generators)
    everyone = {rank: own}
    if gathered is not None:
        _check_gathered(gathered, world_size)
        everyone = dict(enumerate(gathered))
    named = {name: {rank: state} for name, state in own["generators"].items()}
    for number, states in everyone.items():
        for name in named.keys() & states["generators"].keys():
            named[name][number] = states["generators"][name]
    return {
        "world_size": world_size,
        "random": {r: {name: s[name] for name in _GLOBAL} for r, s in everyone.items()},
        "generators": named,
    }


def _check_gathered(gathered: Any, world_size: int) -> None:
    keys = {*_GLOBAL, "generators"}
    if not isinstance(gathered, (list, tuple)) or not all(
        isinstance(states, Mapping) and states.keys() == keys for states in gathered
    ):
        raise TypeError(
            "random_states: expected those of gather_random_states, a list of states by rank, "
            f"got {gathered!r:.80}"
        )
    if len(gathered) != world_size:
        raise ValueError(f"random_states: expected {world_size} ranks, got {len(gathered)}")


def check_by_rank(world_size: int, by_rank: Any, name: str) -> None:
    """Raise a ValueError unless states in a file belong to ranks, at least to one."""
    ranks = list(by_rank) if isinstance(by_rank, Mapping) else []
    if not ranks or not all(type(rank) is int and 0 <= rank < world_size for rank in ranks):
        raise ValueError(
            f"{name}: expected states of ranks below {world_size}, got {ranks[:8] or 'none'}"
        )


def check_random_states(states: Any) -> None:
    """Raise a ValueError unless all states can be set and drawn from."""
    if not isinstance(states, Mapping):
        raise ValueError(f"random: expected states by name, got {type(states).__name__}")
    if set(states) != set(_GLOBAL):
        raise ValueError(f"random: expected {', '.join(_GLOBAL)}, got {sorted(map(str, states))}")
    _check_python(states["python"])
    _check_numpy(states["numpy"])
    check_torch_state(states["torch"], torch.Generator(), "random['torch']")
    cuda = states["cuda"]
    if not isinstance(cuda, list):
        raise ValueError(f"random['cuda']: expected a list, got {type(cuda).__name__}")
    for number, state in enumerate(cuda):
        _check_bytes(state, _CUDA_BYTES, f"random['cuda'][{number}]")


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the global generators."""
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in zip(_cuda_devices(), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)


def seeds_of(seed: int, rank: int) -> tuple[int, list[int], int]:
    """Return seeds for Python, numpy and torch; those of two ranks differ.

    Args:
        seed: an integer in [0, 2^128).
        rank: the rank.
    """
    words = np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(9).tolist()
    # Of a seed torch's generator on the CPU uses 32 bits alone: an odd multiple of the rank, added
    # to a number that all ranks share, makes them differ for certain.
    shared = int(np.random.SeedSequence(seed).generate_state(1)[0])
    low = (shared + 0x9E3779B1 * rank) % 2**32
    python = sum(word << 32 * place for place, word in enumerate(words[:4]))
    return python, [*words[4:8], rank], (words[8] << 32 | low) % 2**63


def fresh_states(seed: int, rank: int) -> dict[str, Any]:
    """Return states that `seeds_of` a rank leave, without setting them."""
    python, words, number = seeds_of(seed, rank)
    _, keys, position, has_gauss, gauss = np.random.RandomState(words).get_state(legacy=True)
    return {
        "python": random.Random(python).getstate(),
        "numpy": (np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.Generator().manual_seed(number).get_state(),
        "cuda": [
            torch.Generator(f"cuda:{device}").manual_seed(number).get_state()
            for device in _cuda_devices()
        ],
    }


def states_for(rank: int, step: int, by_rank: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states of a rank in a file: its own, or new ones if the file has none of it.

    New ones are a function of the file, the step and the rank, and those of two ranks differ.

    Args:
        rank: the rank of this process.
        step: the number of steps taken.
        by_rank: the states in the file by rank.

    Raises:
        ValueError: if states in the file cannot be set.
    """
    source = rank if rank in by_rank else min(by_rank)
    check_random_states(by_rank[source])
    states = dict(by_rank[source])
    digest = hashlib.blake2b(repr((step, states["python"], states["numpy"])).encode())
    for state in (states["torch"], *states["cuda"]):
        digest.update(state.cpu().numpy().tobytes())
    fresh = fresh_states(int.from_bytes(digest.digest()[:16]), rank)
    if source != rank:
        return fresh
    # A file of a machine without CUDA has no states for it, and its default is one for all ranks.
    return states if states["cuda"] else states | {"cuda": fresh["cuda"]}


def state_for(
    rank: int, step: int, by_rank: Mapping[int, Any], generator: torch.Generator, name: str
) -> Tensor:
    """Return the state of one generator of torch for a rank, as `states_for` does.

    A rank that the file has no state of shares the generator of the others if it has their seed.

    Args:
        rank: the rank of this process.
        step: the number of steps taken.
        by_rank: the states in the file by rank.
        generator: the generator as it is now.
        name: the name of the generator, for the error.

    Raises:
        ValueError: if the state in the file cannot be set.
    """
    source = rank if rank in by_rank else min(by_rank)
    scratch = torch.Generator(generator.device)
    check_torch_state(by_rank[source], scratch, name)
    state: Tensor = by_rank[source].cpu()
    scratch.set_state(state)
    if source == rank or scratch.initial_seed() == generator.initial_seed():
        return state
    content = repr((step, name)).encode() + state.numpy().tobytes()
    seed = int.from_bytes(hashlib.blake2b(content, digest_size=16).digest())
    return scratch.manual_seed(seeds_of(seed, rank)[-1]).get_state()


def check_generators(generators: object) -> None:
    """Raise a TypeError unless generators are a mapping from names to generators of torch."""
    if generators is None:
        return
    if not isinstance(generators, Mapping) or not all(isinstance(key, str) for key in generators):
        got = (
            f"keys {list(generators)}"
            if isinstance(generators, Mapping)
            else type(generators).__name__
        )
        raise TypeError(f"generators: expected a mapping by names, got {got}")
    for name, generator in generators.items():
        check_part(generator, torch.Generator, f"generators[{name!r}]")


def check_torch_state(state: Any, scratch: torch.Generator, name: str) -> None:
    """Raise a ValueError unless a generator of torch takes a state and draws finite numbers.

    Args:
        state: the state.
        scratch: a generator of the same device, which is changed.
        name: the name of the state, for the error.
    """
    _check_bytes(state, scratch.get_state().numel(), name)
    try:
        scratch.set_state(state.cpu())
        # A state holds a number of the normal distribution that is still to be drawn.
        drawn = [
            torch.randn(3, generator=scratch, device=scratch.device, dtype=dtype).isfinite().all()
            for dtype in (torch.float32, torch.float64)
        ]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected the state of a generator, got {error}") from error
    if not all(map(bool, drawn)):
        raise ValueError(f"{name}: expected the state of a generator, got one that draws NaN")


def _check_bytes(state: Any, count: int, name: str) -> None:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.shape != (count,):
        got = (
            f"{state.dtype} of shape {tuple(state.shape)}"
            if isinstance(state, Tensor)
            else type(state).__name__
        )
        raise ValueError(f"{name}: expected a tensor of {count} bytes, got {got}")


def _check_python(state: Any) -> None:
    parts = state if isinstance(state, tuple) and len(state) == 3 else (None, None, None)
    version, numbers, gauss = parts
    if (
        version != 3
        or not isinstance(numbers, tuple)
        or len(numbers) != _KEYS + 1
        or not _are_keys(numbers[:-1])
        or not _is_within(numbers[-1], _KEYS)
        or not (gauss is None or (type(gauss) is float and math.isfinite(gauss)))
    ):
        raise ValueError(
            f"random['python']: expected the state of random.getstate(), {_KEYS} keys in "
            f"[0, 2^32), a position in [0, {_KEYS}] and a finite number or None, got others"
        )


def _check_numpy(state: Any) -> None:
    parts = state if isinstance(state, tuple) and len(state) == 4 else (None, None, None, None)
    keys, position, has_gauss, gauss = parts
    if (
        not isinstance(keys, list)
        or len(keys) != _KEYS
        or not _are_keys(keys)
        or not _is_within(position, _KEYS)
        or not _is_within(has_gauss, 1)
        or not (type(gauss) is float and math.isfinite(gauss))
    ):
        raise ValueError(
            f"random['numpy']: expected {_KEYS} keys in [0, 2^32), a position in [0, {_KEYS}], "
            "0 or 1 and a finite number, got others"
        )


def _are_keys(numbers: Any) -> bool:
    return all(_is_within(number, 2**32 - 1) for number in numbers) and any(numbers)


def _is_within(number: Any, most: int) -> bool:
    return type(number) is int and 0 <= number <= most
