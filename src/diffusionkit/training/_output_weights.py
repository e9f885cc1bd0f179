"""Weights of the error of a model's own output."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from .._ones import product
from .._schedules import exact, home
from .._sigma_data import over_channels
from ..interfaces import ForwardSDE, Weighting
from ..values import Prediction


def output_weights(
    weighting: Weighting, sde: ForwardSDE, prediction: Prediction, t: Tensor
) -> Tensor | None:
    r"""Return the weights (B,) of the squared error of a model's output, None for weights of 1.

    .. math::
        w(t)\, \|\hat\epsilon - \epsilon\|^2
        = w(t)\, k(t)^2\, \|F - a x_0 - b \epsilon\|^2

    Where alpha or sigma is 0 a weight may be infinite and k zero, or the other way round: see
    `limits`.

    Args:
        weighting: the weights w of the noise-prediction error.
        sde: the process.
        prediction: the model's prediction.
        t: the times (B,).
    """
    unit = getattr(weighting, "_unit", None)
    if unit is not None and unit == prediction._unit:
        return None
    weights, factor = weighting(sde, t), prediction.noise_factor()
    if isinstance(factor, Tensor):
        return product(factor * factor, weights)
    return weights if factor == 1.0 else exact(weights) * factor**2


def channel_weighted(squares: Tensor, weights: Tensor | None, weighting: Weighting) -> Tensor:
    """Return squared errors (B, *D) times the weights (B, C) of channels, None for 1.

    They are what `per_channel` of a weighting returns, relative to the weights of its call.
    """
    if weights is None:
        return squares
    if squares.ndim < 2 or weights.shape != squares.shape[:2]:
        raise ValueError(
            f"weighting: expected weights of {tuple(squares.shape[:2])} channels of the data, got "
            f"{tuple(weights.shape)} from {weighting}"
        )
    return squares * over_channels(weights, squares)


def limits(
    weights: Tensor, weighting: Weighting, sde: ForwardSDE, prediction: Prediction, t: Tensor
) -> Tensor:
    """Return output weights (B,), and their limits in time where they are not finite.

    A limit is computed next to the time, and infinite if there is none.
    """
    near, further = (_beside(weighting, sde, prediction, t, step) for step in (1.0, 2.0))
    # A pole grows towards it; a limit is approached linearly.
    limit = torch.where(near > 1.1 * further, torch.inf, (2 * near - further).clamp_min(0.0))
    return torch.where(torch.isfinite(weights), weights.to(limit.dtype), limit)


def reaches_noise(sde: ForwardSDE) -> bool:
    """Return whether alpha(T) = 0, for a process whose schedule is on the CPU."""
    if home(sde).type != "cpu":
        return False
    return float(sde.marginal(torch.tensor([sde.T], dtype=torch.float64))[0]) == 0.0


def _beside(
    weighting: Weighting, sde: ForwardSDE, prediction: Prediction, t: Tensor, step: float
) -> Tensor:
    """Return the weights (B,) at times a small step inside [0, T]."""
    t = exact(t)
    step = step * sde.T * sqrt(torch.finfo(t.dtype).eps)
    t = t.clamp(step, sde.T - step)
    return exact(weighting(sde, t)) * prediction.noise_factor(*sde.marginal(t)) ** 2
