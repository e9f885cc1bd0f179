"""Helpers that several test files share: `from support import seeded`."""

import torch


def f64(*values: object) -> torch.Tensor:
    """Return a float64 tensor of values."""
    return torch.tensor(values, dtype=torch.float64)


def full(value: float, n: int) -> torch.Tensor:
    """Return a float64 tensor (n,) of one value."""
    return torch.full((n,), value, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)
