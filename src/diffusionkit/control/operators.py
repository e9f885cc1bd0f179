r"""Linear measurements of data, each with its inverse.

A measurement A maps data (..., *D) to (..., *M) and acts on the last axes, whatever stands before
them. Its Moore-Penrose inverse leads back, and A^+ A is the orthogonal projection onto what has
been measured: of rows that are orthonormal, A^+ is the adjoint.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_count, check_finite, check_number, check_part, check_shape, readable
from ..random import randn_like


class LinearOperator(abc.ABC):
    """A linear map of data, with its Moore-Penrose inverse. `check_operator` tells if it is."""

    @abc.abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        r"""Return the measurement A x (..., \*M) of data (..., \*D)."""

    @abc.abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        r"""Return A^+ y (..., \*D): of all data that measure y, those of the smallest norm."""


def check_operator(operator: LinearOperator, data: Tensor) -> None:
    r"""Raise unless an operator and its inverse fit together, on random data.

    .. math::
        A A^+ A = A, \quad A^+ A A^+ = A^+, \quad (A^+ A)^T = A^+ A.

    Args:
        operator: the operator.
        data: data (..., *D) to take the shape, dtype and device from.

    Raises:
        ValueError: if one of the three does not hold, saying by how much.
        TypeError: if operator is not a LinearOperator.

    >>> check_operator(AveragePool(2), torch.zeros(3, 8, 8))
    """
    check_part(operator, LinearOperator, "operator")
    generator = torch.Generator().manual_seed(0)
    u, v = (randn_like(data, generator) for _ in range(2))
    y = operator(u)
    back = operator.inverse(y)
    if back.shape != u.shape:
        raise ValueError(
            f"operator: expected an inverse that gives data of shape {tuple(u.shape)}, "
            f"got {tuple(back.shape)}"
        )
    found = operator.inverse(randn_like(y, generator))
    skew = (back * v).sum() - (u * operator.inverse(operator(v))).sum()
    for what, error, size in (
        ("A A^+ A = A", operator(back) - y, y.norm()),
        ("A^+ A A^+ = A^+", operator.inverse(operator(found)) - found, found.norm()),
        ("A^+ A symmetric, as of orthonormal rows and their adjoint", skew, u.norm() * v.norm()),
    ):
        # Written so that a NaN fails.
        if not float(error.norm()) <= torch.finfo(data.dtype).eps ** 0.5 * float(size):
            raise ValueError(
                f"operator: expected {what}, got a relative error of "
                f"{float(error.norm() / size):.1e} with {type(operator).__name__}"
            )


class _Table:
    """A tensor that is converted once for each dtype and device it is wanted in."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact
        self.copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def to(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        copy = self.copies.get((dtype, device))
        if copy is None:
            with torch.inference_mode(False):  # it may have to serve a gradient later
                copy = self.exact.to(dtype).to(device)
            if not torch._C._are_functorch_transforms_active():  # what is made in one ends with it
                self.copies[dtype, device] = copy
        return copy


class Mask(LinearOperator):
    """The entries of the data that a mask selects; the others are measured as 0.

    Args:
        mask: 1 or True where the data are known, broadcast over the last axes of the data.

    Raises:
        ValueError: if the mask holds anything but 0 and 1.
        TypeError: if it is not a tensor.

    >>> Mask(torch.tensor([1, 0, 1]))(torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[5., 0., 7.]])
    """

    def __init__(self, mask: Tensor) -> None:
        """Keep the mask as booleans."""
        check_part(mask, Tensor, "mask")
        if readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            odd = mask[(mask != 0) & (mask != 1)]
            raise ValueError(
                "mask: expected 0 and 1, or booleans, 1 where the data are known, "
                f"got {odd.flatten()[0].item():g} and {odd.numel() - 1} more that are neither"
            )
        self.mask = _Table(mask != 0)

    def __repr__(self) -> str:
        return f"Mask(of shape {tuple(self.mask.exact.shape)})"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the data (..., *D), 0 where they are not known."""
        # Not a product: what is not known may be NaN.
        return torch.where(self.mask.to(torch.bool, x.device), x, 0.0)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the measurement (..., *D), 0 where nothing is known."""
        return self(y)


class AveragePool(LinearOperator):
    """The means of blocks: data at a lower resolution. The inverse repeats each mean.

    Args:
        factor: the length of a block along each axis.
        dims: how many of the last axes are pooled.

    Raises:
        ValueError: unless factor >= 1 and dims >= 1; in a call, if an axis is no multiple of it.
        TypeError: if one of them is not an integer.

    >>> AveragePool(2, dims=1)(torch.tensor([1.0, 3.0, 5.0, 5.0]))
    tensor([2., 5.])
    """

    def __init__(self, factor: int, dims: int = 2) -> None:
        """Keep the length of a block and the number of axes."""
        check_count(factor, "factor")
        check_count(dims, "dims")
        self.factor, self.dims = factor, dims

    def __repr__(self) -> str:
        return f"AveragePool({self.factor}, dims={self.dims})"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the means (..., *M) of blocks of the data (..., *D)."""
        if x.ndim < self.dims or any(n % self.factor for n in x.shape[-self.dims :]):
            raise ValueError(
                f"x: expected {self.dims} last axes that are multiples of {self.factor}, "
                f"got shape {tuple(x.shape)}"
            )
        for axis in range(-self.dims, 0):
            shape = (*x.shape[:axis], x.shape[axis] // self.factor, self.factor)
            x = x.reshape(*shape, *x.shape[axis:][1:]).mean(axis)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Return data (..., *D) that are constant on each block."""
        for axis in range(-self.dims, 0):
            y = y.repeat_interleave(self.factor, axis)
        return y


class Gray(LinearOperator):
    """The mean over the channels of images (..., C, H, W); the inverse is gray in all channels.

    What it knows is the coordinate along (1, ..., 1) / sqrt(C), the first of the orthonormal
    colour basis of Song et al., 2021, arXiv 2011.13456.

    Args:
        channels: the number of channels C.

    Raises:
        ValueError: unless channels >= 1; in a call, if the images have another number.
        TypeError: if it is not an integer.
    """

    def __init__(self, channels: int = 3) -> None:
        """Keep the number of channels."""
        check_count(channels, "channels")
        self.channels = channels

    def __repr__(self) -> str:
        return f"Gray({self.channels})"

    def __call__(self, x: Tensor) -> Tensor:
        """Return gray images (..., 1, H, W)."""
        _check_channels(x, self.channels, "x")
        return x.mean(-3, keepdim=True)

    def inverse(self, y: Tensor) -> Tensor:
        """Return images (..., C, H, W) whose channels are all alike."""
        _check_channels(y, 1, "gray")
        return y.expand(*y.shape[:-3], self.channels, *y.shape[-2:])


def _check_channels(x: Tensor, channels: int, name: str) -> None:
    if x.ndim < 3 or x.shape[-3] != channels:
        raise ValueError(
            f"{name}: expected images (..., {channels}, H, W), got shape {tuple(x.shape)}"
        )


class Blur(LinearOperator):
    r"""A circular convolution, as far as it can be undone.

    .. math::
        \widehat{A x}(k) = h(k)\, \hat x(k), \quad
        \widehat{A^+ y}(k) = \hat y(k) / h(k) \quad \text{where } |h(k)| > c \max |h|,

    and 0 at the other frequencies, which count as not measured. The rows that are known are
    therefore Fourier modes, which are orthonormal: hand in the blurred data as they are, the
    division is made here. Noise in them is divided too, by no less than c times the largest
    response.

    Args:
        kernel: what a single bright point becomes, centred; one axis for each blurred axis.
        size: the sizes of the last axes of the data, as many as the kernel has.
        floor: the share c of the largest response below which a frequency counts as lost.

    Raises:
        ValueError: if the kernel is larger than the data, not finite or zero, or floor is
            outside (0, 1).
        TypeError: if the kernel is not a tensor, or size not a sequence.
    """

    def __init__(self, kernel: Tensor, size: Sequence[int], floor: float = 0.01) -> None:
        """Keep the transfer function h and its inverse in float64."""
        check_part(kernel, Tensor, "kernel")
        check_finite(kernel, "kernel")
        check_number(floor, "floor")
        check_part(size, Sequence, "size")
        self.size = check_shape(size)
        if kernel.ndim != len(self.size) or any(
            k > n for k, n in zip(kernel.shape, self.size, strict=True)
        ):
            raise ValueError(
                f"kernel: expected {len(self.size)} axes no longer than the data's, {self.size}, "
                f"got shape {tuple(kernel.shape)}"
            )
        if not 0.0 < floor < 1.0:  # at 0 a lost frequency is known up to its rounding error
            raise ValueError(f"floor: expected a number in (0, 1), got {floor}")
        self.kernel_shape = tuple(kernel.shape)
        self.axes = tuple(range(-len(self.size), 0))
        padded = torch.zeros(self.size, dtype=torch.float64)
        padded[tuple(slice(n) for n in kernel.shape)] = kernel.detach().double().cpu()
        padded = padded.roll([-(n // 2) for n in kernel.shape], self.axes)
        h = torch.fft.rfftn(padded)
        largest = float(h.abs().max())
        if largest == 0.0:
            raise ValueError("kernel: expected one that is not zero, got zeros")
        known = h.abs() > floor * largest
        self.transfer = _Table(torch.where(known, h, 0.0))
        self.reciprocal = _Table(torch.where(known, 1 / h, 0.0))

    def __repr__(self) -> str:
        return f"Blur(kernel of shape {self.kernel_shape}, size={self.size})"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the blurred data, without the frequencies that count as lost."""
        return self._filtered(x, self.transfer)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the data as they were, without the frequencies that count as lost."""
        return self._filtered(y, self.reciprocal)

    def _filtered(self, x: Tensor, response: _Table) -> Tensor:
        if tuple(x.shape[-len(self.size) :]) != self.size:
            raise ValueError(f"x: expected last axes {self.size}, got shape {tuple(x.shape)}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # there is no FFT of halves
        waves = torch.fft.rfftn(wide, dim=self.axes)
        waves = waves * response.to(waves.dtype, waves.device)
        back: Tensor = torch.fft.irfftn(waves, s=self.size, dim=self.axes)
        return back.to(x.dtype)


class Matrix(LinearOperator):
    """Inner products with given data: any linear measurement of which all rows fit in memory.

    Args:
        rows: the rows (m, *D). They need not be orthonormal; the inverse is computed once.

    Raises:
        ValueError: unless rows has at least two axes and is finite.
        TypeError: if it is not a tensor.

    >>> Matrix(torch.tensor([[0.6, 0.8]]))(torch.tensor([[5.0, 0.0], [1.0, 1.0]]))
    tensor([[3.0000],
            [1.4000]])
    """

    def __init__(self, rows: Tensor) -> None:
        """Keep the rows and their inverse in float64."""
        check_part(rows, Tensor, "rows")
        if rows.ndim < 2 or rows.numel() == 0:
            raise ValueError(f"rows: expected shape (m, *D), got {tuple(rows.shape)}")
        check_finite(rows, "rows")
        self.shape = tuple(rows.shape[1:])
        exact = rows.detach().double().cpu().flatten(1)
        self.count = len(exact)
        self.forward, self.backward = _Table(exact.T), _Table(torch.linalg.pinv(exact).T)

    def __repr__(self) -> str:
        return f"Matrix(rows of shape {(self.count, *self.shape)})"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the inner products (..., m) of data (..., *D)."""
        dims = len(self.shape)
        if tuple(x.shape[-dims:]) != self.shape:
            raise ValueError(f"x: expected data of shape {self.shape}, got {tuple(x.shape)}")
        flat: Tensor = x.reshape(*x.shape[:-dims], math.prod(self.shape))
        return flat @ self.forward.to(x.dtype, x.device)

    def inverse(self, y: Tensor) -> Tensor:
        """Return data (..., *D) in the span of the rows."""
        if y.ndim == 0 or y.shape[-1] != self.count:
            raise ValueError(f"y: expected shape (..., {self.count}), got {tuple(y.shape)}")
        flat: Tensor = y @ self.backward.to(y.dtype, y.device)
        return flat.reshape(*y.shape[:-1], *self.shape)
