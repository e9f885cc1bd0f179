"""The noise levels of SMLD (NCSN) as a process in continuous time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_count, check_positive, check_times, numbers
from .._ones import ones_like
from .chain import Chain


class SMLDChain(Chain):
    r"""The noise levels of SMLD as a chain: x_k = x_{k-1} + sqrt(sigma_k^2 - sigma_{k-1}^2) z.

    .. math::
        \alpha = 1, \quad \sigma\!\left(\tfrac{i + 1}{N}\right) = \sigma_i, \quad \sigma(0) = 0,

    with sigma^2 linear in between. At the times of its steps (see `Chain`) the noise levels are
    the table's. This is the discretization of the VE SDE, with an additional first step from the
    data to sigma_0. The prior is N(0, sigma_{N-1}^2 I).

    Args:
        sigmas: the noise levels sigma_0 ... sigma_{N-1}, increasing.

    Raises:
        ValueError: if there are fewer than two sigmas, or they are not positive and increasing.

    Source: Song and Ermon, Generative Modeling by Estimating Gradients, 2019, arXiv 1907.05600;
    Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456 (appendix B).

    >>> import torch
    >>> from diffusionkit import SMLDChain
    >>> SMLDChain([0.1, 1.0, 10.0]).marginal(torch.tensor([1 / 3, 1.0]))[1]
    tensor([ 0.1000, 10.0000])
    """

    _unchanging = True  # samplers keep tables

    def __init__(self, sigmas: Sequence[float] | Tensor) -> None:
        """Accumulate sigma^2."""
        table = numbers(sigmas, "sigmas").detach().cpu().flatten().clone()
        before = torch.cat([table.new_zeros(1), table[:-1]])
        if len(table) < 2 or not (table > before).all() or not torch.isfinite(table).all():
            falling = len(table) > 1 and bool((table.diff() < 0).all())
            raise ValueError(
                "sigmas: expected at least two positive numbers, strictly increasing, "
                f"got {table[:6].tolist()} ... of {len(table)}"
                + ("; reverse their order" if falling else "")
            )
        self.sigmas = table
        super().__init__((table - before) * (table + before))

    @classmethod
    def geometric(
        cls, steps: int = 1000, *, sigma_min: float = 0.01, sigma_max: float = 50.0
    ) -> SMLDChain:
        """Create the chain of geometrically spaced noise levels.

        Args:
            steps: the number of noise levels.
            sigma_min: the first noise level.
            sigma_max: the last noise level.
        """
        check_count(steps, "steps")
        check_positive(sigma_min, "sigma_min")
        check_positive(sigma_max, "sigma_max")
        ends = math.log(sigma_min), math.log(sigma_max)
        return cls(torch.exp(torch.linspace(*ends, steps, dtype=torch.float64)))

    @override
    def __repr__(self) -> str:
        first, last = self.sigmas[0], self.sigmas[-1]
        return f"SMLDChain({self.steps} steps, sigmas {first:.3g} ... {last:.3g})"

    @property
    @override
    def prior_std(self) -> float:
        return float(self.sigmas[-1])

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return ones_like(t), torch.sqrt(self._sum(t))

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(self._sum(t))

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._time_of(torch.exp(-log_snr))

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.sqrt(self._increment(s, t))

    @override
    def drift_coefficient(self, t: Tensor) -> Tensor:
        check_times(t, self.T)
        return torch.zeros_like(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.steps * self._rate(t)[0])
