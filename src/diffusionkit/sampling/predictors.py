r"""Predictors: moves from a time t to an earlier time s.

Each is linear in the state and the predicted data, x_s = A x_t + C x0 + std z, and differs in
its coefficients alone.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .._checks import check_number, check_step_times, readable
from .._grid_times import instant, tabulated
from .._schedules import exact, schedule_dtype
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..random import Generators, increment_like
from ..values import Coefficient, Prediction, add_noise, expand


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """The coefficients of x_s = x * x_t + x0 * (predicted data) + std * z.

    Args:
        x: the coefficient of the state, (B,) or a float.
        x0: the coefficient of the predicted data, (B,) or a float.
        std: the standard deviation of the noise, (B,) or a float; None where there is none.
    """

    x: Coefficient
    x0: Coefficient
    std: Coefficient | None


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
                f"rates, got t = {worst:g} with {type(predictor).__name__}; take a predictor of "
                "exact transitions there, such as Ancestral or DDIM, or begin at a smaller time"
            )


class LinearPredictor(Predictor):
    """A predictor given by three coefficients; a subclass writes `coefficients` alone."""

    @abc.abstractmethod
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        """Return the coefficients, each (n,), of moves from times t (n,) to s (n,)."""

    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:
        """Compute the coefficients of all moves at once, and leave them with the times.

        Raises:
            ValueError: if one of them is not finite (read on the CPU only).
        """
        table = tabulated(sde, times)
        if table is None:
            return
        instants, grid = table
        move = self.coefficients(sde, grid[:-1], grid[1:])
        check_rates(self, grid[:-1], move.x, move.x0, move.std)
        columns = [
            c.tolist() if isinstance(c, Tensor) else [c] * (len(grid) - 1)
            for c in (move.x, move.x0, move.std)
        ]
        for here, there, *row in zip(instants, instants[1:], *columns, strict=False):
            here.notes[id(self), there.time] = StepCoefficients(*row)

    def _move(self, sde: ForwardSDE, t: Tensor, s: Tensor, x: Tensor) -> StepCoefficients:
        here, there = instant(t, sde), instant(s, sde)
        if here is not None and there is not None:
            move: StepCoefficients | None = here.notes.get((id(self), there.time))
            if move is not None:
                return move
        check_step_times(s, t, sde.T, x)
        move = self.coefficients(sde, exact(t), exact(s))
        check_rates(self, t, move.x, move.x0, move.std)
        return move

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
        move = self._move(model.sde, t, s, x)
        prediction = model.predict(x, t, **cond)
        mean, std = (
            prediction.combine(x=move.x, x0=move.x0),
            self._std(move, prediction, model.sde, t, s),
        )
        del prediction  # its memory is the noise's
        if std is None:
            return Step(mean, mean)
        noise = increment_like(mean, generator, model.sde, t, s)
        return Step(add_noise(mean, std, noise), mean)

    def _std(
        self, move: StepCoefficients, prediction: Prediction, sde: ForwardSDE, t: Tensor, s: Tensor
    ) -> Coefficient | None:
        """Return the standard deviation of the noise, (B,), (B, *D) or a float; None for none."""
        return move.std


@dataclass(frozen=True)
class EulerMaruyama(LinearPredictor):
    r"""One Euler-Maruyama step of the reverse SDE.

    .. math::
        x_s = x_t - (f x_t - g^2 \nabla \log p_t)(t - s) + g \sqrt{t - s}\, z

    Weak order 1.

    Raises:
        ValueError: in `prepare` and `step`, from a time where alpha = 0 and the drift is infinite
            (read on the CPU only).

    Source: Song et al., 2021, arXiv 2011.13456.
    """

    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        """Return the coefficients of moves from times t (n,) to s (n,)."""
        alpha, sigma = sde.marginal(t)
        g, length = sde.diffusion(t), t - s
        pull = (g / sigma).square() * length
        return StepCoefficients(
            1 - sde.drift_coefficient(t) * length - pull, pull * alpha, g * torch.sqrt(length)
        )


@dataclass(frozen=True)
class ReverseDiffusion(LinearPredictor):
    r"""The forward step from s to t, discretised and reversed in the same way.

    .. math::
        x_s = (2 - a) x_t + v \nabla \log p_t(x_t) + \sqrt{v}\, z

    with scale a and variance v of p(x_t | x_s), taken exactly. With VE and VP these are the
    SMLD and DDPM discretisations of the paper. Weak order 1.

    Source: Song et al., 2021, arXiv 2011.13456 (appendix E).
    """

    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        """Return the coefficients of moves from times t (n,) to s (n,)."""
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
        variance: "posterior" is v sigma_s^2 / sigma_t^2, right for data at a point and at the
            limit of small steps for all data; "forward" is v, right for data from N(0, I), and
            what the SDE paper uses with VP; "model" is the variance that the model has learned.
            A learned fraction lies between the logarithms of the posterior's and the forward
            variance of the very step that is taken, on any grid. No noise is added where none
            is left, at sigma_s = 0.

    Raises:
        ValueError: if variance is none of them, or "model" and the model states none.

    Source: Ho et al., 2020, arXiv 2006.11239; Song et al., 2021, arXiv 2011.13456
    (appendix F); Nichol and Dhariwal, 2021, arXiv 2102.09672 (learned variances).
    """

    variance: str = "posterior"

    def __post_init__(self) -> None:
        if self.variance not in ("posterior", "forward", "model"):
            raise ValueError(
                f'variance: expected "posterior", "forward" or "model", got {self.variance!r}'
            )

    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        """Return the coefficients of moves from times t (n,) to s (n,)."""
        (alpha_s, sigma_s), (_, sigma_t) = sde.marginal(s), sde.marginal(t)
        scale, std = sde.transition(s, t)
        kept, gone = (sigma_s / sigma_t).square(), (std / sigma_t).square()
        noise = std * sigma_s / sigma_t if self.variance == "posterior" else std
        return StepCoefficients(scale * kept, alpha_s * gone, noise)

    def _std(
        self, move: StepCoefficients, prediction: Prediction, sde: ForwardSDE, t: Tensor, s: Tensor
    ) -> Coefficient | None:
        if self.variance != "model":
            return move.std
        (_, sigma_s), (_, sigma_t) = sde.kernel(s), sde.kernel(t)
        later, here, forward = (_broadcast(c, prediction.x) for c in (sigma_s, sigma_t, move.std))
        log_var = prediction.log_var
        if prediction.log_var_fraction is not None:
            # Finite at sigma_s = 0, where no noise is added.
            down = torch.log((later / here).clamp_min(torch.finfo(here.dtype).tiny))
            log_var = 2 * torch.log(forward) + 2 * (1 - prediction.log_var_fraction) * down
        if log_var is None:
            raise ValueError(
                "model: expected one that states a variance, such as "
                "EpsModel(..., variance='learned_range'), got none"
            )
        return torch.exp(0.5 * log_var) * (later > 0)


