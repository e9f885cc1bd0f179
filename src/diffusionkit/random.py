"""Random draws for your own parts: with one generator, one for each sample, or a Brownian path.

`torch.randn(..., generator=generator)` takes one generator only. Draws of this module take every
`generator` of the library, so that a part that uses them works with one generator for each sample,
and with a `BrownianPath` if its steps use `step_noise`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ._checks import (
    check_count,
    check_finite,
    check_floating_dtype,
    check_same,
    check_sequence,
    check_state,
    check_target_device,
)

__all__ = ["Generators", "NoisePath", "rand", "randn", "randn_like", "seeded", "step_noise"]

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def check_generator(generator: Generators, batch: int) -> None:
    """Raise unless `generator` is a generator, a sequence of `batch` generators, or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, Sequence) or not all(
        isinstance(one, torch.Generator) for one in generator
    ):
        raise TypeError(
            "generator: expected a torch.Generator, a sequence of them (one for each sample) "
            f"or None, got {type(generator).__name__}{_seed_advice(generator)}"
        )
    if len(generator) != batch:
        raise ValueError(
            f"generator: expected one generator for each of the {batch} samples, "
            f"got {len(generator)}"
        )


def _seed_advice(generator: object) -> str:
    """Return the line to write for a seed, "; ..." or ""."""
    if not isinstance(generator, int) or isinstance(generator, bool):
        return ""
    return f"; pass generator=torch.Generator().manual_seed({generator!r:.20})"


def draw(
    sampler: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return what a function of torch draws, for arguments that are validated."""
    if generator is None:
        return sampler(shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        # A CPU generator serves every device, so that one seed gives one sample everywhere.
        return sampler(shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    check_generator(generator, shape[0])
    rows = [sampler(shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(rows).to(device)


def randn(
    shape: Sequence[int],
    *,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw standard normal noise of a shape (B, *D)."""
    check_floating_dtype(dtype)
    check_target_device(device)
    return draw(torch.randn, _sizes(shape), generator, device, dtype)


def given_noise(x0: Tensor, eps: Tensor) -> Tensor:
    """Return noise that was passed for data x0 (B, *D), or raise unless it is like them."""
    check_state(eps, "eps")
    check_same(eps, x0, "eps", "x0")
    check_finite(eps, "eps")
    return eps


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of x (B, *D)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {got}")
    if generator is None:
        return torch.randn_like(x, memory_format=torch.contiguous_format)
    return draw(torch.randn, x.shape, generator, x.device, x.dtype)


def _sizes(shape: Sequence[int]) -> Sequence[int]:
    """Return a shape, or raise unless it consists of integers >= 0."""
    if not isinstance(shape, (tuple, list)):  # torch.Size is a tuple
        check_sequence(shape, "shape")
    for n in shape:
        check_count(n, "shape", least=0, most=2**40)
    return shape


class NoisePath(Sequence[torch.Generator], abc.ABC):
    """One generator for each sample, and the noise between any two times along a path."""

    @abc.abstractmethod
    def increment(self, x: Tensor, sde: Any, t: Tensor, s: Tensor) -> Tensor:
        """Return standard normal noise for the step from times t (B,) to s (B,), like x."""


class ObservedPath(NoisePath):
    """A path that records whether an increment was drawn from it.

    Args:
        path: the path.

    Attributes:
        used: whether an increment was drawn.
    """

    def __init__(self, path: NoisePath) -> None:
        self._path, self.used = path, False

    @override
    def __len__(self) -> int:
        return len(self._path)

    @override
    def __getitem__(self, index: Any) -> Any:
        return self._path[index]

    @override
    def increment(self, x: Tensor, sde: Any, t: Tensor, s: Tensor) -> Tensor:
        self.used = True
        return self._path.increment(x, sde, t, s)


def step_noise(
    x: Tensor, sde: Any, t: Tensor, s: Tensor, *, generator: Generators = None
) -> Tensor:
    """Return standard normal noise for a predictor's step from times t (B,) to s (B,), like x.

    New noise, unless the generator is a path, such as `BrownianPath`: then the path's increment.

    Args:
        x: a state (B, *D), for the shape, dtype and device.
        sde: the forward process, whose log-SNR is the clock of a path.
        t: the times at the beginning of the step (B,).
        s: the times at its end (B,).
        generator: one generator, one for each sample, a path, or None.
    """
    if generator is not None and isinstance(generator, NoisePath):
        return generator.increment(x, sde, t, s)
    return randn_like(x, generator)


def rand(
    shape: int | Sequence[int],
    *,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw numbers uniform on [0, 1), n of them or a shape (B, *D)."""
    check_floating_dtype(dtype)
    check_target_device(device)
    sizes = (shape,) if isinstance(shape, int) else shape
    return draw(torch.rand, _sizes(sizes), generator, device, dtype)


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator seeded by integers >= 0, such as a seed and the number of a sample.

    Seeds that are sums or products of the integers would collide. Those of different integers,
    equally many, are 32-bit numbers, since torch uses no more of a seed on the CPU: they are equal
    with probability 2^-32, so that of 50,000 samples some two are equal once in four runs.

    Raises:
        ValueError: if there is no integer, or one is negative or above 2^63 - 1.
        TypeError: if one is not an integer.

    >>> from diffusionkit.random import randn, seeded
    >>> generators = [seeded(0, number) for number in (5, 6)]
    >>> randn((2, 3), generator=generators).shape
    torch.Size([2, 3])
    """
    if not numbers:
        raise ValueError("numbers: expected integers, got none")
    for number in numbers:
        check_count(number, "numbers", least=0, most=2**63 - 1)
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
