"""DDPM's discrete chain as a process in continuous time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._checks import check_count, check_positive
from .chain import Chain


class DDPMChain(Chain):
    r"""The chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z of DDPM, on [0, 1].

    .. math::
        \log \alpha\!\left(\tfrac{i + 1}{N}\right) = \tfrac12 \sum_{j \le i} \log(1 - \beta_j),
        \quad \alpha(0) = 1, \quad \sigma^2 = 1 - \alpha^2,

    with log(alpha) linear in between: step i, counted from 0, sits at t = (i + 1) / N, and
    kernel and transitions are there the table's. Samplers stop at the first step, where the
    last mean of the chain is the prediction of the data. The prior is N(0, I).

    The last beta may be 1: then alpha(1) = 0, nothing is left of the data, and within the last
    step alpha itself is linear. Drift and diffusion are infinite at t = 1, all else but the
    log-SNR is finite, and a model must say the data or the velocity: the noise alone does not
    tell the data there.

    Args:
        betas: the variances beta_0 ... beta_{N-1} that the steps add.

    Raises:
        ValueError: unless there are at least two, all strictly between 0 and 1 but for the last,
            which may be 1.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.

    >>> alpha, sigma = DDPMChain.linear(1000).marginal(torch.tensor([0.001, 1.0]))
    >>> alpha**2
    tensor([9.9990e-01, 4.0358e-05])
    """

    prior_std = 1.0

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        """Tabulate -log(alpha)."""
        table = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().flatten().clone()
        inner, last = table[:-1], table[-1:]
        if len(table) < 2 or not ((inner > 0) & (inner < 1)).all() or not 0 < last <= 1:
            raise ValueError(
                "betas: expected at least two numbers strictly between 0 and 1 (the last may be "
                f"1), got {table[:6].tolist()} ... of {len(table)}"
            )
        self.betas = table
        super().__init__(-0.5 * torch.log1p(-table))

    @classmethod
    def from_alphas_bar(cls, alphas_bar: Sequence[float] | Tensor) -> DDPMChain:
        """Make the chain whose alpha^2 is a table.

        Args:
            alphas_bar: alpha^2 at the steps, strictly decreasing within (0, 1); the last may be 0.

        Raises:
            ValueError: unless they are so.

        >>> DDPMChain.from_alphas_bar([0.9, 0.45, 0.09]).betas
        tensor([0.1000, 0.5000, 0.8000], dtype=torch.float64)
        """
        table = torch.as_tensor(alphas_bar, dtype=torch.float64).detach().cpu().flatten()
        before = torch.cat([table.new_ones(1), table[:-1]])
        if len(table) < 2 or not (table < before).all() or not (table >= 0).all():
            raise ValueError(
                "alphas_bar: expected at least two numbers, strictly decreasing, below 1 and not "
                f"below 0, got {table[:6].tolist()} ... of {len(table)}"
            )
        return cls((before - table) / before)

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
        if steps <= max(beta_min, beta_max):
            raise ValueError(
                f"steps: expected more than {max(beta_min, beta_max):g}, so that every beta is "
                f"below 1, got {steps}"
            )
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
            max_beta: the largest beta, below 1. A chain that ends in 1 is `zero_terminal_snr`'s.

        Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672.
        """
        check_count(steps, "steps")
        check_positive(s, "s")
        check_positive(max_beta, "max_beta")
        if max_beta >= 1:
            raise ValueError(f"max_beta: expected a number below 1, got {max_beta}")
        # With c = pi/2 - angle, alpha-bar is sin(c)^2, and a difference of squares of sines
        # is a product: no digit of a small beta is lost.
        c = torch.arange(steps, -1, -1, dtype=torch.float64) * (math.pi / 2 / (1 + s) / steps)
        fall = math.sin(math.pi / 2 / (1 + s) / steps) * torch.sin(c[1:] + c[:-1])
        return cls((fall / torch.sin(c[:-1]).square()).clamp_max(max_beta))

    def zero_terminal_snr(self) -> DDPMChain:
        r"""Return this chain rescaled so that nothing of the data is left at its end.

        .. math::
            \alpha_i' = (\alpha_i - \alpha_{N-1}) \frac{\alpha_0}{\alpha_0 - \alpha_{N-1}}

        Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023,
        arXiv 2305.08891 (algorithm 1).

        >>> DDPMChain.linear(1000).zero_terminal_snr()
        DDPMChain(1000 steps, betas 0.0001 ... 1)
        """
        alpha = torch.exp(-self._sums[1:])
        first, last = alpha[0], alpha[-1]
        return self.from_alphas_bar(((alpha - last) * (first / (first - last))).square())

    def __repr__(self) -> str:
        first, last = self.betas[0], self.betas[-1]
        return f"DDPMChain({self.steps} steps, betas {first:.3g} ... {last:.3g})"

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        decay = self._sum(t)
        return torch.exp(-decay), torch.sqrt(-torch.expm1(-2 * decay))

    def log_snr(self, t: Tensor) -> Tensor:
        decay = 2 * self._sum(t)
        return -decay - torch.log(-torch.expm1(-decay))

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._time_at(-0.5 * logsigmoid(log_snr))

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        decay = self._added(s, t)
        return torch.exp(-decay), torch.sqrt(-torch.expm1(-2 * decay))

    def drift_coefficient(self, t: Tensor) -> Tensor:
        below, past = self._split(t)
        rate = self._increments.to(t.device, t.dtype)[below]
        return -self.steps * torch.where(torch.isinf(rate), 1 / (1 - past), rate)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-2 * self.drift_coefficient(t))

    def _part(self, step: Tensor, past: Tensor, share: Tensor) -> Tensor:
        if self.betas[-1] < 1:
            return super()._part(step, past, share)
        # The last step ends at alpha = 0: alpha is linear in it, and the others stay clear of it.
        last = step == self.steps - 1
        some = torch.where(last & (share > 0), share / (1 - past), torch.zeros_like(share))
        linear = super()._part(torch.where(last, 0, step), past, share)
        return torch.where(last, -torch.log1p(-some), linear)

    def _share(self, step: Tensor, part: Tensor) -> Tensor:
        linear = super()._share(step, part)
        rate = self._increments.to(part.device, part.dtype)[step]
        return torch.where(torch.isinf(rate), -torch.expm1(-part), linear)
