"""Up- and downsampling with a finite impulse response (FIR) filter.

All functions are built on one operation, `upfirdn`: insert zeros, pad, filter, keep every d-th
sample.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_count
from . import _fused, _plain
from ._plain import CONV, CONV_TRANSPOSE, Pairs
from ._signals import (
    Padding,
    Taps,
    check_finite_number,
    check_kernel,
    check_numbers,
    check_padding,
    check_signal,
    check_weight,
    normalize,
)


def upfirdn(
    x: Tensor,
    kernel: Sequence[float] | Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: Padding = (0, 0),
) -> Tensor:
    r"""Upsample with zeros, pad, filter and downsample.

    .. math:: y_i = \sum_j k_j \, u_{i d + K - 1 - p_0 - j}, \qquad u_{m f} = x_m

    in each spatial dimension, where u is zero elsewhere, f is `up`, d is `down`, K is the length
    of the kernel and :math:`p_0, p_1` are the paddings. Every sample, including the last, is
    followed by f - 1 zeros, so y has :math:`\lfloor (n f + p_0 + p_1 - K) / d \rfloor + 1`
    samples.

    Args:
        x: input (B, C, \*spatial) with one to three spatial dimensions.
        kernel: the taps k, not normalized: numbers or a tensor with one dimension, used
            along every spatial dimension; or a tensor with as many dimensions as there are
            spatial ones. A tensor must be on the device of x; gradients flow to it.
        up: upsampling factor f.
        down: downsampling factor d.
        padding: :math:`(p_0, p_1)`, or one such pair per spatial dimension; negative numbers
            crop.

    Returns:
        Output (B, C, \*filtered) with the dtype (also under autocast) and memory format of x.

    Raises:
        TypeError: if x is not a floating-point tensor or a number has a wrong type.
        ValueError: if a shape or number is wrong or the output would be empty.
    """
    dims = check_signal(x)
    taps = check_kernel(kernel, x)
    check_count(up, "up")
    check_count(down, "down")
    return _filter(x, taps, 1.0, up, down, check_padding(padding, dims))


def fir_upsample(
    x: Tensor,
    kernel: Sequence[float] | Tensor = (1, 3, 3, 1),
    *,
    factor: int = 2,
    gain: float = 1.0,
) -> Tensor:
    r"""Upsample by an integer factor with a filter of sum `gain` times factor^dims.

    `upfirdn` with up = f and, for :math:`p = K - f`, the paddings
    :math:`(\lfloor (p + 1) / 2 \rfloor + f - 1, \lfloor p / 2 \rfloor)`. The kernel [1, 1] repeats
    every pixel; [1, 3, 3, 1] interpolates linearly between pixels, with zeros around x.

    Args:
        x: input (B, C, \*spatial) with one to three spatial dimensions.
        kernel: the taps, as in `upfirdn`; they are divided by their sum.
        factor: upsampling factor f, at most K, so that every output depends on the input.
        gain: factor by which constants are multiplied.

    Returns:
        Output (B, C, \*(f spatial)) with the dtype and memory format of x.

    Raises:
        TypeError: if x is not a floating-point tensor or a number has a wrong type.
        ValueError: if a shape or number is wrong or the taps have sum zero.

    Source: T. Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2020, arXiv
    1912.04958.
    """
    dims = check_signal(x)
    taps = _normalized(kernel, x, factor, gain)
    sizes = _sizes(taps, dims)
    if min(sizes) < factor:
        raise ValueError(f"kernel: expected at least factor = {factor} taps, got {min(sizes)}")
    pads = [((p + 1) // 2 + factor - 1, p // 2) for p in (size - factor for size in sizes)]
    return _filter(x, taps, float(gain) * factor**dims, factor, 1, pads)


def fir_downsample(
    x: Tensor,
    kernel: Sequence[float] | Tensor = (1, 3, 3, 1),
    *,
    factor: int = 2,
    gain: float = 1.0,
) -> Tensor:
    r"""Downsample by an integer factor with a filter of sum `gain`.

    `upfirdn` with down = f and, for :math:`p = K - f`, the paddings
    :math:`(\lfloor (p + 1) / 2 \rfloor, \lfloor p / 2 \rfloor)`. The kernel [1, 1] takes means of
    blocks of pixels; a kernel shorter than f skips pixels.

    Args:
        x: input (B, C, \*spatial) with one to three spatial dimensions, each of at least f pixels.
        kernel: the taps, as in `upfirdn`; they are divided by their sum.
        factor: downsampling factor f.
        gain: factor by which constants are multiplied.

    Returns:
        Output (B, C, \*(spatial // f)) with the dtype and memory format of x.

    Raises:
        TypeError: if x is not a floating-point tensor or a number has a wrong type.
        ValueError: if a shape or number is wrong or the taps have sum zero.

    Source: T. Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2020, arXiv
    1912.04958.
    """
    dims = check_signal(x)
    taps = _normalized(kernel, x, factor, gain)
    pads = [((p + 1) // 2, p // 2) for p in (size - factor for size in _sizes(taps, dims))]
    return _filter(x, taps, float(gain), 1, factor, pads)


def fir_conv_downsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel: Sequence[float] | Tensor = (1, 3, 3, 1),
    *,
    factor: int = 2,
    gain: float = 1.0,
) -> Tensor:
    r"""Filter, then convolve with a stride of the factor.

    The filter is `upfirdn` with, for :math:`p = K - f + k - 1`, the paddings
    :math:`(\lfloor (p + 1) / 2 \rfloor, \lfloor p / 2 \rfloor)`; the convolution pads nothing.

    Args:
        x: input (B, C, \*spatial) with one to three spatial dimensions, each of at least f pixels.
        weight: weight (out, C, \*k) of the convolution, as in torch. Under autocast the
            convolution, not the filter, runs in the dtype of autocast.
        bias: bias (out,), added at the end.
        kernel: the taps, as in `upfirdn`; they are divided by their sum.
        factor: downsampling factor f.
        gain: factor by which the filter multiplies constants.

    Returns:
        Output (B, out, \*(spatial // f)).

    Raises:
        TypeError: if a tensor is not floating-point, dtypes differ without autocast, or a number
            has a wrong type.
        ValueError: if a shape or number is wrong or the taps have sum zero.

    Source: T. Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2020, arXiv
    1912.04958.
    """
    dims = check_signal(x)
    check_weight(weight, bias, x)
    taps = _normalized(kernel, x, factor, gain)
    if min(x.shape[2:]) < factor:
        raise ValueError(f"x: expected at least {factor} samples, got {min(x.shape[2:])}")
    sizes = zip(_sizes(taps, dims), weight.shape[2:], strict=True)
    pads = [((p + 1) // 2, p // 2) for p in (size - factor + k - 1 for size, k in sizes)]
    y = _filter(x, taps, float(gain), 1, 1, pads)
    return CONV[dims](y, weight, bias, stride=factor)


def fir_conv_upsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel: Sequence[float] | Tensor = (1, 3, 3, 1),
    *,
    factor: int = 2,
    gain: float = 1.0,
) -> Tensor:
    r"""Insert zeros, convolve, then filter.

    With f - 1 zeros between the samples and k - 1 around them, the convolution yields
    (n - 1) f + k samples; the filter is `upfirdn` with, for :math:`p = K - f - (k - 1)`, the
    paddings :math:`(\lfloor (p + 1) / 2 \rfloor + f - 1, \lfloor p / 2 \rfloor + f - 1)`.

    Args:
        x: input (B, C, \*spatial) with one to three spatial dimensions.
        weight: weight (out, C, \*k) of the convolution, as in torch. Under autocast the
            convolution runs in the dtype of autocast, and the filter in that of its output.
        bias: bias (out,), added at the end.
        kernel: the taps, as in `upfirdn`; they are divided by their sum.
        factor: upsampling factor f.
        gain: factor by which the filter multiplies constants, besides factor^dims for the zeros.

    Returns:
        Output (B, out, \*(f spatial)).

    Raises:
        TypeError: if a tensor is not floating-point, dtypes differ without autocast, or a number
            has a wrong type.
        ValueError: if a shape or number is wrong or the taps have sum zero.

    Source: T. Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2020, arXiv
    1912.04958.
    """
    dims = check_signal(x)
    check_weight(weight, bias, x)
    taps = _normalized(kernel, x, factor, gain)
    sizes = zip(_sizes(taps, dims), weight.shape[2:], strict=True)
    pads = [
        ((p + 1) // 2 + factor - 1, p // 2 + factor - 1)
        for p in (size - factor - k + 1 for size, k in sizes)
    ]
    # Flipped, since this convolution is transposed; torch expects the shape (C, out, *k).
    weight = weight.transpose(0, 1).flip(tuple(range(2, 2 + dims)))
    y = CONV_TRANSPOSE[dims](x, weight, stride=factor)
    y = _filter(y, taps, float(gain) * factor**dims, 1, 1, pads)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * dims)


def _normalized(kernel: Sequence[float] | Tensor, x: Tensor, factor: int, gain: float) -> Taps:
    """Return the normalized taps of a kernel after validating it, the factor and the gain."""
    taps: Taps | None = None
    if type(kernel) is tuple and not torch.compiler.is_compiling():
        with contextlib.suppress(TypeError):  # what is no number raises again below
            taps = _normalized_tuple(kernel, *map(type, kernel))
    taps = normalize(check_kernel(kernel, x)) if taps is None else taps
    check_count(factor, "factor")
    check_finite_number(gain, "gain")
    return taps


@functools.lru_cache(maxsize=256)
def _normalized_tuple(kernel: tuple[float, ...], *types: type) -> Taps:
    """Return the normalized taps of numbers, whose types tell True from 1."""
    return normalize(check_numbers(kernel))


def _sizes(taps: Taps, dims: int) -> tuple[int, ...]:
    """Return the number of taps along each spatial dimension."""
    return tuple(taps.shape) if isinstance(taps, Tensor) else (len(taps),) * dims


def _filter(x: Tensor, taps: Taps, gain: float, up: int, down: int, pads: Pairs) -> Tensor:
    """Apply `upfirdn` to validated arguments, with the taps scaled by a gain."""
    dims = x.ndim - 2
    sizes = _sizes(taps, dims)
    for n, size, (before, after) in zip(x.shape[2:], sizes, pads, strict=True):
        kept = n * up + min(before, 0) + min(after, 0)
        if kept < 1 or n * up + before + after < size:
            raise ValueError(
                f"x: expected enough samples to filter, got {n} (upsampled by {up}, padded by "
                f"({before}, {after}), {size} taps)"
            )
    if isinstance(taps, tuple) and _fused.suits(x, taps):
        return _fused.upfirdn(x, _fused.plan(x, taps, gain, up, down, pads))
    return _plain.upfirdn(x, taps, gain, up, down, pads)
