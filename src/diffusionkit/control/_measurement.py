r"""Guidance by measurements with Gaussian noise, given a covariance of the predicted data.

A sample's residual is multiplied by the inverse of its covariance, which is never formed: the
solver needs its products only.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import (
    check_callable,
    check_count,
    check_finite,
    check_known,
    check_number,
    check_positive,
    check_state,
    readable,
)
from .._coefficients import Coefficient, expand
from .._grid_times import kernel
from .._precision import at_least_float32
from ..interfaces import ScoreModel
from ..random import randn_like
from ..values import Prediction
from ._guided import GuidedModel, gradient, shape_or_type
from ._minimal_residual import minimal_residual

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of predicted data, with their graph.

    Args:
        x0: the predicted data (B, *D).
        y: their measurements (B, *E).
        backward: maps v (B, *E) to its product with the Jacobian of y by the state, (B, *D).
        alpha: the scale of the data, (B,) or a float.
        sigma: the standard deviation of the noise, (B,) or a float.
        keep: whether products are differentiated in turn.
    """

    x0: Tensor
    y: Tensor
    backward: Linear
    alpha: Coefficient
    sigma: Coefficient
    keep: bool

    def covariance(self, v: Tensor) -> Tensor:
        """Return C J^T v (B, *D) with C the covariance of the data that the model implies."""
        return times(self.sigma * (self.sigma / self.alpha), self.backward(v))

    def adjoint(self, v: Tensor) -> Tensor:
        """Return J^T v (B, *D)."""
        return gradient(self.y, self.x0, "operator", along=v.to(self.y.dtype), keep=self.keep)


