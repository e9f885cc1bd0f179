r"""Solvers of the probability flow in the process's own time: Euler, and Heun with churn.

EDM's schedules, scalings and discretizations are processes and grids here, so that one predictor
covers every row of its ablation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_number, check_positive, readable
from .._coefficients import Coefficient, linear
from .._keywords import explained
from .._precision import at_least_float32
from ..interfaces import ForwardSDE, ScoreModel, Step
from ..random import Generators, randn_like
from .predictors import LinearPredictor, StepCoefficients, check_rates
from .two_stage import StageCoefficients, TwoStagePredictor, vanishes

_MAX_CHURN = math.sqrt(2) - 1  # churn at most doubles the noise variance in a step


def check_levels(s_min: float, s_max: float) -> None:
    """Raise unless two numbers are a range of sigma / alpha, which may be all."""
    check_number(s_min, "s_min")
    check_number(s_max, "s_max")
    if not 0.0 <= s_min <= s_max:
        raise ValueError(f"expected 0 <= s_min <= s_max, got {s_min} and {s_max}")


def _slope(sde: ForwardSDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and q, each (n,), of the probability flow dx/dt = p x + q (predicted data)."""
    alpha, sigma = sde.marginal(t)
    pull = 0.5 * (sde.diffusion(t) / sigma).square()
    p, q = sde.drift_coefficient(t) + pull, -pull * alpha
    if readable(alpha) and bool((ends := alpha == 0).any()):
        # Drift and diffusion are infinite, but p = sigma' / sigma and q = alpha' - p alpha not.
        (p_end, q_end), (_, further) = (_slope_before(sde, t, h) for h in (1.0, 2.0))
        q_end = torch.where(q_end.abs() > 1.1 * further.abs(), -torch.inf, q_end)  # a pole
        p, q = torch.where(ends, p_end, p), torch.where(ends, q_end, q)
    return p, q


