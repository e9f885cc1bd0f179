r"""Dequantization: from densities of real data to probabilities of integers.

Each integer k in 0..levels-1 is a bin of the model's range [low, high]. A dequantizer draws a
point in each bin,

.. math::
    x = \mathrm{low} + w (k + u), \quad w = (\mathrm{high} - \mathrm{low}) / \mathrm{levels},
    \quad u \sim q(u \mid k) \text{ on } (0, 1)^d,

and a density p of x then bounds the probability of k,

.. math::
    -\log P(k) \le E[\log q(x \mid k) - \log p(x)], \quad
    \log q(x \mid k) = \log q(u \mid k) - d \log w,

with both terms in the model's units, without any further offset.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_floating_dtype, check_state, readable
from .._repr import described
from .._returned import check_each
from .._schedules import exact, schedule_dtype
from ..decoders import Levels
from ..random import Generators, rand


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized:
    """A point in the bin of each integer.

    Args:
        x: the points (B, *D), in the model's range.
        log_prob: log q(x | image) (B,), in nats and the model's units, in float64 if the device
            supports it.
    """

    x: Tensor
    log_prob: Tensor


class Dequantizer(nn.Module, abc.ABC):
    """A conditional distribution of points in the bins of integers; subclasses define `noise`.

    `quantize(dequantizer(images).x)` returns the images exactly: points are kept away from the
    edges of their bins by more than rounding.

    Args:
        levels: the number of values an integer can take, 0..levels-1.
        low: the lower end of the model's range, the lower edge of bin 0.
        high: the upper end of the model's range, the upper edge of the last bin.
        dtype: the dtype of x, torch's default dtype if None.

    Raises:
        ValueError: if levels < 2, low and high are not finite with low < high, or dtype cannot
            resolve the bins.
        TypeError: if levels is not an integer, low or high not a number, or dtype not a
            floating-point dtype.
    """

    def __init__(
        self,
        levels: int = 256,
        low: float = -1.0,
        high: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._bins = Levels(levels, low, high)
        self.levels = levels
        self.low = float(low)
        self.high = float(high)
        check_floating_dtype(dtype)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self._rounding(self.dtype) > 0.25:
            raise ValueError(
                f"dtype: expected one that resolves {levels} levels on [{low:g}, {high:g}], "
                f"got {self.dtype}"
            )

    @abc.abstractmethod
    def noise(
        self, images: Tensor, /, *, generator: Generators = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw u (B, *D) in [0, 1] and return it with log q(u | images) (B,), nats.

        Args:
            images: integers (B, *D), int64 and within the levels.
            generator: the source of randomness.
            cond: further conditions, if any.
        """

    @override
    def __repr__(self) -> str:
        return described(self)

    @override
    def forward(
        self, images: Tensor, /, *, generator: Generators = None, **cond: Any
    ) -> Dequantized:
        """Draw a point in the bin of each integer.

        Args:
            images: integers (B, *D) in 0..levels-1, of any integer dtype.
            generator: the source of randomness.
            cond: passed to `noise`.

        Raises:
            ValueError: if the images are empty or have values outside the levels.
            TypeError: if the images are not integers.
        """
        k = self._integers(images)
        u, log_prob = self.noise(k, generator=generator, **cond)
        check_each(log_prob, len(k), self, "log q")
        if not isinstance(u, Tensor) or u.shape != k.shape:
            got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(
                f"{type(self).__name__}: expected u of the shape of the images, {tuple(k.shape)}, "
                f"got {got}"
            )
        work = schedule_dtype(k.device)
        inside = self._rounding(self.dtype) + 8 * self._rounding(work)
        position = k.to(work) + u.to(work).clamp(inside, 1 - inside)
        x = (self.low + self._bins.width * position).to(self.dtype)
        return Dequantized(x=x, log_prob=log_prob.to(work) + self._log_units(k))

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers (B, *D), int64, whose bins contain the points x (B, *D).

        Raises:
            ValueError: if x has values outside [low, high], beyond rounding.
            TypeError: if x is not a floating-point tensor.
        """
        check_state(x)
        position = self._position(x)
        if readable(x):
            first, last = position.detach().aminmax()
            slack = 4 * self._rounding(x.dtype)
            # Written so that a NaN fails.
            if not (first.item() >= -slack and last.item() <= self.levels + slack):
                low, high = x.detach().aminmax()
                raise ValueError(
                    f"x: expected values within [low, high] = [{self.low:g}, {self.high:g}], "
                    f"got values from {low.item():g} to {high.item():g}; clamp samples first"
                )
        return position.floor().long().clamp(0, self.levels - 1)

    def _position(self, x: Tensor) -> Tensor:
        """Return k + u of the points x, in float64 if the device supports it."""
        return (exact(x) - self.low) / self._bins.width

    def _rounding(self, dtype: torch.dtype) -> float:
        """Return the spacing of a dtype at the larger end of the range, in bin widths."""
        return torch.finfo(dtype).eps * max(abs(self.low), abs(self.high)) / self._bins.width

    def _log_units(self, k: Tensor) -> float:
        """Return log du/dx, summed over the dimensions of a sample."""
        return -k[0].numel() * math.log(self._bins.width)

    def _integers(self, images: Tensor) -> Tensor:
        self._bins.check(images)
        return images.long()


class UniformDequantizer(Dequantizer):
    """Uniform points in their bins: log q(u | image) = 0. For arguments see `Dequantizer`.

    Source: Theis et al., A Note on the Evaluation of Generative Models, 2016, arXiv 1511.01844.

    >>> import math
    >>> import torch
    >>> from diffusionkit import UniformDequantizer
    >>> dequantizer = UniformDequantizer(levels=256, low=-1.0, high=1.0)
    >>> images = torch.tensor([[0, 128, 255]])
    >>> drawn = dequantizer(images)
    >>> bool((dequantizer.quantize(drawn.x) == images).all())
    True
    >>> # bits per dimension
    >>> round(drawn.log_prob.item() / (3 * math.log(2)), 9)
    7.0
    """

    @override
    def noise(
        self, images: Tensor, /, *, generator: Generators = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        u = rand(images.shape, generator=generator, device=images.device, dtype=self.dtype)
        return u, u.new_zeros(len(images))
