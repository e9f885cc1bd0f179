"""The states of the global random generators, validated before any of them is set."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KEYS = 624  # of the Mersenne twister
_CUDA_BYTES = 16


def random_states() -> dict[str, Any]:
    """Return the states of the generators of Python, numpy and torch.

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
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def check_random_states(states: Mapping[str, Any]) -> None:
    """Raise a ValueError unless all states can be set and drawn from."""
    if set(states) != {"python", "numpy", "torch", "cuda"}:
        raise ValueError(f"random: expected python, numpy, torch, cuda, got {sorted(states)}")
    _check_python(states["python"])
    _check_numpy(states["numpy"])
    check_torch_state(states["torch"], torch.Generator(), "random['torch']")
    cuda = states["cuda"]
    if not isinstance(cuda, list):
        raise ValueError(f"random['cuda']: expected a list, got {type(cuda).__name__}")
    for number, state in enumerate(cuda):
        _check_bytes(state, _CUDA_BYTES, f"random['cuda'][{number}]")


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the generators; those of CUDA devices if there are as many as there were."""
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


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