def _broadcast(coefficient: Coefficient | None, like: Tensor) -> Tensor:
    """Return a coefficient, (B,) or a float, as a tensor that multiplies a state (B, *D)."""
    dtype = schedule_dtype(like.device)
    known = torch.as_tensor(coefficient, dtype=dtype, device=like.device)
    return cast(Tensor, expand(known, like))


@dataclass(frozen=True)
class DDIM(LinearPredictor):
    r"""The generalised, possibly deterministic, sampler of DDIM.

    .. math::
        x_s = \alpha_s x_0 + \sqrt{\sigma_s^2 - \eta^2 \tau^2}\,\epsilon + \eta \tau z

    with tau^2 the posterior variance of `Ancestral`. At eta = 0 it is a first-order step of the
    probability flow, at eta = 1 the ancestral sampler.

    Args:
        eta: how much of the ancestral sampler's noise is added, in [0, 1].

    Raises:
        ValueError: if eta is outside [0, 1].

    Source: Song et al., Denoising Diffusion Implicit Models, 2021, arXiv 2010.02502.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.eta, "eta")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: expected a number in [0, 1], got {self.eta}")

    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        """Return the coefficients of moves from times t (n,) to s (n,)."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = sde.marginal(s), sde.marginal(t)
        noise = self.eta * sde.transition(s, t)[1] * sigma_s / sigma_t
        ratio = torch.sqrt((sigma_s.square() - noise.square()).clamp_min(0.0)) / sigma_t
        return StepCoefficients(ratio, alpha_s - alpha_t * ratio, noise if self.eta > 0 else None)
