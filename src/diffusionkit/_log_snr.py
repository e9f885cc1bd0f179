"""Distributions over the log-SNR of a process, and its end where no signal is left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._coefficients import Coefficient

LARGEST_RATIO = 160.0
"""sigma / alpha that stands for alpha = 0: EDM's largest, 80 for data of standard deviation .5."""

FAINTEST = -2 * math.log(LARGEST_RATIO)


def with_signal(log_snr: Tensor) -> Tensor:
    """Return log-SNRs, and the faintest where no signal is left and they are -infinity."""
    return torch.where(torch.isneginf(log_snr), FAINTEST, log_snr)


@dataclass(frozen=True)
class LogSNRSpan:
    r"""Log-SNRs from a first, near the data, to a last: uniform, down to -infinity too.

    Where the last is -infinity, the density below the faintest level l falls in proportion to
    alpha / sigma:

    .. math::
        p(\lambda) = \tfrac1Z \min(1, e^{(\lambda - l) / 2}), \quad Z = \lambda_{first} - l + 2.

    Args:
        first: the first log-SNR, a float or a tensor ().
        last: the last one, smaller.
    """

    first: Coefficient
    last: Coefficient

    @property
    def floor(self) -> Coefficient:
        """The level down to which the density is uniform."""
        if isinstance(self.last, Tensor):
            return with_signal(self.last)
        return FAINTEST if self.last == -math.inf else self.last

    @property
    def uniform(self) -> bool:
        """Whether the distribution is known to be uniform."""
        return not isinstance(self.last, Tensor) and self.last == self.floor

    @property
    def length(self) -> Coefficient:
        """Z: the density at the first level is 1 / Z."""
        tail = 2.0 * (self.last < self.floor)
        return self.first - self.floor + tail

    def at(self, u: Tensor) -> Tensor:
        """Return the log-SNRs (n,) above which a fraction u (n,) of the distribution lies."""
        level = u * -self.length + self.first
        if self.uniform:
            return level
        below = (self.floor - level).clamp(0.0, 2.0)
        return torch.where(below > 0, self.floor + 2 * torch.log1p(-0.5 * below), level)

    def share(self, log_snr: Tensor) -> Tensor:
        """Return the density at log-SNRs (n,) over that of the uniform part, (n,)."""
        if self.uniform:
            return torch.ones_like(log_snr)
        return torch.exp(0.5 * (log_snr - self.floor).clamp_max(0.0))
