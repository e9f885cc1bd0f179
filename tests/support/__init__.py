"""Helpers that several test files share: `from support import seeded`."""

import torch


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)
