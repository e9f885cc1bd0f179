"""Strata of a uniform variable: of equal widths, or narrower where the integrand is noisier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._control_variates import squared_noise

# The share of density that does not depend on the measured noise, which is itself uncertain.
_UNIFORM = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Strata:
    """Strata of [0, 1] for each sample, with one draw each.

    Args:
        edges: their ends (n + 1, B), increasing from 0 to 1.
    """

    edges: Tensor

    @classmethod
    def equal(cls, count: int, like: Tensor) -> Strata:
        """Return strata of equal widths for the samples of a tensor (B,)."""
        ends = torch.arange(count + 1, device=like.device, dtype=like.dtype) / count
        return cls(ends.unsqueeze(1).expand(-1, len(like)))

    @classmethod
    def by_noise(cls, count: int, values: Tensor) -> Strata:
        """Return strata with about equal shares of the standard deviation of an integrand.

        Args:
            count: the number n of strata.
            values: one value in each of several strata of equal widths (k, B), k > 2.
        """
        k = len(values)
        reach = max(1, round(k / 20))
        noise = squared_noise(values).T.unsqueeze(1)
        padded = torch.nn.functional.pad(noise, (reach, reach), mode="replicate")
        spread = torch.nn.functional.avg_pool1d(padded, 2 * reach + 1, 1)[:, 0].sqrt()
        total = spread.mean(1, keepdim=True)
        density = torch.where(total > 0, spread / total, 1.0)
        density = _UNIFORM + (1 - _UNIFORM) * density
        cumulative = density.cumsum(1) / density.sum(1, keepdim=True)
        cumulative = torch.nn.functional.pad(cumulative, (1, 0))
        levels = torch.arange(1, count, device=values.device, dtype=values.dtype) / count
        levels = levels.expand(len(cumulative), -1).contiguous()
        cell = torch.searchsorted(cumulative, levels, right=True).sub(1).clamp(0, k - 1)
        low, high = cumulative.gather(1, cell), cumulative.gather(1, cell + 1)
        inner = (cell + ((levels - low) / (high - low)).clamp(0, 1)) / k
        ends = inner.new_tensor([0.0, 1.0]).expand(len(inner), 2)
        return cls(torch.cat([ends[:, :1], inner, ends[:, 1:]], 1).T)

    def draw(self, k: int, u: Tensor) -> Tensor:
        """Return a point of stratum k from a uniform variable u (B,)."""
        return torch.lerp(self.edges[k], self.edges[k + 1], u)

    @property
    def widths(self) -> Tensor:
        """The widths (n, B)."""
        return self.edges.diff(dim=0)

    def integral(self, values: Tensor) -> Tensor:
        """Return the estimate of an integral (B,) from one value in each stratum (n, B)."""
        return (self.widths * values).sum(0)

    def variance(self, values: Tensor) -> Tensor:
        """Return the variance (B,) of `integral`, for n > 1."""
        return (self.widths.square() * squared_noise(values)).sum(0)


def pilot_draws(samples: int) -> int:
    """Return how many draws measure the noise of an integrand, 0 of too few."""
    return math.ceil(samples / 10) if samples >= 300 else 0
