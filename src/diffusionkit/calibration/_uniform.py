"""Tests of uniform numbers: the Kolmogorov-Smirnov test, and bands of binomial counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TERMS = 100


def uniform_p_value(u: Tensor) -> Tensor:
    r"""Return the p-values (*D) of the Kolmogorov-Smirnov test that u (n, *D) is uniform.

    .. math::
        p = 2 \sum_{k \ge 1} (-1)^{k - 1} e^{-2 k^2 \lambda^2}, \quad
        \lambda = (\sqrt n + .12 + .11 / \sqrt n) \max |F_n - F|

    Source: Stephens, Use of the Kolmogorov-Smirnov, Cramer-von Mises and related statistics
    without extensive tables, 1970.
    """
    n = len(u)
    u = u.sort(0).values.double()
    steps = torch.arange(n + 1, dtype=u.dtype, device=u.device) / n
    steps = steps.view(-1, *(1,) * (u.ndim - 1))
    largest = torch.maximum(u - steps[:-1], steps[1:] - u).amax(0)
    scaled = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * largest
    k = torch.arange(1, _TERMS + 1, dtype=u.dtype, device=u.device)
    k = k.view(-1, *(1,) * scaled.ndim)
    series = 2 * (torch.where(k % 2 == 1, 1.0, -1.0) * torch.exp(-2 * (k * scaled) ** 2)).sum(0)
    # Below, the series converges slowly, and p differs from 1 by less than 1e-9.
    return torch.where(scaled < 0.2, 1.0, series.clamp(0.0, 1.0))


def binomial_band(n: int, p: float, level: float) -> tuple[int, int]:
    """Return the least and largest count of n draws with probability p, with a probability level.

    Counts below the first, and above the second, have a probability of at most (1 - level) / 2.
    """
    k = torch.arange(n + 1, dtype=torch.float64)
    if p >= 1.0:
        return n, n
    choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    mass = torch.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p))
    tail = 0.5 * (1 - level)
    low = int((mass.cumsum(0) <= tail).sum())
    high = n - int((mass.flip(0).cumsum(0) <= tail).sum())
    return low, high
