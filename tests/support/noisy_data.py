"""Noisy data of given states, for tests of the stable target."""

import torch

from diffusionkit import Perturbed


def noisy(x0, x, alpha, sigma) -> Perturbed:
    """The Perturbed with data x0 and state x, with its noise in the dtype of x0."""
    a, s = (
        torch.as_tensor(c, dtype=torch.float64).expand(len(x0)).view(-1, *(1,) * (x0.ndim - 1))
        for c in (alpha, sigma)
    )
    eps = ((x.double() - a * x0.double()) / s).to(x0.dtype)
    return Perturbed(x0, eps, x, torch.full_like(a.flatten(), 0.5), a.flatten(), s.flatten())


def direct(sample: Perturbed, reference: torch.Tensor) -> torch.Tensor:
    """The target's x0 by its definition, from differences to the source, in float64."""
    x0, eps, data = (v.double().flatten(1) for v in (sample.x0, sample.eps, reference))
    u = (sample.alpha / sample.sigma).double().view(-1, 1, 1) * (x0[:, None] - data)
    logits = -(u.square() / 2 + u * eps[:, None]).sum(2)
    return (torch.softmax(logits, 1) @ data).view_as(sample.x0)
