"""What the runs have in common: processes, small networks with seeded weights, and data."""

import torch

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    GaussianMixtureModel,
    RawScoreModel,
    ScaledScoreModel,
    SMLDChain,
    SubVPSDE,
    VModel,
    X0Model,
)
from diffusionkit.networks import MLP

PROCESSES = {
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(sigma_min=0.02, sigma_max=20.0),
    "edm": EDMSDE(sigma_min=0.01, sigma_max=20.0),
    "ddpm": DDPMChain.linear(50),
    "smld": SMLDChain.geometric(50, sigma_min=0.02, sigma_max=20.0),
}
MODELS = {
    "eps": EpsModel,
    "x0": X0Model,
    "v": VModel,
    "raw": RawScoreModel,
    "scaled": ScaledScoreModel,
    "edm": EDMModel,
}
LEARNED = ("learned", "learned_range")


def seeded(seed=0):
    """Return a generator."""
    return torch.Generator().manual_seed(seed)


def several(n):
    """Return a generator for each of n samples."""
    return [seeded(100 + i) for i in range(n)]


def randn(*shape, seed=1, dtype=torch.float32):
    """Return normal numbers that depend on the shape and the seed alone."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def randint(high, *shape, seed=1):
    """Return integers that depend on the shape and the seed alone."""
    return torch.randint(high, shape, generator=seeded(seed))


def fill(module, std=0.3, seed=7):
    """Give every parameter a size at which no part of the module is negligible."""
    generator = seeded(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return module


def flat(tensors):
    """Return all numbers of several tensors in one vector."""
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def network(features=2, **options):
    """Return a small network of vectors, none of whose parts is negligible."""
    return fill(MLP(features, width=8, depth=1, **options))


def model_on(process, kind="eps", features=2, **options):
    """Return a model with a small network of vectors, on a process of the table."""
    out = 2 * features if options.get("variance") in LEARNED else features
    return MODELS[kind](network(features, out_features=out), PROCESSES[process], **options)


def mixture_on(process, dims=2):
    """Return the exact model of two unlike Gaussians, on a process of the table."""
    means = torch.linspace(-1.0, 1.0, 2 * dims).reshape(2, dims).flip(1)
    return GaussianMixtureModel(PROCESSES[process], means, [0.2, 0.3], [0.3, 0.7])


def times(sde, n, dtype=torch.float32):
    """Return n times within the process, on the steps of a chain."""
    step = torch.linspace(0.04, 1.0, n, dtype=torch.float64).mul(50).round() / 50
    return (sde.T * step).to(dtype)
