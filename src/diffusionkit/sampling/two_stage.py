"""Predictors that evaluate the model twice: at the beginning of a step and at a stage within it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .._coefficients import Coefficient, add_noise
from ..interfaces import ScoreModel, Step
from ..random import Generators, step_noise
from .predictors import StepCoefficients, TabulatedPredictor


@dataclass(frozen=True, slots=True)
class StageCoefficients:
    """The coefficients of a two-stage step; see `TwoStagePredictor`.

    Args:
        middle: the time m of the second stage, (B,).
        inner: the coefficients of the second stage's state.
        first: the first stage's contribution to the result.
        second: the second stage's contribution to the result; its `x` may be the constant 0.
        used: 1 where the second stage is used, 0 where the first is the whole step, (B,) or a
            float.
        std: the standard deviation of the noise at the end of the step, (B,) or a float; None for
            no noise.
    """

    times: ClassVar[tuple[str, ...]] = ("middle",)

    middle: Tensor
    inner: StepCoefficients
    first: StepCoefficients
    second: StepCoefficients
    used: Coefficient = 1.0
    std: Coefficient | None = None


def vanishes(weight: Coefficient) -> bool:
    """Whether a weight is 0 for every sample."""
    if not isinstance(weight, Tensor):
        return not weight
    # A graph cannot depend on a value: it has both stages, and a weight of 0 for the second.
    return not torch.compiler.is_compiling() and not bool((weight != 0).any())


class TwoStagePredictor(TabulatedPredictor[StageCoefficients]):
    r"""A step with two evaluations; a subclass defines `coefficients` alone.

    .. math::
        x' = A_1 x_t + C_1 \hat x_0(x_t, t), \qquad
        x_s = A_2 x_t + C_2 \hat x_0(x_t, t) + A_3 x' + C_3 \hat x_0(x', m)
              \;(+\, \mathrm{std}\, z)

    with the pairs `inner`, `first` and `second`, and the time m, `middle`, of the second stage.
    """

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
        step = self.stages(model, x, t, c, cond)
        if c.std is None:
            return step
        noise = step_noise(step.mean, model.sde, t, s, generator=generator)
        return replace(step, x=add_noise(step.mean, c.std, noise))

    def stages(
        self, model: ScoreModel, x: Tensor, t: Tensor, c: StageCoefficients, cond: dict[str, Any]
    ) -> Step:
        """Take a state x (B, *D) through both stages, from times t (B,)."""
        prediction = model.predict(x, t, **cond)
        out = prediction.combine(x=c.first.x, x0=c.first.x0)
        if not vanishes(c.used):
            inner = prediction.combine(x=c.inner.x, x0=c.inner.x0)
            prediction = model.predict(inner, c.middle, **cond)
            out = prediction.add_to(out, x=c.second.x, x0=c.second.x0)
        return Step(out, out, prediction=prediction)
