"""An adaptive solver of the reverse SDE, with its own step lengths for each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_count, check_positive, check_step_times
from .._coefficients import linear
from .._precision import at_least_float32
from .._schedules import exact, schedule_dtype
from ..distributed.gathered import gathered_weights
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..random import Generators, NoisePath, rand
from ..values import Prediction
from .brownian import BrownianPath
from .predictors import or_exact

_FIRST = 0.01  # of T, the first step
_SAFETY = 0.9
_POWER = 2 / 3  # the two proposals differ by O(h^(3/2))
_LEAST, _MOST = 0.1, 5.0  # bounds of the factor between consecutive steps
# A step that ends this close to the end goes there: what is left may be too short for a path.
_STRETCH = 1.01


@dataclass(frozen=True)
class AdaptiveSDE(Predictor):
    r"""A step of the reverse SDE in internal steps, adapted to a tolerance for each sample.

    A step of length h makes two proposals with the same noise, Euler-Maruyama's and Heun's,

    .. math::
        x' = x - h\, d(x, t) + g_t \sqrt h\, z, \quad
        x'' = \tfrac12 \left(x' + x - h\, d(x', t - h) + g_{t - h} \sqrt h\, z\right), \quad
        d = f x - g^2 \nabla \log p,

    and is accepted, as x'', where

    .. math::
        E = \frac{1}{\sqrt D} \left\| \frac{x' - x''}{\delta} \right\|_2 \le 1, \quad
        \delta = \max(\mathrm{atol}, \mathrm{rtol} \max(|x|, |x'|)).

    Then h becomes .9 h E^(-2/3). Each step takes two evaluations of the whole batch, until its
    slowest sample arrives. `PCSampler(model, AdaptiveSDE(), steps=1)` is the whole solver; on a
    longer grid, with correctors or constraints at its times, step lengths carry over from one grid
    step to the next. A run to a time without noise ends with a step from the SDE's t_stop, where
    the model is last defined, to the predicted data.

    A rejected step must not be repeated with new noise: on Gaussian data that made the standard
    deviation 1.2 to 2 times too large, most at tight tolerances. All noise is therefore the
    increments of a `BrownianPath`: the one passed as generator, or one with seeds drawn from it.

    Args:
        rtol: the tolerance relative to the state.
        atol: the absolute tolerance, in units of the state; one level of an image in [-1, 1] by
            default.
        max_steps: the largest number of internal steps, rejected ones included.

    Raises:
        ValueError: unless the tolerances are positive and max_steps >= 1; in `step`, if max_steps
            is too small or a prediction is not finite.
        TypeError: if a setting is not a number.

    Source: Jolicoeur-Martineau et al., Gotta Go Fast When Generating Data with Score-Based
    Models, 2021, arXiv 2105.14080 (algorithm 1, with r = 2/3 for .9, and x for x'_prev).

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, AdaptiveSDE, GaussianMixtureModel, PCSampler
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> sampler = PCSampler(model, AdaptiveSDE(rtol=0.05), steps=1)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    """

    rtol: float = 0.01
    atol: float = 2 / 255
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        check_count(self.max_steps, "max_steps")

    @override
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any = None,  # the lengths of the next steps (B,)
        /,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        check_step_times(s, t, model.sde.T, x)
        with gathered_weights(model):  # the number of internal steps differs between processes
            return self._steps(model, x, t, s, state, generator, cond)

    def _steps(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any,
        generator: Generators,
        cond: dict[str, Any],
    ) -> Step:
        sde = model.sde
        x = at_least_float32(x)
        path = generator if isinstance(generator, NoisePath) else _path(len(x), generator)
        t, s = exact(t), exact(s)
        alpha, sigma = sde.marginal(s)
        clean = sigma == 0
        end = torch.where(clean, s.clamp_min(sde.t_stop), s).minimum(t)
        length = torch.full_like(t, _FIRST * sde.T) if state is None else state
        out = mean = x
        prediction = None
        left = end < t * (1 - 1e-6)  # rounding of a float32 time is not a step
        for _ in range(self.max_steps):
            if not bool(left.any()):
                break
            # A sample that has arrived stays at the start of its last step, where the model is
            # defined.
            ahead = torch.where(t - _STRETCH * length > end, t - length, end)
            to = torch.where(left, ahead, 0.5 * (t + s))
            first, last, last_mean, prediction = _proposals(model, x, t, to, path, cond)
            error = self._error(x, first, last)
            if not bool(torch.isfinite(error).all()):
                worst = t[~torch.isfinite(error)][0]
                raise ValueError(
                    "model: expected finite predictions, got NaN or infinity in a step from "
                    f"t = {float(worst):g}"
                )
            accepted = left & (error <= 1)
            arrived = accepted & (to <= end)
            factor = (_SAFETY * error.clamp_min(1e-9) ** -_POWER).clamp(_LEAST, _MOST)
            factor = torch.where(sde.marginal(t)[0] > 0, factor, 1.0)  # an exact step
            wanted = (t - to) * factor
            # The end cut the last step short; the next one may be longer.
            wanted = torch.where(arrived, torch.maximum(wanted, length), wanted)
            length = torch.where(left, wanted, length)
            out, mean = _where(arrived, last, out), _where(arrived, last_mean, mean)
            left = left & ~arrived
            moved = accepted & left
            x, t = _where(moved, last, x), torch.where(moved, to, t)
        if bool(left.any()):
            raise ValueError(
                f"max_steps: expected enough steps to reach s, got {self.max_steps}, which reach "
                f"t = {float(t[left].max()):g}; raise rtol and atol, or max_steps"
            )
        if bool(clean.any()):
            prediction = model.predict(out, end, **cond)
            data = linear(alpha, prediction.x0, 0.0, prediction.x0)
            out, mean = _where(clean, data, out), _where(clean, data, mean)
        return Step(out, mean, length, prediction)

    def _error(self, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Return the root mean square of the error over its tolerance, (B,)."""
        size = (self.rtol * torch.maximum(x.abs(), first.abs())).clamp_min(self.atol)
        ratio = ((first - last) / size).reshape(len(x), -1).to(schedule_dtype(x.device))
        return ratio.square().mean(1).sqrt()


def _path(batch: int, generator: Generators) -> BrownianPath:
    """Return a path for a batch, with seeds drawn from a generator."""
    u = rand(batch, generator=generator, dtype=torch.float64)
    return BrownianPath((u * 2.0**53).long().tolist())


def _where(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return x in some rows (B,) and y in the others."""
    return torch.where(rows.view(-1, *(1,) * (x.ndim - 1)), x, y)


def _proposals(
    model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, path: NoisePath, cond: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Prediction]:
    """Return x', x'' and x'' without its noise, each (B, *D), and the second prediction.

    From a time where alpha = 0, and the rates are infinite, both are an exact transition.
    """
    noise, h = path.increment(x, model.sde, t, s), t - s
    p, q, g = _reverse(model.sde, t)
    c = or_exact(model.sde, t, s, 1 - h * p, -h * q, g * h.sqrt())
    before = model.predict(x, t, **cond).combine(x=c.x, x0=c.x0)
    first = linear(1.0, before, cast(Tensor, c.std), noise)
    p, q, g_s = _reverse(model.sde, s)
    prediction = model.predict(first, s, **cond)
    mean = 0.5 * (before + x + prediction.combine(x=-h * p, x0=-h * q))
    last = linear(1.0, mean, 0.5 * (g + g_s) * h.sqrt(), noise)
    exactly = model.sde.marginal(t)[0] == 0
    return first, _where(exactly, first, last), _where(exactly, before, mean), prediction


def _reverse(sde: ForwardSDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, q and g, each (n,), of the reverse SDE dx = (p x + q x0) dt + g dw."""
    alpha, sigma = sde.marginal(t)
    g = sde.diffusion(t)
    pull = (g / sigma).square()
    return sde.drift_coefficient(t) + pull, -pull * alpha, g
