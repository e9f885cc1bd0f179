"""Control variates for the squared error of a noise prediction, along a sequence of draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._masks import count, zeroed
from .._schedules import exact

# Below this many draws, neighbors are too far away in time to predict one another.
LEAST = 10
# Shares of the draws over which means of earlier draws reach: of errors, and of their variances,
# whose means need more draws.
_NEAR, _WIDE = 0.01, 0.04
_FEWEST = 8  # draws from which the variance of one element is estimated


class SquaredErrors:
    r"""Squared errors of the noise of successive draws, with less variance and the same mean.

    Close to a draw's time, the error of a denoiser is roughly linear in the noise, with slope a,
    intercept b and slopes and variances of its own in each element. From each squared error is
    subtracted

    .. math::
        h = \sum_i (c + \delta_i)(\epsilon_i^2 - 1) + 2 \sum_i (a + g_i)\, b_i \epsilon_i, \quad
        c = \frac{\sum \|\Delta e\|^2}{\sum \|\Delta\epsilon\|^2}, \quad
        a = \frac{\sum \Delta e^\top \Delta\epsilon}{\sum \|\Delta\epsilon\|^2},

    whose mean is zero, since no coefficient depends on the draw itself: the sums are over
    differences of neighboring draws, b is a mean of e - a eps over earlier draws and the next one,
    and delta and g, the deviations of single elements, are those of earlier draws, as far as they
    stand out from their noise. So the result is unbiased, and for Gaussian data nearly free of
    noise. Seven vectors are kept at a time, whatever the number of draws.

    Args:
        draws: the number of draws that are going to be added.
        mask: 0 for the elements that do not count, (B, *D), or None. Their errors must be 0.
    """

    def __init__(self, draws: int, mask: Tensor | None = None) -> None:
        """Begin an empty sequence."""
        self._mask = mask
        self._squares: list[Tensor] = []
        self._products: list[Tensor] = []
        self._near, self._wide = _Recent(_NEAR * draws), _Recent(_WIDE * draws)
        self._sizes: list[float] = []
        self._elements: list[Tensor] = []
        self._last: Tensor | None = None
        self._weights: Tensor | None = None
        self._every = max(1, round(_WIDE * draws / 8))
        self._d: int | Tensor = 0

    def add(self, error: Tensor, eps: Tensor) -> None:
        """Append the errors (B, *D) of one draw of noise eps (B, *D) for each sample."""
        self._d = count(eps, self._mask)
        flat = [exact(v).reshape(len(v), -1) for v in (error, zeroed(eps, self._mask))]
        self._squares.append(flat[0].square().sum(1))
        rows = torch.stack([v.detach() for v in flat], 1)  # (B, 2, d)
        squares = rows * rows
        past = self._near.mean if self._near.size else torch.zeros_like(rows)
        last = rows if self._last is None else self._last
        others = torch.cat([rows, last, past], 1)
        self._products.append(rows @ others.mT)  # (B, 2, 6)
        self._sizes.append(self._near.size)
        self._elements.append(self._of_elements(rows[:, 1], squares[:, 1]))
        self._near.add(rows)
        self._wide.add(torch.cat([rows, squares, rows[:, :1] * rows[:, 1:]], 1))
        self._last = rows

    def _of_elements(self, eps: Tensor, squares: Tensor) -> Tensor:
        """Return sum_i (delta_i / c) eps_i^2 and sum_i g_i b_i eps_i (B, 2), from earlier draws."""
        if self._wide.size < _FEWEST:
            return eps.new_zeros(len(eps), 2)
        if self._weights is None or len(self._sizes) % self._every == 0:
            self._weights = self._deviations()
        return (self._weights * torch.stack([squares, eps], 1)).sum(2)

    def _deviations(self) -> Tensor:
        """Return delta / c and g b of each element (B, 2, d), from earlier draws."""
        e, n, ee, nn, en = self._wide.mean.unbind(1)
        d = exact(self._d).unsqueeze(1) if isinstance(self._d, Tensor) else float(self._d)
        kept = 1.0 if self._mask is None else exact(self._mask).expand(
            len(e), *self._mask.shape[1:]).reshape(len(e), -1)  # fmt: skip
        tiny = torch.finfo(e.dtype).tiny
        variance = (ee - e * e).clamp(min=0)
        other = (variance / (variance.sum(1, keepdim=True) / d).clamp(min=tiny) - 1) * kept
        # The part of the spread of the variances that exceeds the noise of estimating them.
        noise = 2 / self._wide.size
        spread = other.square().sum(1, keepdim=True) / d
        real = (1 - 1.5 * noise / spread.clamp(min=tiny)).clamp(min=0)
        slope = (en - e * n) / (nn - n * n).clamp(min=1e-3)
        mean = (slope * kept).sum(1, keepdim=True) / d
        near = self._near.mean
        intercept = near[:, 0] - mean * near[:, 1]
        return real.unsqueeze(1) * torch.stack([other, (slope - mean) * kept * intercept], 1)

    def values(self) -> Tensor:
        """Return the squared errors (k, B) of the k draws, with gradients, in float64."""
        return torch.stack(self._squares) - self.control()

    def control(self) -> Tensor:
        """Return h (k, B), which has the mean zero, in float64; 0 for fewer than ten draws."""
        squares = torch.stack(self._squares).detach()
        draws = len(squares)
        # Fewer differences in few dimensions would give ratios of infinite variance; with a mask
        # there may be one.
        side = max(2, math.ceil(4 / self._d)) if isinstance(self._d, int) else 4
        width = 2 * side + 2
        if draws < max(LEAST, width + 1):
            return torch.zeros_like(squares)
        products = torch.stack(self._products)  # (k, B, 2, 6)
        own, with_last, with_past = (products[..., i : i + 2] for i in (0, 2, 4))
        step = own[1:] + own[:-1] - with_last[1:] - with_last[1:].mT
        draw = torch.arange(draws, device=squares.device)
        start = (draw - side - 1).clamp(0, draws - 1 - width)
        pairs = (step[..., 0, 0], step[..., 0, 1], step[..., 1, 1])
        ee, en, nn = (v.unfold(0, width, 1).sum(-1)[start] - _touching(v) for v in pairs)
        c, a = ee / nn, en / nn
        # b^T eps: the mean over earlier draws weighs as many as it is worth, the next draw one.
        size = squares.new_tensor(self._sizes).unsqueeze(1)
        after = torch.ones_like(size)
        after[-1] = 0.0
        past = with_past[..., 1, 0] - a * with_past[..., 1, 1]
        following = _padded(with_last[1:, :, 0, 1], 1) - a * _padded(with_last[1:, :, 1, 1], 1)
        intercept = (size * past + after * following) / (size + after)
        quadratic, linear = torch.stack(self._elements).unbind(2)
        quadratic = own[..., 1, 1] - self._d + quadratic  # the deviations have the sum 0
        control: Tensor = c * quadratic + 2 * (a * intercept + linear)
        return control


class _Recent:
    """Exponentially weighted means of tensors, over about 2 `width` of the last ones."""

    def __init__(self, width: float) -> None:
        self._decay = math.exp(-1 / max(1.0, width))
        self._sum: Tensor | None = None
        self._weight = self._square = 0.0

    def add(self, value: Tensor) -> None:
        self._sum = value.clone() if self._sum is None else self._sum.mul_(self._decay).add_(value)
        self._weight = self._decay * self._weight + 1
        self._square = self._decay**2 * self._square + 1

    @property
    def size(self) -> float:
        """The number of independent values whose plain mean has the same variance."""
        return self._weight**2 / self._square if self._weight else 0.0

    @property
    def mean(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("mean: expected values, got none")
        return self._sum / self._weight


def _padded(v: Tensor, after: int) -> Tensor:
    """Return values (k - 1, B) of pairs as (k, B), with a zero before or after them."""
    zero = v.new_zeros(1, *v.shape[1:])
    return torch.cat([v, zero] if after else [zero, v])


def _touching(v: Tensor) -> Tensor:
    """Return for each draw (k, B) the sum over the pairs (k - 1, B) that contain it."""
    return _padded(v, 0) + _padded(v, 1)


def squared_noise(values: Tensor) -> Tensor:
    """Return a squared standard deviation for each of k > 1 successive values (k, B).

    Second differences of neighbors cancel a linear change of the integrand, which one draw per
    stratum does not sample. Two draws have only a first difference.
    """
    if len(values) == 2:
        return (values.diff(dim=0).square() / 2).expand(2, -1)
    found = values.diff(dim=0, n=2).square() / 6
    return torch.cat([found[:1], found, found[-1:]])
