"""The discrete chain of DDPM as a process in continuous time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from .._checks import check_count, check_positive, numbers
from .chain import Chain


class DDPMChain(Chain):
    r"""The chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z of DDPM, on [0, 1].

    .. math::
        \log \alpha\!\left(\tfrac{i + 1}{N}\right) = \tfrac12 \sum_{j \le i} \log(1 - \beta_j),
        \quad \alpha(0) = 1, \quad \sigma^2 = 1 - \alpha^2,

    with log(alpha) linear in between. At the times of its steps (see `Chain`) the marginals and
    transitions are those of DDPM. Samplers stop at the first step, where the chain's last mean
    is the predicted data. The prior is N(0, I).

    The last beta may be 1 (zero terminal SNR): then alpha(1) = 0, and alpha itself is linear in
    the last step. At t = 1 drift, diffusion and log-SNR are infinite, everything else is finite,
    and the model must predict x0 or v: eps does not determine x0 there.

    Args:
        betas: the noise variances beta_0 ... beta_{N-1} of the steps.

    Raises:
        ValueError: if there are fewer than two betas, or one is outside (0, 1); the last may be 1.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.

    >>> import torch
    >>> from diffusionkit import DDPMChain
    >>> t = torch.tensor([0.001, 1.0])
    >>> alpha, sigma = DDPMChain.linear(1000).marginal(t)
    >>> alpha**2
    tensor([9.9990e-01, 4.0358e-05])
    """

    prior_std = 1.0
    _unchanging = True  # samplers keep tables

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        """Accumulate -log(alpha)."""
        table = numbers(betas, "betas").detach().cpu().flatten().clone()
        inner, last = table[:-1], table[-1:]
        if len(table) < 2 or not ((inner > 0) & (inner < 1)).all() or not 0 < last <= 1:
            raise ValueError(
                "betas: expected at least two numbers strictly between 0 and 1 (the last may be "
                f"1), got {table[:6].tolist()} ... of {len(table)}"
            )
        self.betas = table
        self._vanishes = bool(last == 1)  # alpha, at t = 1
        super().__init__(-0.5 * torch.log1p(-table))

    @classmethod
    def from_alphas_bar(cls, alphas_bar: Sequence[float] | Tensor) -> DDPMChain:
        """Create the chain with the given alpha^2 (alpha-bar) at each step.

        Args:
            alphas_bar: alpha^2 at the steps, strictly decreasing within (0, 1); the last may be 0.

        Raises:
            ValueError: if there are fewer than two values, or they do not decrease within (0, 1).

        >>> from diffusionkit import DDPMChain
        >>> DDPMChain.from_alphas_bar([0.9, 0.45, 0.09]).betas
        tensor([0.1000, 0.5000, 0.8000], dtype=torch.float64)
        """
        table = numbers(alphas_bar, "alphas_bar").detach().cpu().flatten()
        before = torch.cat([table.new_ones(1), table[:-1]])
        if len(table) < 2 or not (table < before).all() or not (table >= 0).all():
            raise ValueError(
                "alphas_bar: expected at least two numbers, strictly decreasing, below 1 and at "
                f"least 0, got {table[:6].tolist()} ... of {len(table)}"
            )
        return cls((before - table) / before)

    @classmethod
    def linear(
        cls, steps: int = 1000, *, beta_min: float = 0.1, beta_max: float = 20.0
    ) -> DDPMChain:
        """Create the chain with betas linear from beta_min / steps to beta_max / steps.

        Args:
            steps: the number of steps; with 1000, the betas are DDPM's 1e-4 ... 0.02.
            beta_min: the first beta, times the number of steps.
            beta_max: the last beta, times the number of steps.
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
        r"""Create the chain with the cosine schedule.

        .. math::
            \bar\alpha \propto \cos^2\!\left(\frac{u + s}{1 + s} \frac{\pi}{2}\right), \quad
            \beta_i = \min\left(1 - \frac{\bar\alpha((i+1)/N)}{\bar\alpha(i/N)}, \beta_{max}\right)

        Args:
            steps: the number N of steps.
            s: the offset, which keeps the first betas from vanishing.
            max_beta: the largest beta, below 1; see `zero_terminal_snr` for a chain ending in 1.

        Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672.
        """
        check_count(steps, "steps")
        check_positive(s, "s")
        check_positive(max_beta, "max_beta")
        if max_beta >= 1:
            raise ValueError(f"max_beta: expected a number below 1, got {max_beta}")
        # With c = pi/2 - angle, alpha-bar is sin(c)^2, and the difference of squared sines is
        # computed as a product: small betas keep all digits.
        c = torch.arange(steps, -1, -1, dtype=torch.float64) * (math.pi / 2 / (1 + s) / steps)
        fall = math.sin(math.pi / 2 / (1 + s) / steps) * torch.sin(c[1:] + c[:-1])
        return cls((fall / torch.sin(c[:-1]).square()).clamp_max(max_beta))

    def zero_terminal_snr(self) -> DDPMChain:
        r"""Return this chain rescaled to zero signal-to-noise ratio at t = 1.

        .. math::
            \alpha_i' = (\alpha_i - \alpha_{N-1}) \frac{\alpha_0}{\alpha_0 - \alpha_{N-1}}

        Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023,
        arXiv 2305.08891 (algorithm 1).

        >>> from diffusionkit import DDPMChain
        >>> DDPMChain.linear(1000).zero_terminal_snr()
        DDPMChain(1000 steps, betas 0.0001 ... 1)
        """
        alpha = torch.exp(-self._sums[1:])
        first, last = alpha[0], alpha[-1]
        return self.from_alphas_bar(((alpha - last) * (first / (first - last))).square())

    @override
    def __repr__(self) -> str:
        first, last = self.betas[0], self.betas[-1]
        return f"DDPMChain({self.steps} steps, betas {first:.3g} ... {last:.3g})"

    @override
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        decay = self._sum(t)
        return torch.exp(-decay), torch.sqrt(-torch.expm1(-2 * decay))

    @override
    def log_snr(self, t: Tensor) -> Tensor:
        decay = 2 * self._sum(t)
        return -decay - torch.log(-torch.expm1(-decay))

    @override
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._time_of(-0.5 * logsigmoid(log_snr))

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        decay = self._increment(s, t)
        return torch.exp(-decay), torch.sqrt(-torch.expm1(-2 * decay))

    @override
    def drift_coefficient(self, t: Tensor) -> Tensor:
        rate, done = self._rate(t)
        return -self.steps * torch.where(torch.isinf(rate), 1 / (1 - done), rate)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-2 * self.drift_coefficient(t))

    @override
    def _partial(self, step: Tensor, done: Tensor | None, fraction: Tensor) -> Tensor:
        if not self._vanishes:
            return super()._partial(step, done, fraction)
        # The last step ends at alpha = 0 and is linear in alpha; its infinite increment is unused.
        last = step == self.steps - 1
        share = fraction if done is None else fraction / (1 - done)
        lost = torch.where(last & (fraction > 0), share, torch.zeros_like(fraction))
        linear = super()._partial(torch.where(last, 0, step), done, fraction)
        return torch.where(last, -torch.log1p(-lost), linear)

    @override
    def _fraction(self, step: Tensor, increment: Tensor) -> Tensor:
        linear = super()._fraction(step, increment)
        rate = self._tables(increment)[0][step]
        return torch.where(torch.isinf(rate), -torch.expm1(-increment), linear)
