"""Guidance by linear measurements that accounts for the uncertainty of the predicted data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import (
    check_callable,
    check_count,
    check_finite,
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

Linear = Callable[[Tensor], Tensor]


class LinearGaussianGuidance(GuidedModel):
    r"""A model guided by a measurement y = A x0 + noise, exact for Gaussian data.

    .. math::
        s(x, t) &= \nabla \log p_t(x) +
        \nabla_x \hat x_0^\top A^\top S^{-1} (y - A \hat x_0), \\
        S &= \tau^2 I + A C A^\top, \quad
        C = \mathrm{Cov}[x_0 \mid x] = \frac{\sigma^2}{\alpha} \nabla_x \hat x_0,

    the score of p(x | y) where x0 given x is Gaussian: at all times for Gaussian data, and as the
    noise goes to zero for any other. S is never formed. The system is solved by conjugate
    gradients, with one backward pass through the model per iteration. A sample stops when its
    residual is below the tolerance, or when the covariance of a network, which is not exactly
    symmetric, turns out not to be positive definite.

    If the data are far from Gaussian, the weights of the modes are too equal; with
    `GradientGuidance` they are too unequal. For two Gaussians of standard deviation .3 at (-1, 1)
    and (1, -1), and a first coordinate measured as .3 with noise tau, the second has the weight

    ====  =========  ===========  ==================
    tau   posterior  this class   `GradientGuidance`
    ====  =========  ===========  ==================
    1     .63        .62 (.60)    .75 (.66)
    .5    .85        .72 (.69)    .98 (.95)
    .25   .98        .82 (.78)    .96 (.99)
    ====  =========  ===========  ==================

    among 4000 samples of `DDIM` (`Ancestral`) in 200 steps, within .01 for VE, VP and sub-VP. At
    tau = .25, 7 percent of DDIM's samples are more than 1 away from both modes, and 45 percent
    with `GradientGuidance`.

    Args:
        model: the score model.
        operator: A, a linear function from data (B, \*D) to measurements (B, \*E). Its adjoint is
            computed by automatic differentiation.
        y: the measurements (B, \*E), or (1, \*E), one for all samples.
        noise_std: tau, the standard deviation of the measurement noise; it may be 0.
        iterations: the maximum number of iterations. As many as a measurement has dimensions are
            enough up to rounding; a few are enough where y says little about x0.
        tolerance: the residual to stop at, relative to the initial one.

    Raises:
        ValueError: if y is not finite, noise_std negative or not finite, or a number out of
            range; in a call, if the operator's output has another shape than y, or no
            gradient flows through it; in the first call, if it is not linear.
        TypeError: if a part or a number has the wrong type.

    Source: Boys et al., Tweedie Moment Projected Diffusions for Inverse Problems, 2023,
    arXiv 2310.06721; Rozet et al., Learning Diffusion Priors from Observations by Expectation
    Maximization, 2024, arXiv 2405.13712.

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, GaussianMixtureModel, LinearGaussianGuidance
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [1.0])
    >>> y = torch.tensor([[1.0]])
    >>> first = lambda x0: x0[:, :1]
    >>> guided = LinearGaussianGuidance(model, first, y, noise_std=0.5)
    >>> x, t = torch.zeros(1, 2), torch.tensor([1.0])
    >>> guided.predict(x, t).x0.detach()  # y / 1.25
    tensor([[0.8000, 0.0000]])
    """

    y: Tensor

    def __init__(
        self,
        model: ScoreModel,
        operator: Linear,
        y: Tensor,
        noise_std: float,
        *,
        iterations: int = 20,
        tolerance: float = 1e-6,
    ) -> None:
        """Keep the measurement."""
        super().__init__(model)
        check_callable(operator, "operator")
        check_state(y, "y")
        check_finite(y, "y")
        check_number(noise_std, "noise_std")
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std: expected a finite number >= 0, got {noise_std}")
        check_count(iterations, "iterations")
        check_positive(tolerance, "tolerance")
        self.operator = operator
        self.register_buffer("y", y.detach())
        self.noise_std = noise_std
        self.iterations = iterations
        self.tolerance = tolerance
        self._known_linear = False

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        inside, at = self._with_signal(x, t)
        with self._differentiable(inside, at, cond) as (leaf, time, saved, keep):
            prediction = self.model.predict(leaf, time, **saved)
            alpha, sigma = kernel(self.sde, inside, at)
            predicted = self.operator(prediction.x0)
            self._check(predicted, leaf)
            factor = self._factor(leaf, alpha, sigma)

            def backward(v: Tensor) -> Tensor:
                v = v.to(predicted.dtype)
                return gradient(predicted, leaf, "operator", along=v, factor=factor, keep=keep)

            with torch.set_grad_enabled(keep):
                residual = self.y.to(predicted) - predicted
                variance = sigma * (sigma / alpha)

                def covariance(v: Tensor) -> Tensor:
                    spread = self.operator(_times(variance, backward(v)))
                    return self.noise_std**2 * v + spread.to(v.dtype)

                solved = conjugate_gradients(
                    covariance,
                    at_least_float32(residual),
                    iterations=self.iterations,
                    tolerance=self.tolerance,
                )
                grad = backward(solved)
        if at is not t:
            prediction = self.model.predict(x, t, **cond)
        return self._shifted(prediction, x, t, grad, at)

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
        # Only once, as it makes the host wait for a device.
        if not self._known_linear and readable(torch.empty(0)):
            check_linear(self.operator, x)
            self._known_linear = True


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


def _times(factor: Coefficient, x: Tensor) -> Tensor:
    return (x * expand(factor, x)).to(x.dtype)


def conjugate_gradients(matrix: Linear, b: Tensor, *, iterations: int, tolerance: float) -> Tensor:
    """Solve matrix(v) = b (B, *E), a separate positive definite system for each sample.

    A sample's solution is final once its residual is below tolerance times the norm of b, or the
    matrix turns out not to be positive definite, so it does not depend on the other samples.

    Args:
        matrix: maps vectors (B, *E) to their products.
        b: the right-hand sides (B, *E).
        iterations: the maximum number of iterations.
        tolerance: the relative residual to stop at.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).reshape(len(u), -1).sum(1).view(-1, *(1,) * (u.ndim - 1))

    v, r, p = torch.zeros_like(b), b, b
    size = dot(r, r)
    goal = tolerance**2 * size
    for _ in range(iterations):
        going = size > goal
        if not bool(going.any()):
            break
        q = matrix(p)
        curvature = dot(p, q)
        going = going & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        v, r = v + step * p, r - step * q
        new = dot(r, r)
        p = r + torch.where(going, new / torch.where(going, size, 1.0), 0.0) * p
        size = torch.where(going, new, 0.0)
    return v
