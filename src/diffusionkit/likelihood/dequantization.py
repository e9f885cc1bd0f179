r"""From integers to the reals: what makes a density's bits those of the discrete data.

Integers k in 0..levels-1 stand for bins of the model's range [low, high]. A dequantizer draws a
point of each bin,

.. math::
    x = \mathrm{low} + w (k + u), \quad w = (\mathrm{high} - \mathrm{low}) / \mathrm{levels},
    \quad u \sim q(u \mid k) \text{ on } (0, 1)^d,

and a density p of x then bounds the probability of k,

.. math::
    -\log P(k) \le E[\log q(x \mid k) - \log p(x)], \quad
    \log q(x \mid k) = \log q(u \mid k) - d \log w,

with both terms in the model's own units, so that nothing is left to be added.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_state, readable
from .._schedules import exact, schedule_dtype
from ..decoders import Levels
from ..random import Generators, rand


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized:
    """A point in the bin of each integer.

    Args:
        x: the points (B, *D), in the model's range.
        log_prob: log q(x | image) in nats, in the model's units, (B,), in float64 where the
            device has it.
    """

    x: Tensor
    log_prob: Tensor


class Dequantizer(nn.Module, abc.ABC):
    """A law of points in the bins of integers; subclasses write `noise`.

    `quantize(dequantizer(images).x)` gives the images back exactly: a point that rounding would
    put onto the edge of its bin is kept inside.

    Args:
        levels: the number of values an integer can take, 0..levels-1.
        low: the lower end of the model's range, the lower edge of bin 0.
        high: the upper end of the model's range, the upper edge of the last bin.
        dtype: the dtype of x, torch's default dtype if None.

    Raises:
        ValueError: unless levels >= 2 and low < high, both finite, or if the dtype cannot tell
            the bins apart.
        TypeError: if levels is not an integer, low or high not a number, dtype not a
            floating-point one.
    """

    def __init__(
        self,
        levels: int = 256,
        low: float = -1.0,
        high: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Keep the map."""
        super().__init__()
        self._bins = Levels(levels, low, high)
        self.levels = levels
        self.low = float(low)
        self.high = float(high)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {self.dtype}")
        if self._rounding(self.dtype) > 0.25:
            raise ValueError(
                f"dtype: {self.dtype} cannot tell {levels} levels on [{low:g}, {high:g}] apart"
            )

    @abc.abstractmethod
    def noise(
        self, images: Tensor, *, generator: Generators = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw u (B, *D) in [0, 1], and log q(u | images) in nats (B,).

        Args:
            images: integers (B, *D), int64 and within the levels.
            generator: the source of randomness.
            cond: what the images are conditioned on, if anything.
        """

    def forward(self, images: Tensor, *, generator: Generators = None, **cond: Any) -> Dequantized:
        """Draw a point in the bin of each integer.

        Args:
            images: integers (B, *D) in 0..levels-1, of any integer dtype.
            generator: the source of randomness.
            cond: handed to `noise`.

        Raises:
            ValueError: if the images are empty or have values outside the levels.
            TypeError: if the images are not integers.
        """
        k = self._integers(images)
        u, log_prob = self.noise(k, generator=generator, **cond)
        work = schedule_dtype(k.device)
        inside = self._rounding(self.dtype) + 8 * self._rounding(work)
        position = k.to(work) + u.to(work).clamp(inside, 1 - inside)
        x = (self.low + self._bins.width * position).to(self.dtype)
        return Dequantized(x=x, log_prob=log_prob.to(work) + self._log_units(k))

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers (B, *D), int64, in whose bins the points x (B, *D) lie.

        Raises:
            ValueError: if x has values outside [low, high], by more than rounding.
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
        """Return k + u of the points x, in float64 where the device has it."""
        return (exact(x) - self.low) / self._bins.width

    def _rounding(self, dtype: torch.dtype) -> float:
        """Return the spacing of a dtype at the larger end of the range, in widths of a bin."""
        return torch.finfo(dtype).eps * max(abs(self.low), abs(self.high)) / self._bins.width

    def _log_units(self, k: Tensor) -> float:
        """Return log du/dx, summed over the dimensions of a sample."""
        return -k[0].numel() * math.log(self._bins.width)

    def _integers(self, images: Tensor) -> Tensor:
        self._bins.check(images)
        return images.long()


class UniformDequantizer(Dequantizer):
    """Points uniform in their bins: log q(u | image) = 0.

    Args:
        levels: the number of values an integer can take, 0..levels-1.
        low: the lower end of the model's range.
        high: the upper end of the model's range.
        dtype: the dtype of x, torch's default dtype if None.

    Source: Theis et al., A Note on the Evaluation of Generative Models, 2016, arXiv 1511.01844.

    >>> import math
    >>> dequantizer = UniformDequantizer(levels=256, low=-1.0, high=1.0)
    >>> images = torch.tensor([[0, 128, 255]])
    >>> drawn = dequantizer(images)
    >>> bool((dequantizer.quantize(drawn.x) == images).all())
    True
    >>> round(drawn.log_prob.item() / (3 * math.log(2)), 9)  # bits for each dimension
    7.0
    """

    def noise(
        self, images: Tensor, *, generator: Generators = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw u uniform on [0, 1), (B, *D); its log-density is 0."""
        u = rand(images.shape, generator=generator, device=images.device, dtype=self.dtype)
        return u, u.new_zeros(len(images))
