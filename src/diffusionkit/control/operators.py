r"""Linear measurements of data, with their pseudo-inverses.

A measurement A maps data (..., *D) to (..., *M); it acts on the last axes and keeps all others.
A^+ is its Moore-Penrose inverse, the adjoint if the rows are orthonormal, and A^+ A is the
orthogonal projection onto the measured part of the data.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import (
    check_count,
    check_finite,
    check_known,
    check_number,
    check_part,
    check_sequence,
    check_state,
    readable,
)
from .._precision import at_least_float32
from .._repr import Described
from .._tracing import transformed
from ..random import randn_like


class LinearOperator(abc.ABC):
    """A linear map of data with its Moore-Penrose inverse; `check_operator` tests a new one."""

    @abc.abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        r"""Return the measurement A x (..., \*M) of data (..., \*D)."""

    @abc.abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        r"""Return A^+ y (..., \*D): of all data with the measurement y, those of least norm."""


def check_operator(operator: LinearOperator, data: Tensor) -> None:
    r"""Raise unless an operator's inverse is its pseudo-inverse, tested on random data.

    .. math::
        A A^+ A = A, \quad A^+ A A^+ = A^+, \quad (A^+ A)^T = A^+ A.

    Args:
        operator: the operator.
        data: data (..., *D) of the shape, dtype and device to use.

    Raises:
        ValueError: if one of the three does not hold.
        TypeError: if operator is not a LinearOperator.

    >>> import torch
    >>> from diffusionkit.control import AveragePool, check_operator
    >>> check_operator(AveragePool(2), torch.zeros(3, 8, 8))
    """
    check_part(operator, LinearOperator, "operator")
    check_state(data, "data")
    check_known(data, "data")
    check_finite(data, "data")
    generator = torch.Generator().manual_seed(0)
    u, v = (randn_like(data, generator) for _ in range(2))
    y = operator(u)
    back = operator.inverse(y)
    if back.shape != u.shape:
        raise ValueError(
            f"operator: expected an inverse that returns data of shape {tuple(u.shape)}, "
            f"got {tuple(back.shape)}"
        )
    found = operator.inverse(randn_like(y, generator))
    skew = (back * v).sum() - (u * operator.inverse(operator(v))).sum()
    for what, error, size in (
        ("A A^+ A = A", operator(back) - y, y.norm()),
        ("A^+ A A^+ = A^+", operator.inverse(operator(found)) - found, found.norm()),
        ("A^+ A symmetric, as for orthonormal rows and their adjoint", skew, u.norm() * v.norm()),
    ):
        # Written so that a NaN fails.
        if not float(error.norm()) <= torch.finfo(data.dtype).eps ** 0.5 * float(size):
            raise ValueError(
                f"operator: expected {what}, got a relative error of "
                f"{float(error.norm() / size):.1e} with {type(operator).__name__}"
            )


class _Table:
    """A tensor that is converted once for each dtype and device."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact
        self.copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def to(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        copy = self.copies.get((dtype, device))
        if copy is None:
            with torch.inference_mode(False):  # autograd may save it later
                copy = self.exact.to(dtype).to(device)
            # A tensor made inside a functorch transform is invalid after it.
            if not transformed():
                self.copies[dtype, device] = copy
        return copy


class Mask(LinearOperator):
    """The entries of the data selected by a mask; the others are measured as 0.

    Args:
        mask: 1 or True where the data are known, broadcast over the last axes of the data.

    Raises:
        ValueError: if the mask has values other than 0 and 1.
        TypeError: if mask is not a tensor.

    >>> import torch
    >>> from diffusionkit.control import Mask
    >>> Mask(torch.tensor([1, 0, 1]))(torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[5., 0., 7.]])
    """

    def __init__(self, mask: Tensor) -> None:
        """Keep the mask as booleans."""
        check_known(mask, "mask")
        if mask.numel() == 0:
            raise ValueError(f"mask: expected at least one entry, got shape {tuple(mask.shape)}")
        if readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            odd = mask[(mask != 0) & (mask != 1)]
            raise ValueError(
                "mask: expected 0 and 1, or booleans, 1 where the data are known, "
                f"got {odd.flatten()[0].item():g} and {odd.numel() - 1} more"
            )
        self.mask = mask != 0
        self._mask = _Table(self.mask)

    @override
    def __repr__(self) -> str:
        return f"Mask(of shape {tuple(self.mask.shape)})"

    @override
    def __call__(self, x: Tensor) -> Tensor:
        check_state(x)
        mask = self._mask.to(torch.bool, x.device)
        sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
        if any(n != m and 1 not in (n, m) for n, m in sizes):
            raise ValueError(
                f"x: expected data that fit the mask, {tuple(mask.shape)}, got {tuple(x.shape)}"
            )
        # Not a product: unknown entries may be NaN.
        return torch.where(mask, x, 0.0)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self(y)


class AveragePool(Described, LinearOperator):
    """The means of blocks, data at a lower resolution; the inverse repeats each mean.

    Args:
        factor: the length of a block along each axis.
        dims: the number of pooled axes, the last ones.

    Raises:
        ValueError: unless factor >= 1 and dims >= 1; in a call, if an axis is not a multiple of
            factor.
        TypeError: if factor or dims is not an integer.

    >>> import torch
    >>> from diffusionkit.control import AveragePool
    >>> AveragePool(2, dims=1)(torch.tensor([1.0, 3.0, 5.0, 5.0]))
    tensor([2., 5.])
    """

    def __init__(self, factor: int, dims: int = 2) -> None:
        """Keep the block length and the number of axes."""
        check_count(factor, "factor")
        check_count(dims, "dims")
        self.factor, self.dims = factor, dims

    @override
    def __call__(self, x: Tensor) -> Tensor:
        check_state(x)
        if x.ndim < self.dims or any(n % self.factor for n in x.shape[-self.dims :]):
            raise ValueError(
                f"x: expected its {self.dims} last axes to be multiples of {self.factor}, "
                f"got shape {tuple(x.shape)}"
            )
        for axis in range(-self.dims, 0):
            x = torch.unflatten(x, axis, (-1, self.factor)).mean(axis)
        return x

    @override
    def inverse(self, y: Tensor) -> Tensor:
        check_state(y, "y")
        if y.ndim < self.dims:
            raise ValueError(f"y: expected at least {self.dims} axes, got shape {tuple(y.shape)}")
        for axis in range(-self.dims, 0):
            y = y.repeat_interleave(self.factor, axis)
        return y


class Gray(Described, LinearOperator):
    """The mean over the channels of images (..., C, H, W); the inverse is gray in all channels.

    It measures the coordinate along (1, ..., 1) / sqrt(C), the first of an orthonormal color basis.

    Args:
        channels: the number of channels C.

    Raises:
        ValueError: unless channels >= 1; in a call, if the images have another number of channels.
        TypeError: if channels is not an integer.

    Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations,
    2021, arXiv 2011.13456 (appendix I.3).
    """

    def __init__(self, channels: int = 3) -> None:
        """Keep the number of channels."""
        check_count(channels, "channels")
        self.channels = channels

    @override
    def __call__(self, x: Tensor) -> Tensor:
        _check_channels(x, self.channels, "x")
        return x.mean(-3, keepdim=True)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        _check_channels(y, 1, "gray")
        return y.expand(*y.shape[:-3], self.channels, *y.shape[-2:])


def _check_channels(x: Tensor, channels: int, name: str) -> None:
    check_state(x, name)
    if x.ndim < 3 or x.shape[-3] != channels:
        raise ValueError(
            f"{name}: expected images (..., {channels}, H, W), got shape {tuple(x.shape)}"
        )


class Blur(LinearOperator):
    r"""A circular convolution, restricted to the frequencies that can be inverted.

    .. math::
        \widehat{A x}(k) = h(k)\, \hat x(k), \quad
        \widehat{A^+ y}(k) = \hat y(k) / h(k) \quad \text{where } |h(k)| > c \max |h|,

    and 0 at all other frequencies, which are treated as not measured. Pass the blurred data
    unchanged: the inverse divides by h. It amplifies noise in them by at most ``1 / (c max |h|)``.

    Args:
        kernel: the point spread function, centered; one axis for each blurred axis.
        size: the sizes of the last axes of the data, as many as the kernel has.
        floor: the fraction c of the largest response below which a frequency counts as lost.

    Raises:
        ValueError: if the kernel is larger than the data, not finite or zero, or floor is
            outside (0, 1).
        TypeError: if kernel is not a tensor, or size not a sequence.
    """

    def __init__(self, kernel: Tensor, size: Sequence[int], floor: float = 0.01) -> None:
        """Keep the transfer function h and its inverse in float64."""
        check_known(kernel, "kernel")
        check_finite(kernel, "kernel")
        check_number(floor, "floor")
        check_sequence(size, "size")
        for n in size:
            check_count(n, "size")
        self.size = tuple(size)
        if kernel.ndim != len(self.size) or any(
            k > n for k, n in zip(kernel.shape, self.size, strict=True)
        ):
            raise ValueError(
                f"kernel: expected {len(self.size)} axes no longer than the data's, {self.size}, "
                f"got shape {tuple(kernel.shape)}"
            )
        if not 0.0 < floor < 1.0:  # at 0, rounding errors at a lost frequency would be inverted
            raise ValueError(f"floor: expected a number in (0, 1), got {floor}")
        self.kernel, self.floor = kernel.detach(), floor
        self.axes = tuple(range(-len(self.size), 0))
        padded = torch.zeros(self.size, dtype=torch.float64)
        padded[tuple(slice(n) for n in kernel.shape)] = kernel.detach().double().cpu()
        padded = padded.roll([-(n // 2) for n in kernel.shape], self.axes)
        h = torch.fft.rfftn(padded)
        largest = float(h.abs().max())
        if largest == 0.0:
            raise ValueError("kernel: expected a non-zero kernel, got zeros")
        known = h.abs() > floor * largest
        self.transfer = _Table(torch.where(known, h, 0.0))
        self.reciprocal = _Table(torch.where(known, 1 / h, 0.0))

    @override
    def __repr__(self) -> str:
        return f"Blur(kernel of shape {tuple(self.kernel.shape)}, size={self.size})"

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return self._filtered(x, self.transfer)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._filtered(y, self.reciprocal)

    def _filtered(self, x: Tensor, response: _Table) -> Tensor:
        check_state(x)
        if tuple(x.shape[-len(self.size) :]) != self.size:
            raise ValueError(f"x: expected last axes {self.size}, got shape {tuple(x.shape)}")
        # The FFT does not support half precision.
        spectrum = torch.fft.rfftn(at_least_float32(x), dim=self.axes)
        spectrum = spectrum * response.to(spectrum.dtype, spectrum.device)
        filtered: Tensor = torch.fft.irfftn(spectrum, s=self.size, dim=self.axes)
        return filtered.to(x.dtype)


class Matrix(LinearOperator):
    """Inner products with given rows: any linear measurement whose matrix fits in memory.

    Args:
        rows: the rows (m, *D). They need not be orthonormal; the inverse is computed once.

    Raises:
        ValueError: unless rows has at least two axes and is finite.
        TypeError: if rows is not a tensor.

    >>> import torch
    >>> from diffusionkit.control import Matrix
    >>> x = torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    >>> Matrix(torch.tensor([[0.6, 0.8]]))(x)
    tensor([[3.0000],
            [1.4000]])
    """

    def __init__(self, rows: Tensor) -> None:
        """Keep the rows and their inverse in float64."""
        check_known(rows, "rows")
        if rows.ndim < 2 or rows.numel() == 0:
            raise ValueError(f"rows: expected shape (m, *D), got {tuple(rows.shape)}")
        check_finite(rows, "rows")
        self.rows, self.shape = rows.detach(), tuple(rows.shape[1:])
        exact = rows.detach().double().cpu().flatten(1)
        self.count = len(exact)
        self.forward, self.backward = _Table(exact.T), _Table(torch.linalg.pinv(exact).T)

    @override
    def __repr__(self) -> str:
        return f"Matrix(rows of shape {(self.count, *self.shape)})"

    @override
    def __call__(self, x: Tensor) -> Tensor:
        check_state(x)
        dims = len(self.shape)
        if tuple(x.shape[-dims:]) != self.shape:
            raise ValueError(f"x: expected data of shape {self.shape}, got {tuple(x.shape)}")
        return x.flatten(-dims) @ self.forward.to(x.dtype, x.device)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        check_state(y, "y")
        if y.shape[-1] != self.count:
            raise ValueError(f"y: expected shape (..., {self.count}), got {tuple(y.shape)}")
        return torch.unflatten(y @ self.backward.to(y.dtype, y.device), -1, self.shape)
