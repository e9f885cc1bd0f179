"""FIR resampling by its definition, in numpy and float64, and random inputs for it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import seeded


def direct(
    x: Tensor, kernel: Tensor, up: int, down: int, padding: Sequence[tuple[int, int]]
) -> Tensor:
    """Zero-stuff, pad or crop, convolve with the flipped kernel, keep every down-th sample."""
    signal, taps = x.detach().double().numpy(), kernel.detach().double().numpy()
    dims = signal.ndim - 2
    if taps.ndim == 1:
        line = taps
        for _ in range(dims - 1):
            taps = np.multiply.outer(taps, line)
    spatial = tuple(range(2, 2 + dims))
    for axis, (before, after) in zip(spatial, padding, strict=True):
        shape = list(signal.shape)
        shape[axis] *= up
        stuffed = np.zeros(shape)
        np.moveaxis(stuffed, axis, 0)[::up] = np.moveaxis(signal, axis, 0)
        shape[axis] += before + after
        padded = np.zeros(shape)
        for at in range(shape[axis]):
            if 0 <= at - before < stuffed.shape[axis]:
                np.moveaxis(padded, axis, 0)[at] = np.moveaxis(stuffed, axis, 0)[at - before]
        signal = padded
    windows = np.lib.stride_tricks.sliding_window_view(signal, taps.shape, axis=spatial)
    windows = windows[(..., *(slice(None, None, down),) * dims, *(slice(None),) * dims)]
    axes = tuple(range(-dims, 0))
    return torch.from_numpy(np.asarray((windows * np.flip(taps)).sum(axis=axes)))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw seeded Gaussian noise."""
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)
