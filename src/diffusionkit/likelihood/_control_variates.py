"""Control variates for the squared error of a noise prediction, along a sequence of draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._masks import count, zeroed
from .._schedules import exact

# Below this many draws, neighbors are too far away in time to predict one another.
LEAST = 10


class SquaredErrors:
    r"""Squared errors of the noise of successive draws, with less variance and the same mean.

    Close to a draw's time, the error of a denoiser is roughly linear in the noise, with slope a
    and intercept b. From each squared error is subtracted

    .. math::
        h = c\, (\|\epsilon\|^2 - d) + 2 a\, b^\top \epsilon, \quad
        c = \frac{\sum \|\Delta e\|^2}{\sum \|\Delta\epsilon\|^2}, \quad
        a = \frac{\sum \Delta e^\top \Delta\epsilon}{\sum \|\Delta\epsilon\|^2}, \quad
        b = e' - a \epsilon',

    whose mean is zero: the sums are over differences of neighboring draws and b is the mean over
    the draws before and after, none of which is the draw itself. So the result is unbiased, and
    for Gaussian data nearly free of noise. Only one draw's vectors are kept at a time.

    Args:
        mask: 0 for the elements that do not count, (B, *D), or None. Their errors must be 0.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        """Begin an empty sequence."""
        self._mask = mask
        self._squares: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._pairs: list[tuple[Tensor, ...]] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self._d: int | Tensor = 0

    def add(self, error: Tensor, eps: Tensor) -> None:
        """Append the errors (B, *D) of one draw of noise eps (B, *D) for each sample."""
        self._d = count(eps, self._mask)
        error, eps = (exact(v).reshape(len(v), -1) for v in (error, zeroed(eps, self._mask)))
        self._squares.append(error.square().sum(1))
        error, eps = error.detach(), eps.detach()
        self._norms.append(eps.square().sum(1))
        if self._last is not None:
            e, n = self._last
            step_e, step_n = error - e, eps - n
            products = (
                *((step_e, step_e), (step_e, step_n), (step_n, step_n)),
                *((e, eps), (error, n), (n, eps)),
            )
            self._pairs.append(tuple((u * v).sum(1) for u, v in products))
        self._last = error, eps

    def values(self) -> Tensor:
        """Return the squared errors (k, B) of the k draws, with gradients, in float64."""
        squares = torch.stack(self._squares)
        draws = len(squares)
        # Fewer differences in few dimensions would give ratios of infinite variance; with a mask
        # there may be one.
        side = max(2, math.ceil(4 / self._d)) if isinstance(self._d, int) else 4
        width = 2 * side + 2
        if draws < max(LEAST, width + 1):
            return squares
        columns = (torch.stack(column) for column in zip(*self._pairs, strict=True))
        ee, en, nn, before, after, between = columns
        draw = torch.arange(draws, device=squares.device)
        start = (draw - side - 1).clamp(0, draws - 1 - width)
        ee, en, nn = (v.unfold(0, width, 1).sum(-1)[start] - _touching(v) for v in (ee, en, nn))
        c, a = ee / nn, en / nn
        sides = torch.full((draws, 1), 2.0, dtype=ee.dtype, device=ee.device)
        sides[0] = sides[-1] = 1.0
        # b^T eps, from the products with the errors and noises of the draws on either side.
        errors = _padded(before, 0) + _padded(after, 1)
        intercept = (errors - a * _touching(between)) / sides
        return squares - c * (torch.stack(self._norms) - self._d) - 2 * a * intercept


def _padded(v: Tensor, after: int) -> Tensor:
    """Return values (k - 1, B) of pairs as (k, B), with a zero before or after them."""
    zero = v.new_zeros(1, *v.shape[1:])
    return torch.cat([v, zero] if after else [zero, v])


def _touching(v: Tensor) -> Tensor:
    """Return for each draw (k, B) the sum over the pairs (k - 1, B) that contain it."""
    return _padded(v, 0) + _padded(v, 1)


def variance_of_mean(values: Tensor) -> Tensor:
    """Return the variance (B,) of the mean of one draw (k, B) in each of k > 1 strata.

    Second differences of neighbors cancel a linear change of the integrand, which one draw per
    stratum does not sample. Two draws have only a first difference.
    """
    k = len(values)
    if k == 2:
        return values.diff(dim=0)[0].square() / 4
    return values.diff(dim=0, n=2).square().mean(0) / (6 * k)
