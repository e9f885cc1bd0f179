r"""Constraints: known parts of the data, which a sampler puts back into its state after each move.

All are one formula, for a linear measurement y = A x_0 with the orthogonal projection A^+ A onto
what it knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_finite, check_part, check_state
from ..interfaces import Constraint
from ..random import Generators, randn_like
from ..values import Coefficient, add_noise, linear
from .operators import Gray, LinearOperator, Mask, Matrix, check_operator


class _Replacement(Constraint):
    r"""The known coordinates of a state replaced by those of noised data.

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

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.operator).__name__}, "
            f"data of shape {tuple(self.known.shape)})"
        )

    def __call__(
        self, x: Tensor, alpha: Coefficient, sigma: Coefficient, *, generator: Generators = None
    ) -> Tensor:
        """Return a state x (B, *D) with its known part drawn anew from p(x_t | x_0).

        Raises:
            ValueError: if the state's shape is not that of the data which were measured.
        """
        known, operator = self.known, self.operator
        if known.shape not in (x.shape, x.shape[1:], (1, *x.shape[1:])):
            raise ValueError(
                f"{type(self).__name__}: expected a state that fits measured data of shape "
                f"{tuple(known.shape)}, got {tuple(x.shape)}"
            )
        clean = not isinstance(sigma, Tensor) and sigma == 0
        gone = x if clean else add_noise(x, sigma, randn_like(x, generator), value=-1.0)
        # In this order a known entry of a mask becomes exactly 0 before its datum is added.
        rest = x - operator.inverse(operator(gone))
        return linear(1.0, rest, alpha, known.to(x).expand_as(x))


class LinearMeasurement(_Replacement):
    r"""Data of which a linear measurement y = A x_0 without noise is known.

    .. math::
        x \leftarrow x + A^+ (\alpha y + \sigma A z - A x), \quad z \sim N(0, I),

    after every move of a sampler. For rows that are orthonormal, A^+ is the adjoint A^T. The
    measurement is taken as exact, and holds to rounding at the end.

    The rest of the state is not conditioned on y: it follows the score at the state as a whole.
    This is right where the two parts of the data are independent, and biased otherwise. Of two
    coordinates of unit variance and correlation rho, one known to lie k from its mean, short
    steps of the reverse SDE give the other a mean of (1 - sqrt(1 - rho^2)) k / rho instead of
    rho k, with VE, VP and sub-VP alike. That is too small, at k = 1.5, by so many standard
    deviations of the true law (200 steps of `Ancestral`, measured with VP):

    ========================================  ===  ===  ====
    rho                                       .5   .8   .95
    ========================================  ===  ===  ====
    as they are                               .42  .78  1.13
    five moves of `AnnealedLangevin` at each  .16  .23  .20
    `TimeTravel(jump=10, repeats=10)`         .07  .09  .07
    ========================================  ===  ===  ====

    Deterministic predictors, with memory or without, are further off: 1.13 at rho = .8. Which of
    several distant modes is chosen is settled while the noise hides what is known, and neither
    remedy changes it: a mode of weight .70, which y makes .61, gets .67 to .69.
    `LinearGaussianGuidance` is exact for Gaussian data.

    Args:
        operator: the measurement, or its rows (m, \*D) as a tensor.
        y: what was measured, for one sample (\*M) or for each (B, \*M). It is copied to the
            state's dtype and device: keep it there if the copies matter.

    Raises:
        ValueError: if y does not fit the operator or is not finite, no data measure y because
            rows of a matrix depend on one another, or the operator and its inverse do not fit
            together.
        TypeError: if operator is neither an operator nor a tensor, or y is not a floating-point
            tensor.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (appendix I); Song et al., Solving Inverse Problems in Medical Imaging with Score-Based
    Generative Models, 2022, arXiv 2111.08005.

    >>> import torch
    >>> from diffusionkit.control.operators import AveragePool
    >>> constraint = LinearMeasurement(AveragePool(2, dims=1), torch.tensor([1.0, 4.0]))
    >>> constraint(torch.tensor([[0.0, 1.0, 2.0, 2.0]]), 1.0, 0.0)
    tensor([[0.5000, 1.5000, 4.0000, 4.0000]])
    """

    def __init__(self, operator: LinearOperator | Tensor, y: Tensor) -> None:
        """Take the measurement back to the data."""
        if isinstance(operator, Tensor):
            operator = Matrix(operator)
        check_part(operator, LinearOperator, "operator")
        super().__init__(operator, y, "y")
        if isinstance(operator, Matrix):  # a mask and a blur leave out parts of y on purpose
            y = y.detach()
            off, size = (operator(self.known) - y).abs().max(), y.abs().max()
            if not bool(off <= torch.finfo(y.dtype).eps ** 0.5 * size):
                raise ValueError(
                    "y: expected a measurement that some data have, as the rows depend on one "
                    f"another, got values up to {float(size):g} that are off by {float(off):g}"
                )


class Inpainting(_Replacement):
    """Data of which some entries are known; they are exactly those of `known` at the end.

    Args:
        known: the data, one sample (*D) or (1, *D), or one for each (B, *D). What the mask
            leaves out is never read and may be NaN.
        mask: 1 or True where the data are known, broadcast to the shape of `known`; or one mask
            for each sample, which is what an axis more than those of one sample means.

    Raises:
        ValueError: if the mask is not binary or of another shape, or known data are not finite.
        TypeError: if known is not a floating-point tensor.

    Source: Song et al., 2021, arXiv 2011.13456 (appendix I.2); see `LinearMeasurement`.

    >>> import torch
    >>> constraint = Inpainting(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    >>> constraint(torch.tensor([[7.0, 8.0]]), 1.0, 0.0)
    tensor([[1., 8.]])
    """

    def __init__(self, known: Tensor, mask: Tensor) -> None:
        """Keep the known data."""
        check_state(known, "known")
        operator = Mask(mask)
        one = len(known) == 1 and mask.ndim == known.ndim  # with a mask for each sample
        ends = zip(reversed(mask.shape), reversed(known.shape[one:]), strict=False)
        if mask.ndim > known.ndim + 1 or any(m not in (1, n) for m, n in ends):
            raise ValueError(
                f"mask: expected a shape that broadcasts to that of known, {tuple(known.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        super().__init__(operator, known, "known")


class Colorization(_Replacement):
    """Images (B, C, H, W) of which the mean over the channels is known.

    Args:
        gray: the mean over the channels, (1, H, W) or (B, 1, H, W).
        channels: the number of channels C.

    Raises:
        ValueError: if gray has another number of channels than one, or is not finite.
        TypeError: if it is not a floating-point tensor.

    Source: Song et al., 2021, arXiv 2011.13456 (appendix I.3); see `LinearMeasurement`.
    """

    def __init__(self, gray: Tensor, channels: int = 3) -> None:
        """Keep the gray images."""
        super().__init__(Gray(channels), gray, "gray")
