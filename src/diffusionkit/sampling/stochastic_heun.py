"""A stochastic predictor of weak order 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from .._coefficients import Coefficient, add_noise, linear
from .._keywords import explained
from ..interfaces import ForwardSDE, ScoreModel, Step
from ..random import Generators, step_noise
from .predictors import Ancestral, StepCoefficients, TabulatedPredictor
from .two_stage import vanishes

_FIRST = Ancestral()


@dataclass(frozen=True, slots=True)
class _Stages:
    """An ancestral step, and the share of the change in the predicted data that is added to it.

    The data are predicted again at the time `end`; where the share is 0, they need not be.
    """

    times: ClassVar[tuple[str, ...]] = ("end",)

    first: StepCoefficients
    share: Coefficient
    end: Tensor


@explained
@dataclass(frozen=True)
class StochasticHeun(TabulatedPredictor[_Stages]):
    r"""Heun's method for the reverse SDE: an ancestral step, then the data predicted at its end.

    .. math::
        x' = \frac{a \sigma_s^2}{\sigma_t^2} x_t + \frac{\alpha_s v}{\sigma_t^2} \hat x_0(x_t, t)
             + \mathrm{std}\, z, \quad
        x_s = x' + \alpha_s \left(1 - \frac{1 - e^{-h}}{h}\right)
              \left(\hat x_0(x', s) - \hat x_0(x_t, t)\right),

    with scale a and variance v of p(x_t | x_s), std as in `Ancestral` and h the gain in
    log-SNR. It solves the equation of y = x / alpha and u = (sigma / alpha)^2,

    .. math::
        \frac{y_s}{u_s} = \frac{y_t}{u_t} + \int_{u_s}^{u_t} \frac{\hat x_0}{u^2}\, du
                          + \int \frac{dW(u)}{u},

    exactly if the predicted data are linear in log u along the step; its noise is additive, so both
    stages use the same z. Weak order 2, strong order 1. A step takes two evaluations; a step to a
    time without noise is an ancestral step with one evaluation.

    Source: the second-order weak scheme for additive noise of Kloeden and Platen, Numerical
    Solution of Stochastic Differential Equations, 1992 (section 15.1), in the variables of Lu et
    al., DPM-Solver++, 2022, arXiv 2211.01095.

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, GaussianMixtureModel, LogSNRGrid, PCSampler, StochasticHeun
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> grid = LogSNRGrid()
    >>> sampler = PCSampler(model, StochasticHeun(), steps=20, grid=grid)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    41
    """

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> _Stages:
        alpha, sigma = sde.marginal(s)
        gain = sde.log_snr(s) - sde.log_snr(t)
        share = torch.where(sigma > 0, alpha * (1 + torch.expm1(-gain) / gain), 0.0)
        return _Stages(_FIRST.coefficients(sde, t, s), share, torch.where(share > 0, s, t))

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
        before = model.predict(x, t, **cond)
        mean = before.combine(x=c.first.x, x0=c.first.x0)
        noise = step_noise(mean, model.sde, t, s, generator=generator)
        first = add_noise(mean, cast(Coefficient, c.first.std), noise)
        if vanishes(c.share):
            return Step(first, mean, prediction=before)
        after = model.predict(first, c.end, **cond)
        change = after.x0 - before.x0
        x, mean = (linear(1.0, y, c.share, change) for y in (first, mean))
        return Step(x, mean, prediction=after)
