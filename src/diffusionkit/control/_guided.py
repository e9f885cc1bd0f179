"""What all guidance shares: a model within a model, and gradients in any gradient mode."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, check_part, readable
from .._grid_times import instant
from ..interfaces import ForwardSDE, ScoreModel
from ..values import Coefficient, Prediction, expand, linear


class GuidedPrediction(Prediction):
    """Data and noise of a state in half precision, kept in float32 and handed out as the state is.

    Where alpha is 5e-5, as at the end of a cosine chain, guided data can be beyond float16.
    """

    __slots__ = ()

    @property
    def x0(self) -> Tensor:
        """The predicted data (B, *D)."""
        return super().x0.to(self._x.dtype)

    @property
    def eps(self) -> Tensor:
        """The predicted noise (B, *D)."""
        return super().eps.to(self._x.dtype)

    def _noise(self, factor: Coefficient) -> Tensor:
        return super()._noise(factor).to(self._x.dtype)


class GuidedModel(ScoreModel):
    """A model that changes what another one says; what the other states is handed on."""

    def __init__(self, model: ScoreModel) -> None:
        """Keep the model, and take over its process, range of data and variance."""
        super().__init__()
        check_part(model, ScoreModel, "model")
        self.model = model
        self.sde = model.sde
        self.data_range = getattr(model, "data_range", None)
        self.variance = getattr(model, "variance", None)

    def _kernel(self, t: Tensor) -> tuple[Coefficient, Coefficient]:
        """Return alpha and sigma, or raise where there is no data left to be guided."""
        alpha, sigma = self.sde.kernel(t)
        known = not isinstance(alpha, Tensor) or readable(alpha)
        if known and float(torch.as_tensor(alpha).min()) == 0.0:
            raise ValueError(
                "expected alpha > 0, got alpha = 0: a gradient of the score does not determine "
                "the data there; begin a little before, with a sampler's grid of times such as "
                "torch.linspace(0.99 * sde.T, sde.t_stop, steps + 1)"
            )
        return alpha, sigma

    def _pushed(self, prediction: Prediction, x: Tensor, t: Tensor, push: Tensor) -> Prediction:
        """Return a prediction whose score is the said one plus a push (B, *D).

        Data and noise are changed each on their own: neither has digits to lose to the other,
        however small sigma or alpha.
        """
        alpha, sigma = self._kernel(t)
        return GuidedPrediction(
            x,
            linear(1.0, _settled(wide_data(prediction, alpha)), sigma * (sigma / alpha), push),
            linear(1.0, _settled(widened(prediction.eps)), -sigma, push),
            alpha,
            sigma,
            None if prediction.log_var is None else _settled(prediction.log_var),
            None if prediction.log_var_fraction is None else _settled(prediction.log_var_fraction),
        )


def widened(value: Tensor) -> Tensor:
    """Return a value in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def held_share(x: Tensor, alpha: Coefficient, room: float = 1.0) -> Coefficient | None:
    """Return what to multiply data by in a state's half precision, room * alpha; else None.

    The data by themselves, (x - sigma eps) / alpha, may be beyond it before the difference; so
    may gradients by them, which get room: what is below 6e-5 has few digits in float16.
    """
    if x.dtype.itemsize >= 4:
        return None
    if isinstance(alpha, Tensor):
        return torch.where(alpha > 0, (room * alpha).clamp(max=1.0), 1.0)
    return min(room * alpha, 1.0) or 1.0


def wide_data(prediction: Prediction, alpha: Coefficient) -> Tensor:
    """Return the predicted data (B, *D) in float32 at least."""
    share = held_share(prediction.x, alpha)
    if share is None:
        return prediction.x0
    part = widened(prediction.combine(x=0.0, x0=share))
    return part / expand(share, part)


def _settled(value: Tensor) -> Tensor:
    """Return a value without the graph that guidance had made for itself."""
    return value if torch.is_grad_enabled() else value.detach()


def check_scale(scale: float) -> None:
    """Raise unless a scale is a finite number."""
    check_number(scale, "scale")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


def leaf(x: Tensor) -> Tensor:
    """Return a state by which one can differentiate: the same where gradients are wanted of it."""
    return x if x.requires_grad else recordable(x).detach().requires_grad_()


def recordable(value: Any, sde: ForwardSDE | None = None) -> Any:
    """Return what autograd may keep for the way back: a copy, if made in inference mode.

    Call it where inference mode is off. A time tensor keeps what is known of it for the process.
    """
    if not (isinstance(value, Tensor) and value.is_inference()):
        return value
    copy = value.clone()
    if (known := instant(value, sde)) is not None:
        copy._instant = known  # type: ignore[attr-defined]
    return copy


def gradient(
    value: Tensor,
    x: Tensor,
    name: str,
    *,
    along: Tensor | None = None,
    share: Coefficient | None = None,
    keep: bool = False,
) -> Tensor:
    """Return the gradient by x (B, *D) of a value's sum, or of its product with `along`.

    Args:
        value: what was made of x, with its graph.
        x: the state.
        name: who made it, for the message.
        along: the vector of the product, of the value's shape.
        share: a factor (B,) or float to go the way back with, so that nothing overflows there:
            `held_share` with room 64, for a value of the data. The gradient is then in float32.
        keep: whether the gradient is to be differentiated itself.

    Raises:
        ValueError: if no gradient flows from the value to x.
    """
    found: Tensor | None = None
    if value.requires_grad:
        again = along is not None or keep  # products are asked for one after another
        along = torch.ones_like(value) if along is None else along
        if share is not None:
            along = (along * expand(share, along)).to(value.dtype)
        (found,) = torch.autograd.grad(
            value, x, along, retain_graph=again, create_graph=keep, allow_unused=True
        )
    if found is None:
        raise ValueError(f"{name}: expected a differentiable function, got one without a gradient")
    return found if share is None else widened(found) / expand(share, found)
