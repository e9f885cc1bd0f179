"""Normal and uniform draws from one generator, from one generator for each sample, or from none."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

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
            f"or None, got {type(generator).__name__}"
        )
    if len(generator) != batch:
        raise ValueError(
            f"generator: expected one generator for each of the {batch} samples, "
            f"got {len(generator)}"
        )


def _draw(
    sampler: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
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
    return _draw(torch.randn, shape, generator, device, dtype)


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of x (B, *D)."""
    if generator is None:
        return torch.randn_like(x, memory_format=torch.contiguous_format)
    return _draw(torch.randn, x.shape, generator, x.device, x.dtype)


class NoisePath(Sequence[torch.Generator], abc.ABC):
    """Generators, one for each sample, that also know the noise of a move between two times."""

    @abc.abstractmethod
    def increment(self, x: Tensor, sde: Any, t: Tensor, s: Tensor) -> Tensor:
        """Return the noise of a move from times t (B,) to s (B,), standard normal, like x."""


def increment_like(x: Tensor, generator: Generators, sde: Any, t: Tensor, s: Tensor) -> Tensor:
    """Return the standard normal noise of a predictor's move from times t (B,) to s (B,), like x.

    New noise, unless `generator` is a path: then its increment over the move.
    """
    if isinstance(generator, NoisePath):
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
    sizes = (shape,) if isinstance(shape, int) else shape
    return _draw(torch.rand, sizes, generator, device, dtype)


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator whose numbers are those of a tuple of whole numbers >= 0, and no other's.

    Seeds that are sums or products of such numbers would meet.
    """
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
