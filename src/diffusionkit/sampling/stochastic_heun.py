"""A stochastic step of second order in the drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .._checks import check_step_times
from .._grid_times import instant, tabulated
from .._schedules import exact
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..random import Generators, increment_like
from ..values import Coefficient, add_noise, linear
from .predictors import Ancestral, StepCoefficients

_FIRST = Ancestral()


@dataclass(frozen=True, slots=True)
class _Stages:
    """A move, and the share of the change in the predicted data along it that is added then.

    Without `middle`, the time of the second prediction, the move is the whole step.
    """

    move: StepCoefficients
    share: Coefficient
    middle: Tensor | None


@dataclass(frozen=True)
class StochasticHeun(Predictor):
    r"""Heun's method for the reverse SDE: an ancestral step, then the data predicted at its end.

    .. math::
        x' = \frac{a \sigma_s^2}{\sigma_t^2} x_t + \frac{\alpha_s v}{\sigma_t^2} \hat x_0(x_t, t)
             + \mathrm{std}\, z, \quad
        x_s = x' + \alpha_s \left(1 - \frac{1 - e^{-h}}{h}\right)
              \left(\hat x_0(x', s) - \hat x_0(x_t, t)\right),

    with scale a and variance v of p(x_t | x_s), std as in `Ancestral` and h the log-SNR that is
    gained. It solves the equation of y = x / alpha and u = (sigma / alpha)^2,

    .. math::
        \frac{y_s}{u_s} = \frac{y_t}{u_t} + \int_{u_s}^{u_t} \frac{\hat x_0}{u^2}\, du
                          + \int \frac{dW(u)}{u},

    exactly where the predicted data are linear in log u along the step; its noise is additive,
    so that one z serves both stages. Weak order 2, strong order 1. Two evaluations a step; one,
    an ancestral step, where it ends at a time without noise.

    Source: the second-order weak scheme for additive noise of Kloeden and Platen, Numerical
    Solution of Stochastic Differential Equations, 1992 (section 15.1), in the variables of Lu et
    al., DPM-Solver++, 2022, arXiv 2211.01095.

    >>> from diffusionkit import GaussianMixtureModel, LogSNRGrid, PCSampler, VPSDE
    >>> model = GaussianMixtureModel(VPSDE(), means=[[-2.0], [2.0]], stds=[0.5, 0.5])
    >>> sampler = PCSampler(model, StochasticHeun(), steps=20, grid=LogSNRGrid())
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    41
    """

    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:
        """Compute the coefficients of all steps at once, and leave them with the times."""
        table = tabulated(sde, times)
        if table is None:
            return
        instants, grid = table
        move, share = _coefficients(sde, grid[:-1], grid[1:])
        columns = (torch.as_tensor(c).tolist() for c in (move.x, move.x0, move.std, share))
        for k, (x, x0, std, part) in enumerate(zip(*columns, strict=True)):
            instants[k].notes[id(self), instants[k + 1].time] = _Stages(
                StepCoefficients(x, x0, std), part, times[k + 1] if part > 0 else None
            )

    def _between(self, sde: ForwardSDE, t: Tensor, s: Tensor, x: Tensor) -> _Stages:
        here, there = instant(t, sde), instant(s, sde)
        if here is not None and there is not None:
            known: _Stages | None = here.notes.get((id(self), there.time))
            if known is not None:
                return known
        check_step_times(s, t, sde.T, x)
        move, share = _coefficients(sde, exact(t), exact(s))
        corrected = share > 0
        return _Stages(move, share, torch.where(corrected, s, t) if corrected.any() else None)

    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any = None,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        """Move a state x (B, *D) from times t (B,) to s (B,), s < t."""
        return self.pair(model, x, t, s, generator, cond)[1]

    def pair(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        generator: Generators,
        cond: dict[str, Any],
    ) -> tuple[Tensor, Step]:
        """Return the state x' (B, *D) after the first stage, and the step."""
        stages = self._between(model.sde, t, s, x)
        prediction = model.predict(x, t, **cond)
        mean = prediction.combine(x=stages.move.x, x0=stages.move.x0)
        noise = increment_like(mean, generator, model.sde, t, s)
        first = add_noise(mean, cast(Coefficient, stages.move.std), noise)
        if stages.middle is None:
            return first, Step(first, mean)
        change = model.predict(first, stages.middle, **cond).x0 - prediction.x0
        return first, Step(*(linear(1.0, y, stages.share, change) for y in (first, mean)))


def _coefficients(sde: ForwardSDE, t: Tensor, s: Tensor) -> tuple[StepCoefficients, Tensor]:
    """Return the ancestral move from times t (n,) to s (n,), and the share of the change (n,)."""
    alpha, sigma = sde.marginal(s)
    gain = sde.log_snr(s) - sde.log_snr(t)
    share = alpha * (1 + torch.expm1(-gain) / gain)
    return _FIRST.coefficients(sde, t, s), torch.where(sigma > 0, share, 0.0)
