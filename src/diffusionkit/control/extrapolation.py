r"""Guidance along the difference of two predictions: its scale, interval, projection and rescaling.

Classifier-free guidance and autoguidance differ only in which two predictions are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_callable, check_number, readable
from .._coefficients import Coefficient, expand, linear
from .._grid_times import kernel
from ..interfaces import ScoreModel
from ..values import Prediction
from ._directions import averaged
from ._guided import GuidedModel, check_scale, shape_or_type

Projection = Callable[[Tensor, Tensor], Tensor]
Evaluation = Callable[[], Prediction]


class ExtrapolatedModel(GuidedModel):
    r"""A model extrapolated away from a weaker prediction, along their difference.

    .. math::
        \hat x_0 = \hat x_0^{strong} + (\mathrm{scale} - 1)\, P(d), \quad
        d = \hat x_0^{strong} - \hat x_0^{weak}

    with P the projection, the identity by default. A subclass defines the two predictions.
    """

    def __init__(
        self,
        model: ScoreModel,
        scale: float,
        interval: tuple[float, float] | None,
        rescale: float | None,
        projection: Projection | None,
    ) -> None:
        """Keep the model and the options."""
        super().__init__(model)
        check_scale(scale)
        if interval is not None:
            if not isinstance(interval, (tuple, list)):
                raise TypeError(f"interval: expected a pair (low, high), got {interval!r}")
            if len(interval) != 2:
                raise ValueError(f"interval: expected a pair (low, high), got {interval}")
            low, high = interval
            check_number(low, "interval")
            check_number(high, "interval")
            if not 0 <= low < high:
                raise ValueError(f"interval: expected 0 <= low < high, got {low} and {high}")
        if rescale is not None:
            check_number(rescale, "rescale")
            if not 0 <= rescale <= 1:
                raise ValueError(f"rescale: expected a number in [0, 1], got {rescale}")
        if projection is not None:
            check_callable(projection, "projection")
        self.scale = scale
        self.interval = interval
        self.rescale = rescale
        self.projection = projection

    def _extrapolated(
        self, x: Tensor, t: Tensor, weak: Evaluation, strong: Evaluation, *, alone: bool
    ) -> Prediction:
        """Return the prediction in a state x (B, *D) at times t (B,).

        Args:
            x: the state.
            t: the times.
            weak: evaluates the prediction to go away from.
            strong: evaluates the prediction to start from.
            alone: whether the weak one is complete, so that it is the result at scale 0.
        """
        alpha, sigma = kernel(self.sde, x, t)
        scale = self._scale(alpha, sigma)
        if not isinstance(scale, Tensor) and (scale == 1.0 or (alone and scale == 0.0)):
            return strong() if scale else weak()
        below, prediction = weak(), strong()
        start, end = below.x0, prediction.x0
        difference = end - start
        direction = averaged(self, difference)
        learned = {"log_var": prediction.log_var, "log_var_fraction": prediction.log_var_fraction}
        if self.projection is None and direction is difference:
            x0 = linear(1.0, start, scale, difference)
            if not self.rescale:
                start, end = below.eps, prediction.eps
                eps = linear(1.0, start, scale, end - start)
                return Prediction(x, x0, eps, alpha, sigma, **learned)
        else:
            x0 = linear(1.0, end, scale - 1.0, self._projected(direction, end))
        if self.rescale:
            x0 = _rescaled(x0, end, self.rescale)
        return Prediction.from_output(x, x0, alpha, sigma, a=1.0, b=0.0, **learned)

    def _projected(self, direction: Tensor, x0: Tensor) -> Tensor:
        """Return the projected direction (B, *D)."""
        if self.projection is None:
            return direction
        found = self.projection(direction, x0)
        if not isinstance(found, Tensor) or found.shape != direction.shape:
            raise ValueError(
                f"projection: expected a direction of shape {tuple(direction.shape)}, "
                f"got {shape_or_type(found)}"
            )
        return found.to(x0.dtype)

    def _scale(self, alpha: Coefficient, sigma: Coefficient) -> Coefficient:
        """Return the scale at a noise level: a float, or (B,) where it differs between samples."""
        scale = float(self.scale)
        if self.interval is None:
            return scale
        low, high = self.interval
        if not isinstance(sigma, Tensor) or not isinstance(alpha, Tensor):
            return scale if sigma > low * alpha and alpha >= sigma / high else 1.0
        # Not as sigma / alpha: alpha may be 0, and high infinite.
        inside = (sigma > low * alpha) & (alpha >= sigma / high)
        if readable(inside) and not bool(inside.any()):
            return 1.0
        return torch.where(inside, scale, torch.ones_like(sigma))


@dataclass(frozen=True)
class AdaptiveProjection:
    r"""Adaptive projected guidance (APG): a direction that is bounded, and damped along the data.

    .. math::
        P(d) = d'_\perp + \mathrm{parallel}\; d'_\parallel, \quad
        d' = \min\left(1, \frac{\mathrm{max\_norm}}{\|d\|}\right) d

    where the parallel part is that along the predicted data of the sample. It mostly scales them,
    which saturates images at large scales; the other part changes what they show. Pass it as
    `projection=` to `ClassifierFreeGuidance` or `Autoguidance`: the guided data are
    x0 + (scale - 1) P(d), the paper's form, and at scale 1 they are those of the model. You can
    pass your own function (direction (B, \*D), x0 (B, \*D)) -> direction instead.

    The paper's third part is a momentum along the sampling trajectory. A prediction does not
    depend on earlier ones, so it belongs to the predictor: `GuidanceMomentum`.

    Args:
        parallel: the factor of the parallel part, eta in the paper; 1 does not damp it.
        max_norm: the largest norm of a sample's direction, r in the paper, in units of the data.
            The paper takes 2.5 to 15 for images and latents; the norm grows with the square root of
            the number of pixels.

    Raises:
        ValueError: unless parallel is finite and max_norm positive.
        TypeError: if parallel or max_norm is not a number.

    Source: Sadat et al., Eliminating Oversaturation and Artifacts of High Guidance Scales in
    Diffusion Models, 2025, arXiv 2410.02416 (algorithm 1).

    >>> import torch
    >>> from diffusionkit import AdaptiveProjection
    >>> project = AdaptiveProjection(parallel=0.0, max_norm=2.5)
    >>> direction, x0 = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    >>> project(direction, x0)
    tensor([[0., 2.]])
    """

    parallel: float = 0.0
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        check_number(self.parallel, "parallel")
        check_number(self.max_norm, "max_norm")
        if not math.isfinite(self.parallel):
            raise ValueError(f"parallel: expected a finite number, got {self.parallel}")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm: expected a number > 0, got {self.max_norm}")

    def __call__(self, direction: Tensor, x0: Tensor) -> Tensor:
        """Return the projection (B, *D) of directions (B, *D) at predicted data x0 (B, *D)."""
        d, along = direction.reshape(len(direction), -1), x0.reshape(len(x0), -1)
        if math.isfinite(self.max_norm):
            size = d.norm(dim=1, keepdim=True)
            d = d * torch.where(size > self.max_norm, self.max_norm / size, 1.0)
        along = torch.nn.functional.normalize(along, dim=1)
        parallel = (d * along).sum(1, keepdim=True) * along
        return (d - (1 - self.parallel) * parallel).view_as(direction)


def _rescaled(x0: Tensor, like: Tensor, amount: float) -> Tensor:
    """Return data (B, *D) with their standard deviation moved towards that of other data."""
    now, wanted = (data.reshape(len(data), -1).std(1, correction=0) for data in (x0, like))
    factor = torch.where(now > 0, wanted / now, 1.0)  # constant data have no scale
    return x0 * expand(amount * factor + 1 - amount, x0)
