"""Guidance by measurements that accounts for the uncertainty of the predicted data."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from .._coefficients import per_sample
from .._keywords import explained
from .._schedules import exact
from .._sigma_data import (
    SigmaData,
    as_sigma_data,
    check_channels,
    for_channels,
    over_channels,
    spread,
)
from ..interfaces import ScoreModel
from ._measurement import Linear, LinearMeasurementGuidance, Measured, MeasurementGuidance, times


@explained
class LinearGaussianGuidance(LinearMeasurementGuidance):
    r"""A model guided by a measurement y = A x0 + noise, exact for Gaussian data (MMPS).

    .. math::
        s(x, t) &= \nabla \log p_t(x) +
        \nabla_x \hat x_0^\top A^\top S^{-1} (y - A \hat x_0), \\
        S &= \mathrm{diag}(\tau^2) + A C A^\top, \quad
        C = \mathrm{Cov}[x_0 \mid x] = \frac{\sigma^2}{\alpha} \nabla_x \hat x_0,

    the score of p(x | y) where x0 given x is Gaussian: at all times for Gaussian data, and as the
    noise goes to zero for any other. S is never formed. The system is solved by minimal residuals
    (GMRES), with one backward pass through the model per iteration, since the Jacobian of a network
    is neither symmetric nor positive definite: conjugate gradients diverge. A sample stops when its
    residual is below the tolerance, or before an iteration that fits a negative variance, which
    shows that C is wrong. `residuals` reports how far a system is solved.

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
        noise_std: tau, the standard deviation of the measurement noise: a number, or a tensor that
            broadcasts to the shape of y, one for each element. It may be 0.
        iterations: the maximum number of iterations. As many as the measurement has dimensions are
            enough up to rounding for an exact model, and 1 to 5 for a trained network.
        tolerance: the residual to stop at, relative to the initial one.

    Raises:
        ValueError: if y is not finite, noise_std negative or not finite, or a number out of
            range; in a call, if the operator's output has another shape than y, or no
            gradient flows through it; in the first call, if it is not linear.
        TypeError: if a part or a number has the wrong type.

    Source: Boys et al., Tweedie Moment Projected Diffusions for Inverse Problems, 2023,
    arXiv 2310.06721; Rozet et al., Learning Diffusion Priors from Observations by Expectation
    Maximization, 2024, arXiv 2405.13712; Saad and Schultz, GMRES: a generalized minimal residual
    algorithm for solving nonsymmetric linear systems, 1986.

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

    def __init__(
        self,
        model: ScoreModel,
        operator: Linear,
        y: Tensor,
        noise_std: float | Tensor,
        *,
        iterations: int = 10,
        tolerance: float = 1e-6,
    ) -> None:
        """Keep the measurement."""
        super().__init__(model, operator, y, noise_std, iterations, tolerance)

    @override
    def _spread(self, at: Measured) -> Linear:
        return lambda v: self.operator(at.covariance(v))


