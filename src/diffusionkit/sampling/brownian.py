"""A Brownian path for each seed, the same at every number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import overload

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_count, readable
from .._grid_times import kernel
from .._schedules import schedule_dtype
from ..interfaces import ForwardSDE
from ..random import NoisePath

_OCTAVES = 64  # (sigma / alpha)^2 is resolved between 2^-64 and 2^64,
_FINEST = 20  # to 2^-20 of an octave,
_LEVELS = (2 * _OCTAVES).bit_length() - 1 + _FINEST  # with this many bisections
_LEAVES = 1 << _LEVELS


class BrownianPath(NoisePath):
    r"""Noise along one Brownian path for each seed, the same at every number of steps.

    In y = x / alpha the noise of the reverse SDE is additive, dy = ... + dW(u) with the clock
    u = (sigma / alpha)^2, for every process. A predictor's step from t to s gets

    .. math::
        z = \frac{W(u_s) - W(u_t)}{\sqrt{u_t - u_s}},

    standard normal and independent of the noise of any other interval. With generators, samples at
    N and 2 N steps are unrelated; along a path their distance shrinks with the step and shows the
    solver's error without the noise. All other draws, for an initial state or a corrector, are new
    noise from the seeds' generators: make a new path for each run. A sampler raises if a predictor
    adds noise that is not the path's.

    W is a tree of Brownian bridges, bisected in log u. Its nodes are counter-based normals in
    float64, functions of seed and node alone: no value depends on earlier calls, on the batch or,
    up to rounding, on the device, and nothing is stored. The clock is resolved to 2^-20 of an
    octave, a millionth of u, and the noise between two readings is exactly normal. A step
    takes 28 to 56 normals for each entry of the state.

    Args:
        seeds: one seed for each sample of the batch, such as range(64).

    Raises:
        TypeError: if seeds is not a sequence of integers.
        ValueError: if it is empty, or a seed is outside [0, 2^63).

    Source: Li et al., Scalable Gradients for Stochastic Differential Equations, 2020, arXiv
    2001.01328 (section 4); Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011.

    >>> from diffusionkit import (
    ...     VPSDE, Ancestral, BrownianPath, GaussianMixtureModel, LogSNRGrid,
    ...     PCSampler
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> grid = LogSNRGrid()
    >>> for steps in (50, 100, 200):
    ...     sampler = PCSampler(model, Ancestral(), steps=steps, grid=grid)
    ...     x = sampler((3, 1), generator=BrownianPath(range(3)))
    ...     [round(value, 1) for value in x.flatten().tolist()]
    [1.5, 1.7, 1.8]
    [1.5, 1.8, 1.7]
    [1.5, 1.9, 1.8]
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """Keep the seeds."""
        if not isinstance(seeds, Sequence) or isinstance(seeds, (str, bytes)):
            raise TypeError(
                "seeds: expected a sequence of integers, one for each sample, such as range(64), "
                f"got {type(seeds).__name__}"
            )
        if not seeds:
            raise ValueError("seeds: expected at least one, got none")
        for seed in seeds:
            check_count(seed, "seeds", least=0, most=2**64 - 1)
            if seed >= 1 << 63:
                raise ValueError(f"seeds: expected integers below 2^63, got {seed}")
        self.seeds = tuple(seeds)

    @override
    def __repr__(self) -> str:
        return f"BrownianPath({len(self)} samples)"

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    @override
    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> torch.Generator: ...

    @overload
    def __getitem__(self, index: slice) -> BrownianPath: ...

    @override
    def __getitem__(self, index: int | slice) -> torch.Generator | BrownianPath:
        """Return the generator of a sample, or the path of some samples."""
        if isinstance(index, slice):
            part = BrownianPath(self.seeds[index])
            part._generators = self._generators[index]
            return part
        return self._generators[index]

    @override
    def increment(self, x: Tensor, sde: ForwardSDE, t: Tensor, s: Tensor) -> Tensor:
        """Return the noise of the step from times t (B,) to s (B,), in the shape and dtype of x.

        Raises:
            ValueError: if there is not one seed for each sample, or a step is too short for the
                resolution (read on the CPU only).
        """
        if x.shape[0] != len(self):
            raise ValueError(
                f"generator: expected one seed for each of the {x.shape[0]} samples, "
                f"got {len(self)}"
            )
        leaves = [_leaf(*kernel(sde, x, time)) for time in (t, s)]
        if leaves[0].device != leaves[1].device:  # one of them from a grid's floats
            leaves = [leaf.to(x.device) for leaf in leaves]
        start, end = (leaf.expand(max(map(len, leaves))) for leaf in leaves)
        if readable(start) and bool((end >= start).any()):
            raise ValueError(
                "s: expected steps of at least 2^-20 of an octave of (sigma / alpha)^2 and s < t, "
                f"got t = {t.tolist()[:4]} and s = {s.tolist()[:4]}"
            )
        (nodes, at_end), (others, at_start) = _tree(end), _tree(start)
        # Above the first node that differs, both ends share all nodes.
        common = int((nodes == others).all(1).sum()) if readable(start) else 0
        weights = torch.cat([at_end, -at_start[common:]])
        weights[:common] -= at_start[:common]
        weights = weights * torch.rsqrt(_clock(start) - _clock(end))
        weights = weights.to(schedule_dtype(x.device))
        nodes = torch.cat([nodes, others[common:]])
        nodes, weights = (c.to(x.device).expand(-1, len(self)) for c in (nodes, weights))
        seeds = torch.tensor(self.seeds, device=x.device)
        total = _weighted_normals(_mixed(_mixed(seeds) + nodes), weights, x[0].numel())
        return total.view(x.shape).to(x.dtype)


def _leaf(alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return the clock reading, 0 ... _LEAVES, nearest to (sigma / alpha)^2, (n,).

    It is on the CPU where the device has no float64: float32 does not resolve readings.
    """
    alpha, sigma = (
        c.cpu() if isinstance(c, Tensor) and schedule_dtype(c.device) == torch.float32 else c
        for c in (alpha, sigma)
    )
    alpha, sigma = (torch.as_tensor(c, dtype=torch.float64).reshape(-1) for c in (alpha, sigma))
    octave = 2 * (torch.log2(sigma) - torch.log2(alpha)) + _OCTAVES
    return (octave * (1 << _FINEST)).round().clamp(0, _LEAVES).long()


def _clock(leaf: Tensor) -> Tensor:
    """Return (sigma / alpha)^2 at readings."""
    return torch.exp2(leaf.double() / (1 << _FINEST) - _OCTAVES)


def _tree(leaf: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the nodes above readings (n,) and their weights, each (levels + 1, n).

    W(u) is the sum over nodes of their normals, times the deviation of the bridge at the node,
    times the hat function at u that is 1 at the node and 0 at the two ends of the bridge: Levy's
    construction. The root is the last reading, where W is N(0, u).
    """
    halves = torch.tensor([1 << k for k in range(_LEVELS - 1, -1, -1)], device=leaf.device)
    low = leaf // (2 * halves.unsqueeze(1)) * (2 * halves.unsqueeze(1))
    middle, high = low + halves.unsqueeze(1), low + 2 * halves.unsqueeze(1)
    u, a, m, b = (_clock(k) for k in (leaf, low, middle, high))
    rise, fall = (m - a), (b - m)
    hat = torch.where(leaf < middle, (u - a) / rise, (b - u) / fall)
    last = 2.0 ** (0.5 * _OCTAVES)
    root = (u / last).unsqueeze(0)
    nodes = torch.cat([torch.full_like(leaf, _LEAVES).unsqueeze(0), middle])
    return nodes, torch.cat([root, hat * torch.sqrt(rise * fall / (rise + fall))])


def _weighted_normals(keys: Tensor, weights: Tensor, n: int) -> Tensor:
    """Return the sums (B, n) over nodes of weights (N, B) times normals of keys (N, B)."""
    # In blocks that fit into a processor's cache, or keep a GPU busy.
    block = 1 << (16 if keys.device.type == "cpu" else 22)
    rows = min(keys.shape[1], max(1, block // n))
    nodes = max(1, block // (rows * n))
    sums = []
    for some in zip(*(torch.split(c, rows, 1) for c in (keys, weights)), strict=True):
        total = weights.new_zeros(some[0].shape[1], n)
        for key, weight in zip(*(torch.split(c, nodes) for c in some), strict=True):
            total += torch.einsum("kb,kbn->bn", weight, _normals(key, n, weight.dtype))
        sums.append(total)
    return torch.cat(sums)


def _normals(keys: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return n standard normals for each of the keys (..., n), by the Box-Muller transform."""
    counter = torch.arange(1, (n + 1) // 2 + 1, device=keys.device)
    bits = _mixed(keys.unsqueeze(-1) + counter * _GOLDEN)
    unit = ((bits & 0xFFFFFFFF).to(dtype) + 0.5) * 2.0**-32
    angle = (bits >> 32).to(dtype) * (math.pi * 2.0**-31)
    radius = torch.sqrt(-2 * torch.log(unit))
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], -1)[..., :n]


# SplitMix64 (Steele et al., 2014) in the wrapping arithmetic of int64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def _mixed(bits: Tensor) -> Tensor:
    """Return 64 bits that all depend on all bits of the input, by a bijection."""
    for shift, factor in _FACTORS:
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Return the logical shift to the right; int64's own shift would repeat the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
