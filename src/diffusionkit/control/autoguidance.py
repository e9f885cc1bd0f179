"""Autoguidance: a model against a weaker version of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from .._checks import check_part
from .._keywords import explained
from ..interfaces import ScoreModel
from ..values import Prediction
from ._guided import check_process
from .extrapolation import ExtrapolatedModel, Projection

_ADVICE = "; pass ScheduleTransformedModel(weaker, model.sde)"


@explained
class Autoguidance(ExtrapolatedModel):
    r"""A model extrapolated away from the prediction of a weaker model of the same data.

    .. math::
        \hat x_0 = \hat x_0^{weaker} + \mathrm{scale}\,
        (\hat x_0^{model} - \hat x_0^{weaker})

    and the same for the noise. The weaker model is smaller, or an early snapshot of the same
    training; it makes similar but larger errors, and the difference points away from the errors.
    Unlike `ClassifierFreeGuidance` this needs no condition, and does not trade diversity for
    typicality. At scale 1 it is the model itself, in one evaluation.

    Both models may be guided themselves: pass `ClassifierFreeGuidance(model, 2.0)` as the model, or
    this as the model of another guidance. Conditions go to both models, unless `conditions` names
    those that the weaker one takes.

    Args:
        model: the score model.
        weaker: a worse score model of the same process and the same data.
        scale: the factor of the difference, 1 to 3 in the paper.
        interval: the noise levels, low < sigma / alpha <= high, in which to guide. Outside, the
            model is used alone, in one evaluation where no sample of the batch is inside.
        rescale: how far, in [0, 1], to bring the standard deviation of each sample's predicted
            data to that of the model's prediction.
        conditions: the names of the conditions that are passed to the weaker model: all by
            default, () for an unconditional one.
        projection: changes the difference before it is scaled, such as `AdaptiveProjection`.

    Raises:
        ValueError: unless scale is finite, interval a pair with 0 <= low < high, and rescale in
            [0, 1]; if the weaker model has another process or data range; in a call, if the
            projection changes the shape.
        TypeError: if a part or a number has the wrong type, or conditions is not a sequence of
            names.

    Source: Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024,
    arXiv 2406.02507; Kynkaanniemi et al., 2024, arXiv 2404.07724 (the interval).

    >>> import torch
    >>> from diffusionkit import VPSDE, Autoguidance, X0Model
    >>> model = X0Model(lambda x, noise_label: 0 * x + 2, VPSDE())
    >>> weaker = X0Model(lambda x, noise_label: 0 * x + 1, VPSDE())
    >>> guided = Autoguidance(model, weaker, scale=3.0)
    >>> guided.predict(torch.zeros(1, 2), torch.tensor([0.5])).x0
    tensor([[4., 4.]])
    """

    def __init__(
        self,
        model: ScoreModel,
        weaker: ScoreModel,
        scale: float,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
        *,
        conditions: Sequence[str] | None = None,
        projection: Projection | None = None,
    ) -> None:
        """Keep the two models and the options."""
        super().__init__(model, scale, interval, rescale, projection)
        check_part(weaker, ScoreModel, "weaker")
        check_process(weaker, self.sde, "weaker", rtol=1e-5, advice=_ADVICE)
        known, expected = getattr(weaker, "data_range", None), self.data_range
        if known is not None and expected is not None and tuple(known) != tuple(expected):
            raise ValueError(f"weaker: expected the model's data_range, {expected}, got {known}")
        if conditions is not None:
            names = isinstance(conditions, (tuple, list))
            if not names or not all(isinstance(name, str) for name in conditions):
                raise TypeError(
                    f"conditions: expected a tuple or list of names, got {conditions!r}"
                )
        self.weaker = weaker
        self.conditions = conditions

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        names = cond if self.conditions is None else self.conditions
        known = {name: value for name, value in cond.items() if name in names}
        return self._extrapolated(
            x,
            t,
            weak=lambda: self.weaker.predict(x, t, **known),
            strong=lambda: self.model.predict(x, t, **cond),
            alone=False,  # its learned variance, if any, is not the model's
        )