@explained
class LinearizedGaussianGuidance(MeasurementGuidance):
    r"""A model guided by a measurement y = A(x0) + noise of any differentiable A.

    `LinearGaussianGuidance` with A linearized at the predicted data, at every noise level anew:

    .. math::
        S = \mathrm{diag}(\tau^2) + J C J^\top, \quad J = \nabla A(\hat x_0), \quad
        C = \mathrm{Cov}[x_0 \mid x] = \frac{\sigma^2}{\alpha} \nabla_x \hat x_0.

    Only products with J and its transpose are computed, by automatic differentiation in both
    directions. It is `LinearGaussianGuidance` for a linear A, and exact as the noise goes to zero;
    in between, it is biased if A is curved within the uncertainty of the predicted data. For data
    N(.5, .5^2) and y = tanh(2 x0) + noise, the first number is the error of the samples' mean, in
    standard deviations of the posterior, and the second the ratio of their standard deviation to
    the true one:

    ====  ===  ==========  ==================
    tau   y    this class  `GradientGuidance`
    ====  ===  ==========  ==================
    .5    .9   -.14, .98   -.02, .93
    .1    .9   -.33, .91   .11, .95
    .1    .3   -.11, .93   -.14, .64
    ====  ===  ==========  ==================

    with 200 steps of `Ancestral` and VP.

    Args:
        model: the score model.
        operator: A, a differentiable function from data (B, \*D) to measurements (B, \*E), one for
            each sample.
        y: the measurements (B, \*E), or (1, \*E), one for all samples.
        noise_std: tau, the standard deviation of the measurement noise: a number, or a tensor that
            broadcasts to the shape of y, one for each element.
        iterations: the maximum number of iterations.
        tolerance: the residual to stop at, relative to the initial one.

    Raises:
        ValueError: if y is not finite, noise_std negative or not finite, or a number out of
            range; in a call, if the operator's output has another shape than y, or no
            gradient flows through it.
        TypeError: if a part or a number has the wrong type.

    Source: Rozet et al., Learning Diffusion Priors from Observations by Expectation Maximization,
    2024, arXiv 2405.13712 (moment matching posterior sampling, MMPS), with the Jacobian of A in the
    place of A.

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, GaussianMixtureModel, LinearizedGaussianGuidance
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[1.0, 0.0]], [0.1])
    >>> y = torch.tensor([[1.2]])
    >>> norm = lambda x0: x0.norm(dim=1, keepdim=True)
    >>> guided = LinearizedGaussianGuidance(model, norm, y, noise_std=0.1)
    >>> x, t = torch.zeros(1, 2), torch.tensor([1.0])
    >>> guided.predict(x, t).x0.detach()
    tensor([[1.1000, 0.0000]])
    """

    def __init__(
        self,
        model: ScoreModel,
        operator: Linear,
        y: Tensor,
        noise_std: float | Tensor,
        *,
        iterations: int = 10,
        tolerance: float = 1e-6,
    ) -> None:
        """Keep the measurement."""
        super().__init__(model, operator, y, noise_std, iterations, tolerance)

    @override
    def _spread(self, at: Measured) -> Linear:
        point = at.x0 if at.keep else at.x0.detach()

        def spread(v: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(self.operator, (point,), (at.covariance(v),))[1]
            return found

        return spread


@explained
class PseudoinverseGuidance(LinearMeasurementGuidance):
    r"""A model guided by a measurement y = A x0 + noise, given one variance of all data (PiGDM).

    .. math::
        s(x, t) &= \nabla \log p_t(x) +
        \nabla_x \hat x_0^\top A^\top S^{-1} (y - A \hat x_0), \\
        S &= \mathrm{diag}(\tau^2) + r^2 A A^\top, \quad
        r^2 = \frac{\sigma_d^2 \sigma^2}{\alpha^2 \sigma_d^2 + \sigma^2},

    the score of p(x | y) for data N(m, sigma_d^2 I), or with a sigma_d for each channel.
    `LinearGaussianGuidance` takes the covariance of the predicted data from the model instead of
    r^2 I, at the cost of one backward pass through the model for each iteration; this class needs
    only one in total, since the iterations use only A.

    Other data have other covariances, and the samples are biased. For a correlated Gaussian in four
    dimensions, two of them measured, the error of their mean is .36 times the posterior's standard
    deviation with `DDIM` and .11 times with `Ancestral`, compared with .04 for
    `LinearGaussianGuidance`, as for exact samples; the error of the covariance is .18 and .09 times
    its norm, compared with .07. Modes that are far apart get weights that are too equal
    (`benchmarks/inverse_problems.py`).

    The Jacobian of a network of few training steps may be far too large for r^2 at high noise, so
    that samples diverge: pass `DenoisedModel(model, Clip(low, high))`, or take
    `LinearGaussianGuidance`.

    Without noise, A^T S^{-1} is the pseudo-inverse of A over r^2, which gave the method its name.
    The released code multiplies that by r^2 and by weights of its own sampler; here the guidance is
    the score of the Gaussian above, for every sampler.

    Args:
        model: the score model.
        operator: A, a linear function from data (B, \*D) to measurements (B, \*E). Its adjoint is
            computed by automatic differentiation.
        y: the measurements (B, \*E), or (1, \*E), one for all samples.
        noise_std: tau, the standard deviation of the measurement noise: a number, or a tensor that
            broadcasts to the shape of y, one for each element. It may be 0.
        sigma_data: the standard deviation of the data, 1 in the paper; or one for each channel.
        iterations: the maximum number of iterations.
        tolerance: the residual to stop at, relative to the initial one.

    Raises:
        ValueError: if y is not finite, noise_std negative or not finite, or a number out of
            range; in a call, if the operator's output has another shape than y, or no
            gradient flows through it; in the first call, if it is not linear.
        TypeError: if a part or a number has the wrong type.

    Source: Song, Vahdat, Mardani and Kautz, Pseudoinverse-Guided Diffusion Models for Inverse
    Problems, ICLR 2023.

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, GaussianMixtureModel, PseudoinverseGuidance
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [1.0])
    >>> y = torch.tensor([[1.0]])
    >>> first = lambda x0: x0[:, :1]
    >>> guided = PseudoinverseGuidance(model, first, y, noise_std=0.5)
    >>> x, t = torch.zeros(1, 2), torch.tensor([1.0])
    >>> guided.predict(x, t).x0.detach()  # y / 1.25
    tensor([[0.8000, 0.0000]])
    """

    _symmetric = True

    def __init__(
        self,
        model: ScoreModel,
        operator: Linear,
        y: Tensor,
        noise_std: float | Tensor,
        sigma_data: SigmaData = 1.0,
        *,
        iterations: int = 50,
        tolerance: float = 1e-6,
    ) -> None:
        """Keep the measurement."""
        super().__init__(model, operator, y, noise_std, iterations, tolerance)
        self.sigma_data: float | tuple[float, ...] = as_sigma_data(sigma_data)

    @override
    def _spread(self, at: Measured) -> Linear:
        return lambda v: self.operator(self._variances(at, at.adjoint(v)))

    def _variances(self, at: Measured, v: Tensor) -> Tensor:
        """Return the product of the variances of the predicted data and a vector (B, *D)."""
        if not isinstance(self.sigma_data, tuple):
            data, noise = self.sigma_data * at.alpha, at.sigma
            return times((self.sigma_data * noise) ** 2 / (data**2 + noise**2), v)
        check_channels(self.sigma_data, v)
        alpha, sigma = per_sample(at.alpha, v), per_sample(at.sigma, v)
        stds = spread(alpha, sigma, self.sigma_data)
        stds = exact(sigma)[:, None] * for_channels(self.sigma_data, stds) / stds
        return v * over_channels(stds.square(), v)