def _slope_before(sde: ForwardSDE, t: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Return p and q at times (n,) where alpha = 0, by difference quotients over a small step."""
    h = step * sde.T * math.sqrt(torch.finfo(t.dtype).eps)
    (before, sigma_before), (_, sigma) = sde.marginal((t - h).clamp_min(0.0)), sde.marginal(t)
    return (sigma - sigma_before) / (h * sigma), -before / h


@dataclass(frozen=True)
class Euler(LinearPredictor):
    r"""One Euler step of the probability flow in the process's own time.

    .. math::
        x_s = x_t + (s - t) (f x_t - \tfrac12 g^2 \nabla \log p_t)

    Order 1. In sigma / alpha as the time, Euler is `DDIM`; with an `EDMSDE` the two are the same,
    and with a `FlowMatchingSDE`, whose flow is dx/dt = eps - x0. Where alpha = 0 the slope is its
    limit, alpha' x0 + sigma' eps.

    Raises:
        ValueError: in `prepare` and `step`, from a time where alpha = 0 and the slope is infinite
            (read on the CPU only).

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (section 4.3).
    """

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        p, q = _slope(sde, t)
        return StepCoefficients(1 + (s - t) * p, (s - t) * q, None)


@dataclass(frozen=True, slots=True)
class _ChurnedStages(StageCoefficients):
    """The stages of a step from the raised time `start`, where x_hat = lift x + noise z."""

    times: ClassVar[tuple[str, ...]] = ("middle", "start")

    start: Tensor | None = None
    lift: Coefficient = 1.0
    noise: Coefficient = 0.0


@explained
@dataclass(frozen=True)
class Heun(TwoStagePredictor):
    r"""A second-order step of the probability flow, with or without churn: EDM's sampler.

    .. math::
        d = f x - \tfrac12 g^2 \nabla \log p, \quad
        x' = \hat x + \alpha h\, d(\hat x, \hat t), \quad
        x_s = \hat x + h \left(\left(1 - \tfrac{1}{2 \alpha}\right) d(\hat x, \hat t)
              + \tfrac{1}{2 \alpha} d(x', \hat t + \alpha h)\right), \quad h = s - \hat t

    in the process's own time: an `EDMSDE` gives EDM's algorithm, `VPSDE` its VP column. Two
    evaluations a step; one, an Euler step, where the second stage would be at a time without
    noise: on `KarrasGrid(to_zero=True)` N steps of Heun's method take 2 N - 1. The midpoint rule
    has a second stage in the last step too.

    Churn first adds noise. With r = sigma / alpha and N steps,

    .. math::
        \hat r = (1 + \gamma) r, \quad
        \gamma = \min(\mathrm{churn} / N, \sqrt 2 - 1) \text{ if } r \in [s_{min}, s_{max}], \quad
        \hat x = \tfrac{\hat\alpha}{\alpha} x
                 + \hat\alpha \sqrt{\hat r^2 - r^2}\; s_{noise}\, z.

    The noise is not raised above that of T, where the model is not defined. N is the sampler's
    number of steps, so churn is available in a sampler's run only.

    Args:
        alpha: the position of the second stage: 1 is Heun's method, 1/2 the midpoint rule, 2/3
            Ralston's. Above 1 it may fall below time 0; the step is then an Euler step.
        churn: the amount of new noise over all steps; 0 is deterministic.
        s_min: the smallest sigma / alpha at which noise is added.
        s_max: the largest sigma / alpha at which noise is added.
        s_noise: the standard deviation of the new noise; slightly above 1 compensates for the
            detail that a network's denoising loses.

    Raises:
        ValueError: unless alpha and s_noise are positive, churn >= 0 and 0 <= s_min <= s_max; in
            `step`, if churn > 0 outside a sampler's run; in `prepare` and `step`, from a time
            where the process's alpha = 0 and the slope is infinite (read on the CPU only).
        TypeError: if a setting is not a number.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (algorithms 1 to 3).

    >>> import torch
    >>> from diffusionkit import (
    ...     EDMSDE, GaussianMixtureModel, Heun, KarrasGrid, PCSampler
    ... )
    >>> model = GaussianMixtureModel(EDMSDE(), [[-0.5], [0.5]], [0.1, 0.1])
    >>> grid = KarrasGrid(to_zero=True)
    >>> sampler = PCSampler(model, Heun(), grid=grid, steps=18)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    35
    """

    alpha: float = 1.0
    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.alpha, "alpha")
        check_positive(self.s_noise, "s_noise")
        check_number(self.churn, "churn")
        if not 0.0 <= self.churn < math.inf:
            raise ValueError(f"churn: expected a finite number >= 0, got {self.churn}")
        check_levels(self.s_min, self.s_max)

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StageCoefficients:
        h = s - t
        middle = (1 - self.alpha) * t + self.alpha * s  # s itself where alpha = 1
        used = (middle >= 0) & (sde.marginal(middle.clamp_min(0.0))[1] > 0)
        middle = torch.where(used, middle, t)
        share = torch.where(used, h / (2 * self.alpha), 0.0)
        (p, q), (p_middle, q_middle) = _slope(sde, t), _slope(sde, middle)
        check_rates(self, t, p, q)
        return StageCoefficients(
            middle,
            inner=StepCoefficients(1 + self.alpha * h * p, self.alpha * h * q),
            first=StepCoefficients(1 + (h - share) * p, (h - share) * q),
            second=StepCoefficients(share * p_middle, share * q_middle),
            used=used.to(h.dtype),
        )

    @override
    def on_grid(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StageCoefficients:
        if self.churn == 0:
            return self.coefficients(sde, t, s)
        lift, noise, start = self._churned(sde, t, min(self.churn / len(t), _MAX_CHURN))
        c = self.coefficients(sde, start, s)
        return _ChurnedStages(
            c.middle, c.inner, c.first, c.second, c.used, start=start, lift=lift, noise=noise
        )

    def _churned(self, sde: ForwardSDE, t: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state's scale, the std of the new noise and the raised time, each (n,)."""
        alpha, sigma = sde.marginal(t)
        ratio = sigma / alpha
        some = (self.s_min <= ratio) & (ratio <= self.s_max) & (rate > 0) & (alpha > 0)
        # Within [0, T]. Times without new noise are kept: the inverse would round them.
        raised = sde.time_at_log_snr(-2 * torch.log(ratio * (1 + rate)))
        t = torch.where(some, raised, t)
        alpha_hat, sigma_hat = sde.marginal(t)
        new = ((sigma_hat / alpha_hat).square() - ratio.square()).clamp_min(0.0)
        noise = torch.where(some, alpha_hat * torch.sqrt(new) * self.s_noise, 0.0)
        return torch.where(some, alpha_hat / alpha, 1.0), noise, t

    @override
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any = None,
        /,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        c = self.at(model.sde, x, t, s)
        if not isinstance(c, _ChurnedStages):
            if self.churn > 0:
                raise ValueError(
                    "churn: expected a sampler's step, since churn is divided by the number of "
                    f"steps, got churn = {self.churn} in a single step; use PCSampler or churn = 0"
                )
            return self.stages(model, x, t, c, cond)
        if not vanishes(c.noise):
            x = at_least_float32(x)
            x = linear(c.lift, x, c.noise, randn_like(x, generator))
        return self.stages(model, x, t if c.start is None else c.start, c, cond)
