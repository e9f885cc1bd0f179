"""Accurate Gaussian log-densities, tail probabilities and divergences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._precision import at_least_float32
from ._schedules import exact


def normal_log_prob(x: Tensor, std: float) -> Tensor:
    """Return the log-density of N(0, std^2 I) at x (B, *D), in nats, (B,), at least in float32."""
    flat = exact(x).flatten(1) if x.ndim > 1 else exact(x).unsqueeze(1)
    constant = flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(std))
    return (-0.5 * (flat / std).square().sum(1) - constant).to(at_least_float32(x).dtype)


def log_normal_cdf(z: Tensor) -> Tensor:
    """Return log Phi(z), with an accurate value and gradient arbitrarily far in the tails.

    The gradient of torch.special.log_ndtr is the exponential of a difference of large numbers.
    """
    low, high = z.clamp_max(0.0), z.clamp_min(0.0)
    tail = torch.log(0.5 * torch.special.erfcx(low * -math.sqrt(0.5))) - 0.5 * low.square()
    return torch.where(z < 0, tail, torch.log1p(-0.5 * torch.erfc(high * math.sqrt(0.5))))


def log_mass(offset: Tensor, half: float, scale: Tensor) -> Tensor:
    """Return log(Phi((offset + half) scale) - Phi((offset - half) scale))."""
    distance, width = offset.abs() * scale, 2 * half * scale
    # In the negative tail, where both values of Phi are accurate.
    top = log_normal_cdf(0.5 * width - distance)
    gap = top - log_normal_cdf(-0.5 * width - distance)
    # In narrow bins the gap loses digits; the Taylor expansion of the density does not.
    density = torch.log(width) - 0.5 * distance.square() - 0.5 * math.log(2 * math.pi)
    density = density + width.square() * (distance.square() - 1) / 24
    return torch.where(width < 1e-2, density, top + torch.log(-torch.expm1(-gap.clamp_min(1e-3))))


def gaussian_kl(difference: Tensor, log_var_q: Tensor, log_var_p: Tensor) -> Tensor:
    r"""Return KL(N(m + difference, v_q) || N(m, v_p)) elementwise, in nats.

    .. math::
        \tfrac12 (v_q / v_p - 1 - \log(v_q / v_p) + \mathrm{difference}^2 / v_p)
    """
    ratio = log_var_q - log_var_p
    return 0.5 * (torch.expm1(ratio) - ratio + difference.square() * torch.exp(-log_var_p))
