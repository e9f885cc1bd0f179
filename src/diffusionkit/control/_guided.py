"""What all guidance shares: a model within a model, and gradients in any gradient mode."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, check_part, readable
from .._numerics import instant
from ..interfaces import ForwardSDE, ScoreModel
from ..values import Coefficient, Prediction, linear


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
                "the data there; start a little before"
            )
        return alpha, sigma

    def _pushed(self, said: Prediction, x: Tensor, t: Tensor, push: Tensor) -> Prediction:
        """Return a prediction whose score is the said one plus a push (B, *D).

        Data and noise are changed each on their own: neither has digits to lose to the other,
        however small sigma or alpha.
        """
        alpha, sigma = self._kernel(t)
        return Prediction(
            x,
            linear(1.0, _settled(said.x0), sigma * (sigma / alpha), push),
            linear(1.0, _settled(said.eps), -sigma, push),
            alpha,
            sigma,
            None if said.log_var is None else _settled(said.log_var),
            None if said.log_var_fraction is None else _settled(said.log_var_fraction),
        )


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
    value: Tensor, x: Tensor, name: str, *, along: Tensor | None = None, keep: bool = False
) -> Tensor:
    """Return the gradient by x (B, *D) of a value's sum, or of its product with `along`.

    Args:
        value: what was made of x, with its graph.
        x: the state.
        name: who made it, for the message.
        along: the vector of the product, of the value's shape.
        keep: whether the gradient is to be differentiated itself.

    Raises:
        ValueError: if no gradient flows from the value to x.
    """
    found: Tensor | None = None
    if value.requires_grad:
        again = along is not None or keep  # products are asked for one after another
        along = torch.ones_like(value) if along is None else along
        (found,) = torch.autograd.grad(
            value, x, along, retain_graph=again, create_graph=keep, allow_unused=True
        )
    if found is None:
        raise ValueError(f"{name}: expected a differentiable function, got one without a gradient")
    return found