class MeasurementGuidance(GuidedModel):
    r"""A model guided by a measurement y = A(x0) + noise, x0 given x being Gaussian.

    .. math::
        s(x, t) = \nabla \log p_t(x) +
        \nabla_x \hat x_0^\top J^\top S^{-1} (y - A(\hat x_0)), \quad
        S = \mathrm{diag}(\tau^2) + J C J^\top

    with J the Jacobian of A at the predicted data. A subclass defines the products with J C J^T.
    """

    y: Tensor
    noise_std: float | Tensor
    _symmetric = False  # whether J C J^T is exactly symmetric

    def __init__(
        self,
        model: ScoreModel,
        operator: Linear,
        y: Tensor,
        noise_std: float | Tensor,
        iterations: int,
        tolerance: float,
    ) -> None:
        """Keep the measurement."""
        super().__init__(model)
        check_callable(operator, "operator")
        check_state(y, "y")
        check_finite(y, "y")
        _check_noise(noise_std, y)
        check_count(iterations, "iterations")
        check_positive(tolerance, "tolerance")
        self.operator = operator
        self.register_buffer("y", y.detach())
        if isinstance(noise_std, Tensor):
            self.register_buffer("noise_std", noise_std.detach())
        else:
            self.noise_std = noise_std
        self.iterations = iterations
        self.tolerance = tolerance

    @abc.abstractmethod
    def _spread(self, at: Measured) -> Linear:
        """Return the function v -> J C J^T v of vectors v (B, *E)."""

    def _checked(self, x: Tensor) -> None:
        """Check the operator with data like a state x (B, *D)."""

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        inside, at = self._with_signal(x, t)
        prediction, grad, _ = self._solved(inside, at, cond)
        if at is not t:
            prediction = self.model.predict(x, t, **cond)
        return self._shifted(prediction, x, t, grad, at)

    @torch.no_grad()
    def residuals(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r"""Return how far each iteration has solved the system of a state, (iterations + 1, B).

        .. math::
            |y - A(\hat x_0) - S v_k| \,/\, |y - A(\hat x_0)|, \quad k = 0, 1, \dots

        starts at 1 and never grows. Use it to choose `iterations`: those of a trained network pay
        as long as it falls.

        Args:
            x: the state (B, \*D).
            t: the times (B,).
            **cond: the conditions of the model.
        """
        found = self._solved(*self._with_signal(x, t), cond)[2].detach()
        last = found[-1:].expand(self.iterations + 1 - len(found), -1)
        return torch.cat([found, last])

    def _solved(
        self, x: Tensor, t: Tensor, cond: Mapping[str, Any]
    ) -> tuple[Prediction, Tensor, Tensor]:
        """Return the prediction, the gradient that guides it (B, *D), and relative residuals."""
        with self._differentiable(x, t, cond) as (leaf, time, saved, keep):
            prediction = self.model.predict(leaf, time, **saved)
            alpha, sigma = kernel(self.sde, x, t)
            x0 = prediction.x0
            predicted = self.operator(x0)
            self._check(predicted, leaf)
            self._checked(leaf)
            factor = self._factor(leaf, alpha, sigma)

            def backward(v: Tensor) -> Tensor:
                v = v.to(predicted.dtype)
                return gradient(predicted, leaf, "operator", along=v, factor=factor, keep=keep)

            with torch.set_grad_enabled(keep):
                residual = at_least_float32(self.y.to(predicted) - predicted)
                spread = self._spread(Measured(x0, predicted, backward, alpha, sigma, keep))
                noise, unit = self._noise(residual, alpha, sigma)

                def covariance(v: Tensor) -> Tensor:
                    v = v / unit
                    return (noise**2 * v + spread(v).to(v.dtype)) / unit

                solved, shares = minimal_residual(
                    covariance,
                    residual / unit,
                    iterations=self.iterations,
                    tolerance=self.tolerance,
                    symmetric=self._symmetric,
                    floor=(noise / unit) ** 2,
                )
                return prediction, backward(solved / unit), shares

    def _noise(
        self, residual: Tensor, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[float | Tensor, float | Tensor]:
        """Return the noise of the measurements, and units in which their variances are similar.

        Without units, an element that counts as not measured would be the first to be solved for.
        """
        if not isinstance(self.noise_std, Tensor):
            return self.noise_std, 1.0
        noise = self.noise_std.to(residual)
        size = expand(sigma / alpha, residual)
        unit = torch.hypot(noise, torch.as_tensor(size).to(noise))
        return noise, torch.where(unit > 0, unit, 1.0)

    def _check(self, predicted: Any, x: Tensor) -> None:
        expected = (len(x), *self.y.shape[1:])
        if not isinstance(predicted, Tensor) or predicted.shape != expected:
            raise ValueError(
                f"operator: expected measurements of the shape of y, {expected}, "
                f"got {shape_or_type(predicted)}"
            )
        if len(self.y) not in (1, len(x)):
            raise ValueError(
                f"y: expected one measurement, or one for each of the {len(x)} samples, "
                f"got {len(self.y)}"
            )


class LinearMeasurementGuidance(MeasurementGuidance):
    """The same with an operator that must be linear."""

    _known_linear = False

    @override
    def _checked(self, x: Tensor) -> None:
        # Only once, as it makes the host wait for a device.
        if not self._known_linear and readable(torch.empty(0)):
            check_linear(self.operator, x)
            self._known_linear = True


def _check_noise(noise_std: float | Tensor, y: Tensor) -> None:
    """Raise unless a standard deviation is a number >= 0, or a tensor of them that fits y."""
    if not isinstance(noise_std, Tensor):
        check_number(noise_std, "noise_std")
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std: expected a finite number >= 0, got {noise_std}")
        return
    check_state(noise_std, "noise_std")
    check_known(noise_std, "noise_std")
    check_finite(noise_std, "noise_std")
    sizes = list(zip(reversed(noise_std.shape), reversed(y.shape), strict=False))
    if noise_std.ndim > y.ndim or any(n not in (1, m) for n, m in sizes):
        raise ValueError(
            f"noise_std: expected a shape that broadcasts to that of y, {tuple(y.shape)}, "
            f"got {tuple(noise_std.shape)}"
        )
    if readable(noise_std) and bool((noise_std < 0).any()):
        raise ValueError(f"noise_std: expected numbers >= 0, got {float(noise_std.min()):g}")


@torch.no_grad()
def check_linear(operator: Linear, like: Tensor) -> None:
    """Raise unless A 0 = 0 and A (u + v) = A u + A v, within rounding, for random data.

    Args:
        operator: A.
        like: data (B, *D) of the shape, dtype and device to use.

    Raises:
        ValueError: if one of the two does not hold.
    """
    generator = torch.Generator().manual_seed(0)
    u, v = (randn_like(like, generator) for _ in range(2))
    parts = operator(u) + operator(v)
    size = float(parts.float().norm())
    for what, off in (
        ("A 0 = 0", operator(torch.zeros_like(like))),
        ("A (u + v) = A u + A v", operator(u + v) - parts),
    ):
        error = float(off.float().norm())
        # Written so that a NaN fails. The factor 4 allows for convolutions in TF32 on GPUs.
        if not error <= 4 * torch.finfo(like.dtype).eps ** 0.5 * size:
            raise ValueError(
                f"operator: expected a linear function, with {what}, "
                f"got a difference of norm {error:.1e} where A u + A v is {size:.1e}"
            )


def times(factor: Coefficient, x: Tensor) -> Tensor:
    """Return the product of a coefficient and data (B, *D), in the dtype of the data."""
    return (x * expand(factor, x)).to(x.dtype)
