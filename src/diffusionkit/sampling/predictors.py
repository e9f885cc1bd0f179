r"""Predictors: steps from a time t to an earlier time s.

All but the bases are linear in the state and the predicted data, x_s = A x_t + C x0 + std z, and
differ in their coefficients alone.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_number, check_step_times, readable
from .._coefficients import Coefficient, add_noise, expand
from .._grid_times import by_row, exact_times, grid_point, grid_points, kernel
from .._keywords import explained
from .._schedules import exact, schedule_dtype
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..random import Generators, step_noise
from ..values import Prediction

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """The coefficients of x_s = x * x_t + x0 * (predicted data) + std * z.

    Args:
        x: the coefficient of the state, (B,) or a float.
        x0: the coefficient of the predicted data, (B,) or a float.
        std: the standard deviation of the noise, (B,) or a float; None for no noise.
    """

    x: Coefficient
    x0: Coefficient
    std: Coefficient | None = None


def check_rates(predictor: Predictor, t: Tensor, *rates: Coefficient | None) -> None:
    """Raise if a rate of a predictor at times t (n,) is not finite (read on the CPU only)."""
    if not readable(t):
        return
    for rate in rates:
        finite = torch.isfinite(torch.as_tensor(0.0 if rate is None else rate))
        if not bool(finite.all()):
            worst = float(t[~finite.expand_as(t)][0])
            raise ValueError(
                "grid: expected to begin where alpha > 0, so that the reverse process has finite "
                f"rates, got t = {worst:g} with {type(predictor).__name__}; use a predictor with "
                "exact transitions there, such as Ancestral or DDIM, or begin at a smaller time"
            )


class TabulatedPredictor(Predictor, Generic[C]):
    """A predictor whose coefficients depend on the process and the two times alone.

    A subclass defines `coefficients`, and a `step` that gets them from `at` and passes them to
    `Prediction.combine`, `linear` and `add_noise`. For a sampler's grid the coefficients of all
    steps are computed at once, in float64.
    """

    @abc.abstractmethod
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> C:
        """Return the coefficients of steps from times t (n,) to s (n,), s < t.

        They are a tensor (n,) or a dataclass of tensors (n,), of such dataclasses, and of
        constants. A dataclass lists the fields that are times, where a step evaluates the model
        in between, in a class variable `times`.
        """

    def check(self, t: Tensor, coefficients: C) -> None:
        """Raise if coefficients of steps from times t (n,) cannot be used; accepts all by default.

        Raises:
            ValueError: if a coefficient is not finite, for predictors that check it.
        """

    def on_grid(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> C:
        """Return the coefficients of the N steps of a sampler's run, each (N,)."""
        return self.coefficients(sde, t, s)

    @override
    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:
        points = grid_points(sde, times)
        if points is None:
            return

        def tabulated() -> C:
            grid = exact_times(points)
            table = self.on_grid(sde, grid[:-1], grid[1:])
            self.check(grid[:-1], table)
            return table

        run = tuple(point.index for point in points)
        table = points[0].grid.keep(self, run, tabulated)
        rows = by_row(table, sde, len(points) - 1, times[0])
        for here, there, row in zip(points, points[1:], rows, strict=False):
            here.store(self, (there,), row)

    def at(self, sde: ForwardSDE, x: Tensor, t: Tensor, s: Tensor) -> C:
        """Return the coefficients of the step of a state x (B, *D) from times t (B,) to s (B,).

        Raises:
            ValueError: if s and t are not times of x within [0, T], s < t, or `check` raises.
        """
        here, there = grid_point(t, sde), grid_point(s, sde)
        if here is not None and there is not None:
            row: C | None = here.step_to(self, there)
            if row is not None:
                return row
        check_step_times(s, t, sde.T, x)
        found = self.coefficients(sde, exact(t), exact(s))
        self.check(t, found)
        return found


class LinearPredictor(TabulatedPredictor[StepCoefficients]):
    """A predictor given by three coefficients; a subclass defines `coefficients` alone."""

    @override
    def check(self, t: Tensor, coefficients: StepCoefficients) -> None:
        check_rates(self, t, coefficients.x, coefficients.x0, coefficients.std)

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
        prediction = model.predict(x, t, **cond)
        mean = prediction.combine(x=c.x, x0=c.x0)
        std = self.noise_std(c, prediction, model.sde, t, s)
        if std is None:
            return Step(mean, mean, prediction=prediction)
        noise = step_noise(mean, model.sde, t, s, generator=generator)
        return Step(add_noise(mean, std, noise), mean, prediction=prediction)

    def noise_std(
        self, c: StepCoefficients, prediction: Prediction, sde: ForwardSDE, t: Tensor, s: Tensor
    ) -> Coefficient | None:
        """Return the standard deviation of the noise, (B,), (B, *D) or a float; None for none."""
        return c.std


def or_exact(
    sde: ForwardSDE, t: Tensor, s: Tensor, x: Tensor, x0: Tensor, std: Tensor
) -> StepCoefficients:
    """Return coefficients (n,) of the reverse SDE, where alpha(t) = 0 those of its transition.

    There the rates are infinite, but the state is noise alone, so that x_s = alpha_s x0 + sigma_s z
    is exact.
    """
    (alpha_s, sigma_s), noise = sde.marginal(s), sde.marginal(t)[0] == 0
    return StepCoefficients(
        torch.where(noise, 0.0, x),
        torch.where(noise, alpha_s, x0),
        torch.where(noise, sigma_s, std),
    )


