"""Layers of normalizing flows."""

import torch

from diffusionkit.likelihood.flow.logistic_coupling import LogisticCoupling
from support import seeded


def coupling(dims: int, channels: int, parity: int = 0, heads: int = 2) -> LogisticCoupling:
    return LogisticCoupling(
        dims, channels, 2, parity=parity, components=3, width=8, blocks=1, heads=heads
    )


def perturbed(module: torch.nn.Module, scale: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Return the module in float64 with perturbed parameters."""
    module.double()
    generator = seeded(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += scale * noise
    return module
