"""DDPM's discrete chain as a process in continuous time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._checks import check_count, check_positive, check_times, check_transition
from ..interfaces import ForwardSDE


class DDPMChain(ForwardSDE):
    r"""The chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z of DDPM, on [0, 1].

    .. math::
        \log \alpha\!\left(\tfrac{i + 1}{N}\right) = \tfrac12 \sum_{j \le i} \log(1 - \beta_j),
        \quad \alpha(0) = 1, \quad \sigma^2 = 1 - \alpha^2,

    with log(alpha) linear in between: step i, counted from 0, sits at t = (i + 1) / N, and
    kernel and transitions are there the table's. Samplers stop at the first step, where the
    last mean of the chain is the prediction of the data. The prior is N(0, I).

    Args:
        betas: the variances beta_0 ... beta_{N-1} that the steps add.

    Raises:
        ValueError: unless there are at least two, all strictly between 0 and 1.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.

    >>> alpha, sigma = DDPMChain.linear(1000).marginal(torch.tensor([0.001, 1.0]))
    >>> alpha**2
    tensor([9.9990e-01, 4.0358e-05])
    """

    prior_std = 1.0

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        """Tabulate log(alpha)."""
        table = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().flatten().clone()
        if len(table) < 2 or not ((table > 0) & (table < 1)).all():
            raise ValueError(
                "betas: expected at least two numbers strictly between 0 and 1, "
                f"got {table[:6].tolist()} ... of {len(table)}"
            )
        self.betas = table
        self.steps = len(table)
        self._log_alpha = torch.cat([torch.zeros(1).double(), 0.5 * torch.log1p(-table).cumsum(0)])

    @classmethod
    def linear(
        cls, steps: int = 1000, *, beta_min: float = 0.1, beta_max: float = 20.0
    ) -> DDPMChain:
        """Make the chain of betas linear from beta_min / steps to beta_max / steps.

        Args:
            steps: the number of steps; DDPM's own 1e-4 ... 0.02 are those of 1000 steps.
            beta_min: the first rate.
            beta_max: the last rate.
        """
        check_count(steps, "steps")
        check_positive(beta_min, "beta_min")
        check_positive(beta_max, "beta_max")
        return cls(torch.linspace(beta_min, beta_max, steps, dtype=torch.float64) / steps)

    @classmethod
    def cosine(cls, steps: int = 1000, *, s: float = 0.008, max_beta: float = 0.999) -> DDPMChain:
        r"""Make the chain whose alpha-bar is a squared cosine.

        .. math::
            \bar\alpha \propto \cos^2\!\left(\frac{u + s}{1 + s} \frac{\pi}{2}\right), \quad
            \beta_i = \min\left(1 - \frac{\bar\alpha((i+1)/N)}{\bar\alpha(i/N)}, \beta_{max}\right)

        Args:
            steps: the number N of steps.
            s: the offset, which keeps the first betas from vanishing.
            max_beta: the largest beta.

        Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672.
        """
        check_count(steps, "steps")
        check_positive(s, "s")
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2).square()
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(max_beta))

    def __repr__(self) -> str:
        first, last = self.betas[0], self.betas[-1]
        return f"DDPMChain({self.steps} steps, betas {first:.3g} ... {last:.3g})"

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """The time of the first step."""
        return 1 / self.steps

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._at(t)
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = 2 * self._at(t)
        return log_alpha - torch.log(-torch.expm1(log_alpha))

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        falling = -self._table(log_snr)
        value = -0.5 * logsigmoid(log_snr)
        above = torch.searchsorted(falling, value.detach()).clamp(1, self.steps)
        low, high = falling[above - 1], falling[above]
        return ((above - 1 + (value - low) / (high - low)) / self.steps).clamp(0.0, self.T)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_transition(s, t, self.T)
        # Within a step a difference of times keeps the digits that one of logarithms loses.
        within = self._split(s)[0] == self._split(t)[0]
        short, long = self.drift_coefficient(t) * (t - s), self._at(t) - self._at(s)
        log_scale = torch.where(within, short, long)
        return torch.exp(log_scale), torch.sqrt(-torch.expm1(2 * log_scale))

    def drift_coefficient(self, t: Tensor) -> Tensor:
        table, (below, _) = self._table(t), self._split(t)
        return (table[below + 1] - table[below]) * self.steps

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-2 * self.drift_coefficient(t))

    def _table(self, like: Tensor) -> Tensor:
        return self._log_alpha.to(like.device, like.dtype)

    def _split(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of the step that leads to each time, and how far it is into it."""
        check_times(t, self.T)
        position = t * self.steps
        below = (position.detach().ceil() - 1).long().clamp(0, self.steps - 1)
        return below, position - below

    def _at(self, t: Tensor) -> Tensor:
        table, (below, past) = self._table(t), self._split(t)
        low, high = table[below], table[below + 1]
        return low + past * (high - low)