@dataclass(frozen=True)
class EulerMaruyama(LinearPredictor):
    r"""One Euler-Maruyama step of the reverse SDE.

    .. math::
        x_s = x_t - (f x_t - g^2 \nabla \log p_t)(t - s) + g \sqrt{t - s}\, z

    Weak order 1. From a time where alpha = 0, and the drift is infinite, the step is the exact
    transition given the predicted data, that of `Ancestral`.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.
    """

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        alpha, sigma = sde.marginal(t)
        g, length = sde.diffusion(t), t - s
        pull = (g / sigma).square() * length
        kept = 1 - sde.drift_coefficient(t) * length - pull
        return or_exact(sde, t, s, kept, pull * alpha, g * torch.sqrt(length))


@dataclass(frozen=True)
class ReverseDiffusion(LinearPredictor):
    r"""The forward step from s to t, discretized and reversed in the same way.

    .. math::
        x_s = (2 - a) x_t + v \nabla \log p_t(x_t) + \sqrt{v}\, z

    with the exact scale a and variance v of p(x_t | x_s). With VE and VP these are the SMLD and
    DDPM discretizations of the paper. Weak order 1.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (appendix E).
    """

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        alpha, sigma = sde.marginal(t)
        scale, std = sde.transition(s, t)
        pull = (std / sigma).square()
        return StepCoefficients(2 - scale - pull, pull * alpha, std)


@dataclass(frozen=True)
class Ancestral(LinearPredictor):
    r"""The posterior of x_s given x_t and the predicted data: DDPM's sampler.

    .. math::
        x_s = \frac{a \sigma_s^2}{\sigma_t^2} x_t + \frac{\alpha_s v}{\sigma_t^2} x_0 +
        \mathrm{std}\, z

    with scale a and variance v of p(x_t | x_s). Weak order 1.

    Args:
        variance: "posterior" is v sigma_s^2 / sigma_t^2, exact for data at a point and, in the
            limit of small steps, for all data; "forward" is v, exact for data from N(0, I), and
            the SDE paper's choice for VP; "model" is the variance that the model has learned. The
            first two equal "fixed_small" and "fixed_large" of a model, but are not read from it. A
            learned fraction interpolates between the logarithms of the posterior and the forward
            variance of the actual step, on any grid. No noise is added at sigma_s = 0.

    Raises:
        ValueError: if variance is none of them, or "model" and the model predicts none.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239; Song et
    al., 2021, arXiv 2011.13456 (appendix F); Nichol and Dhariwal, Improved DDPM, 2021, arXiv
    2102.09672 (learned variances).
    """

    variance: str = "posterior"

    def __post_init__(self) -> None:
        check_choice("variance", self.variance, ("posterior", "forward", "model"))

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        (alpha_s, sigma_s), (_, sigma_t) = sde.marginal(s), sde.marginal(t)
        scale, std = sde.transition(s, t)
        kept, removed = (sigma_s / sigma_t).square(), (std / sigma_t).square()
        noise = std * sigma_s / sigma_t if self.variance == "posterior" else std
        return StepCoefficients(scale * kept, alpha_s * removed, noise)

    @override
    def noise_std(
        self, c: StepCoefficients, prediction: Prediction, sde: ForwardSDE, t: Tensor, s: Tensor
    ) -> Coefficient | None:
        if self.variance != "model":
            return c.std
        x = prediction.x
        (_, sigma_s), (_, sigma_t) = kernel(sde, x, s), kernel(sde, x, t)
        later, here, forward = (_broadcast(value, x) for value in (sigma_s, sigma_t, c.std))
        log_var = prediction.log_var
        if prediction.log_var_fraction is not None:
            # Finite at sigma_s = 0, where no noise is added.
            down = torch.log((later / here).clamp_min(torch.finfo(here.dtype).tiny))
            log_var = 2 * torch.log(forward) + 2 * (1 - prediction.log_var_fraction) * down
        if log_var is None:
            raise ValueError(
                "model: expected one that predicts a variance, such as "
                "EpsModel(..., variance='learned_range'), got none; a fixed variance is that of "
                "Ancestral('posterior') or Ancestral('forward')"
            )
        return torch.exp(0.5 * log_var) * (later > 0)


def _broadcast(coefficient: Coefficient | None, like: Tensor) -> Tensor:
    """Return a coefficient, (B,) or a float, as a tensor that multiplies a state (B, *D)."""
    dtype = schedule_dtype(like.device)
    value = torch.as_tensor(coefficient, dtype=dtype, device=like.device)
    return cast(Tensor, expand(value, like))


@explained
@dataclass(frozen=True)
class DDIM(LinearPredictor):
    r"""The generalized, possibly deterministic, sampler of DDIM.

    .. math::
        x_s = \alpha_s x_0 + \sqrt{\sigma_s^2 - \eta^2 \tau^2}\,\epsilon + \eta \tau z

    with tau^2 the posterior variance of `Ancestral`. At eta = 0 it is a first-order step of the
    probability flow, at eta = 1 the ancestral sampler.

    Args:
        eta: the fraction of the ancestral sampler's noise that is added, in [0, 1].

    Raises:
        ValueError: if eta is outside [0, 1].

    Source: Song et al., Denoising Diffusion Implicit Models, 2021, arXiv 2010.02502.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.eta, "eta")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: expected a number in [0, 1], got {self.eta}")

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        (alpha_s, sigma_s), (alpha_t, sigma_t) = sde.marginal(s), sde.marginal(t)
        noise = self.eta * sde.transition(s, t)[1] * sigma_s / sigma_t
        ratio = torch.sqrt((sigma_s.square() - noise.square()).clamp_min(0.0)) / sigma_t
        return StepCoefficients(ratio, alpha_s - alpha_t * ratio, noise if self.eta > 0 else None)
