r"""Constraints: known parts of the data, which a sampler imposes on its state after each step.

All apply one formula to a linear measurement y = A x_0; A^+ A is the orthogonal projection onto
the measured part of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_finite, check_part, check_state
from .._coefficients import add_noise, linear
from ..interfaces import Constraint
from ..random import Generators, randn_like
from .operators import Gray, LinearOperator, Mask, Matrix, check_operator


class _Replacement(Constraint):
    r"""A constraint that replaces the known part of a state by that of noised data.

    .. math::
        x \leftarrow x + A^+ (\alpha y + \sigma A z - A x), \quad z \sim N(0, I).
    """

    def __init__(self, operator: LinearOperator, y: Tensor, name: str) -> None:
        """Keep the operator and A^+ y, which has the shape of the data."""
        check_state(y, name)
        self.operator = operator
        self.known = operator.inverse(y.detach())
        check_finite(self.known, name)
        check_operator(operator, self.known)

    @override
    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.operator).__name__}, "
            f"data of shape {tuple(self.known.shape)})"
        )

    @override
    def __call__(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, *, generator: Generators = None
    ) -> Tensor:
        """Return a state x (B, *D) with its known part resampled from p(x_t | x_0).

        Raises:
            ValueError: if the state does not have the shape of the measured data.
        """
        known, operator = self.known, self.operator
        if known.shape not in (x.shape, x.shape[1:], (1, *x.shape[1:])):
            raise ValueError(
                f"x: expected a state that fits the measured data of {type(self).__name__}, "
                f"of shape {tuple(known.shape)}, got {tuple(x.shape)}"
            )
        # Read on every device: draws must not depend on it.
        noiseless = not bool(sigma.any())
        removed = x if noiseless else add_noise(x, sigma, randn_like(x, generator), value=-1.0)
        # In this order a known entry of a mask becomes exactly 0 before its value is added.
        rest = x - operator.inverse(operator(removed))
        return linear(1.0, rest, alpha, known.to(x).expand_as(x))


class LinearMeasurement(_Replacement):
    r"""A constraint from a linear measurement y = A x_0 without noise.

    .. math::
        x \leftarrow x + A^+ (\alpha y + \sigma A z - A x), \quad z \sim N(0, I),

    after every step of a sampler. For orthonormal rows, A^+ is the adjoint A^T. The measurement is
    taken to be exact, and holds to rounding at the end.

    The rest of the state is not conditioned on y: it follows the score of the state as a whole.
    This is right where the two parts of the data are independent, and biased otherwise. For two
    coordinates of unit variance and correlation rho, one observed k from its mean, short steps of
    the reverse SDE give the other a mean of (1 - sqrt(1 - rho^2)) k / rho instead of rho k, with
    VE, VP and sub-VP alike. At k = 1.5 this is too small by the following number of standard
    deviations of the true conditional distribution (200 steps of `Ancestral`, measured with VP):

    ========================================  ===  ===  ====
    rho                                       .5   .8   .95
    ========================================  ===  ===  ====
    the constraint alone                      .42  .78  1.13
    five steps of `AnnealedLangevin` at each  .16  .23  .20
    `TimeTravel(jump=10, repeats=10)`         .07  .09  .07
    ========================================  ===  ===  ====

    Deterministic predictors, with memory or without, have a larger error: 1.13 at rho = .8. The
    choice between distant modes is made while noise hides the known part, and neither remedy
    changes it: a mode of weight .70, which is .61 given y, gets .67 to .69.
    `LinearGaussianGuidance` is exact for Gaussian data.

    Args:
        operator: the measurement, or its rows (m, \*D) as a tensor.
        y: the measurement of one sample (\*M), or of each (B, \*M). It is copied to the dtype and
            device of the state; pass it in these to save the copies.

    Raises:
        ValueError: if y does not fit the operator or is not finite, no data have the measurement
            y because the rows of a matrix are linearly dependent, or the operator's inverse is not
            its pseudo-inverse.
        TypeError: if operator is neither an operator nor a tensor, or y is not a floating-point
            tensor.

    Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations,
    2021, arXiv 2011.13456 (appendix I); Song et al., Solving Inverse Problems in Medical Imaging
    with Score-Based Generative Models, 2022, arXiv 2111.08005.

    >>> import torch
    >>> from diffusionkit import LinearMeasurement
    >>> from diffusionkit.control import AveragePool
    >>> measured = torch.tensor([1.0, 4.0])
    >>> constraint = LinearMeasurement(AveragePool(2, dims=1), measured)
    >>> x = torch.tensor([[0.0, 1.0, 2.0, 2.0]])
    >>> constraint(x, alpha=torch.ones(1), sigma=torch.zeros(1))
    tensor([[0.5000, 1.5000, 4.0000, 4.0000]])
    """

    def __init__(self, operator: LinearOperator | Tensor, y: Tensor) -> None:
        """Keep the operator and the measurement."""
        if isinstance(operator, Tensor):
            operator = Matrix(operator)
        check_part(operator, LinearOperator, "operator")
        super().__init__(operator, y, "y")
        if isinstance(operator, Matrix):  # a mask and a blur drop parts of y on purpose
            y = y.detach()
            off, size = (operator(self.known) - y).abs().max(), y.abs().max()
            if not bool(off <= torch.finfo(y.dtype).eps ** 0.5 * size):
                raise ValueError(
                    "y: expected a measurement that some data have, as the rows are linearly "
                    f"dependent, got values up to {float(size):g} that are off by {float(off):g}"
                )


class Inpainting(_Replacement):
    """A constraint from known elements of the data, which equal those of `known` at the end.

    By itself this is the replacement method of score_sde. With a sampler's
    `time_travel=TimeTravel(...)` it is RePaint, which has a smaller bias: see the numbers in
    `LinearMeasurement`.

    Args:
        known: the data, one sample (*D) or (1, *D), or one for each (B, *D). Entries outside the
            mask are never read and may be NaN.
        mask: 1 or True where the data are known, broadcast to the shape of `known`; with an extra
            first axis, one mask for each sample.

    Raises:
        ValueError: if the mask is not binary or of another shape, or known data are not finite.
        TypeError: if known is not a floating-point tensor.

    Source: as for `LinearMeasurement` (appendix I.2).

    >>> import torch
    >>> from diffusionkit import Inpainting
    >>> known, mask = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    >>> constraint = Inpainting(known, mask)
    >>> x = torch.tensor([[7.0, 8.0]])
    >>> constraint(x, alpha=torch.ones(1), sigma=torch.zeros(1))
    tensor([[1., 8.]])
    """

    def __init__(self, known: Tensor, mask: Tensor) -> None:
        """Keep the known data."""
        check_state(known, "known")
        operator = Mask(mask)
        one = len(known) == 1 and mask.ndim == known.ndim  # one sample, a mask for each sample
        ends = zip(reversed(mask.shape), reversed(known.shape[one:]), strict=False)
        if mask.ndim > known.ndim + 1 or any(m not in (1, n) for m, n in ends):
            raise ValueError(
                f"mask: expected a shape that broadcasts to that of known, {tuple(known.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        super().__init__(operator, known, "known")


class Colorization(_Replacement):
    """A constraint from the mean over the channels of images (B, C, H, W).

    Args:
        gray: the mean over the channels, (1, H, W) or (B, 1, H, W).
        channels: the number of channels C.

    Raises:
        ValueError: if gray has more than one channel, or is not finite.
        TypeError: if gray is not a floating-point tensor.

    Source: as for `LinearMeasurement` (appendix I.3).
    """

    def __init__(self, gray: Tensor, channels: int = 3) -> None:
        """Keep the gray images."""
        super().__init__(Gray(channels), gray, "gray")
