"""FIR resampling in plain torch: one grouped convolution, with one group per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import autocast_enabled
from .._kept import Kept
from ._signals import Taps, outer

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CHANNELS_LAST = torch.channels_last
_HALF = (torch.float16, torch.bfloat16)

Pairs = Sequence[tuple[int, int]]

_weights: Kept[Tensor] = Kept()


def upfirdn(x: Tensor, taps: Taps, gain: float, up: int, down: int, pads: Pairs) -> Tensor:
    r"""Insert zeros, pad, filter and downsample.

    Args:
        x: input (B, C, \*spatial).
        taps: the kernel.
        gain: factor of the output.
        up: upsampling factor.
        down: downsampling factor.
        pads: zeros before and after, negative to crop, for each dimension.

    Returns:
        Output (B, C, \*filtered) with the dtype and the memory format of x.
    """
    # On the CPU the transposed convolutions of half precision are slow: use float32.
    dtype = torch.float32 if x.dtype in _HALF and x.device.type == "cpu" else x.dtype
    channels, flipped = x.shape[1], up == 1
    if isinstance(taps, tuple):
        line, dims, device = taps, x.ndim - 2, x.device
        key = line, gain, dims, channels, flipped, dtype, device
        weight = _weights.get(
            key, lambda: _weight(_kernel(line, dims, gain, dtype).to(device), channels, flipped)
        )
    else:
        weight = _weight((taps * gain).to(dtype), channels, flipped)
    if autocast_enabled(x):
        with torch.autocast(x.device.type, enabled=False):
            return _convolve(x.to(dtype), weight, up, down, pads).to(x.dtype)
    if x.dtype is dtype:
        return _convolve(x, weight, up, down, pads)
    return _convolve(x.to(dtype), weight, up, down, pads).to(x.dtype)


def _kernel(taps: tuple[float, ...], dims: int, gain: float, dtype: torch.dtype) -> Tensor:
    """Return the kernel of the taps along all dimensions, on the CPU."""
    line = torch.tensor(taps, dtype=torch.float64, device="cpu")
    return (outer(line, dims) * gain).to(dtype)


def _weight(kernel: Tensor, channels: int, flipped: bool) -> Tensor:
    """Return the weight (C, 1, *k) of a convolution, the same memory for each channel."""
    # torch's convolutions do not flip their kernel; the transposed ones do.
    kernel = kernel.flip(tuple(range(kernel.ndim))) if flipped else kernel
    return kernel.expand(channels, 1, *kernel.shape)


def _convolve(x: Tensor, weight: Tensor, up: int, down: int, pads: Pairs) -> Tensor:
    dims, channels = x.ndim - 2, x.shape[1]
    if up == 1:
        even = _even(pads)
        x = _pad(x, [(p - e, q - e) for (p, q), e in zip(pads, even, strict=True)])
        return CONV[dims](x, weight, stride=down, padding=even, groups=channels)
    # Transposed convolutions return every sample within reach of a tap; some are cropped.
    crops = [(k - 1 - p, k - up - q) for k, (p, q) in zip(weight.shape[2:], pads, strict=True)]
    even = _even(crops)
    y = CONV_TRANSPOSE[dims](x, weight, stride=up, padding=even, groups=channels)
    y = _pad(y, [(e - p, e - q) for (p, q), e in zip(crops, even, strict=True)])
    if down == 1:
        return y
    if torch.compiler.is_compiling():  # inductor fails at this convolution's gradient in any size
        last = dims == 2 and not y.is_contiguous() and y.is_contiguous(memory_format=CHANNELS_LAST)
        kept = y[(slice(None), slice(None), *(slice(None, None, down),) * dims)]
        return kept.contiguous(memory_format=CHANNELS_LAST if last else torch.contiguous_format)
    # A slice would keep all of y alive and lose its memory format.
    one = weight.new_ones((1,) * dims).expand(channels, 1, *(1,) * dims)
    return _convolve(y, one, 1, down, ((0, 0),) * dims)


def _even(pads: Pairs) -> list[int]:
    """Return the part of each pair that a convolution can pad: the same before and after."""
    return [max(0, min(pair)) for pair in pads]


def _pad(x: Tensor, pads: Pairs) -> Tensor:
    """Pad with zeros, or crop where numbers are negative, the first dimension first."""
    flat = [number for pair in reversed(pads) for number in pair]
    return F.pad(x, flat) if any(flat) else x
