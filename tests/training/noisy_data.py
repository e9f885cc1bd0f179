"""Noisy data made to order, for the tests of the stable target."""

import torch

from diffusionkit import Perturbed


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(x0, x, alpha, sigma) -> Perturbed:
    """What made x out of x0, in the dtype of x0."""
    a, s = (
        torch.as_tensor(c, dtype=torch.float64).expand(len(x0)).view(-1, *(1,) * (x0.ndim - 1))
        for c in (alpha, sigma)
    )
    eps = ((x.double() - a * x0.double()) / s).to(x0.dtype)
    return Perturbed(x0, eps, x, torch.full_like(a.flatten(), 0.5), a.flatten(), s.flatten())


def direct(sample: Perturbed, reference: torch.Tensor) -> torch.Tensor:
    """The mean in x0 by its definition, with scaled differences from the source, float64."""
    x0, eps, data = (v.double().flatten(1) for v in (sample.x0, sample.eps, reference))
    u = (sample.alpha / sample.sigma).double().view(-1, 1, 1) * (x0[:, None] - data)
    logits = -(u.square() / 2 + u * eps[:, None]).sum(2)
    return (torch.softmax(logits, 1) @ data).view_as(sample.x0)
