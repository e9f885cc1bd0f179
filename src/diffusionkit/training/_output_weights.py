"""Weights of the error of a model's own output."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from .._checks import readable
from .._schedules import exact, home
from ..interfaces import ForwardSDE, Weighting
from ..values import Prediction


def output_weights(
    weighting: Weighting, sde: ForwardSDE, prediction: Prediction, t: Tensor
) -> Tensor:
    r"""Return the weights (B,) of the squared error of a model's output, in float64.

    .. math::
        w(t)\, \|\hat\epsilon - \epsilon\|^2
        = w(t)\, k(t)^2\, \|F - a x_0 - b \epsilon\|^2

    Where alpha or sigma is 0 a weight may be infinite and k zero, or the other way round. Their
    product is then its limit, computed beside that time; infinite if there is none.

    Args:
        weighting: the weights w of the noise-prediction error.
        sde: the process.
        prediction: the model's prediction.
        t: the times (B,).
    """
    product = exact(weighting(sde, t)) * prediction.noise_factor() ** 2
    if readable(product):
        finite = bool(torch.isfinite(product).all())
    else:
        finite = not (torch.compiler.is_compiling() or _reaches_noise(sde))
    if finite:
        return product
    near, further = (_beside(weighting, sde, prediction, t, step) for step in (1.0, 2.0))
    # A pole grows towards it; a limit is approached linearly.
    limit = torch.where(near > 1.1 * further, torch.inf, (2 * near - further).clamp_min(0.0))
    return torch.where(torch.isfinite(product), product, limit)


def _reaches_noise(sde: ForwardSDE) -> bool:
    """Return whether alpha(T) = 0, for a process whose schedule is on the CPU."""
    last = torch.tensor([sde.T], dtype=torch.float64)
    return home(sde).type == "cpu" and float(sde.marginal(last)[0]) == 0.0


def _beside(
    weighting: Weighting, sde: ForwardSDE, prediction: Prediction, t: Tensor, step: float
) -> Tensor:
    """Return the weights (B,) at times a small step inside [0, T]."""
    t = exact(t)
    step = step * sde.T * sqrt(torch.finfo(t.dtype).eps)
    t = t.clamp(step, sde.T - step)
    return exact(weighting(sde, t)) * prediction.noise_factor(*sde.marginal(t)) ** 2
