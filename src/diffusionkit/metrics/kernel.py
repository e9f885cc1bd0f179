"""The kernel distance between two sets of features, unbiased and with a standard error."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._features import center, check_pair, double

_BLOCK = 2048  # rows per block of kernel values


class KernelDistance(NamedTuple):
    """A squared maximum mean discrepancy.

    Args:
        value: the estimate; it is unbiased, so it may be negative.
        stderr: its standard error over samples of the same sizes.
    """

    value: float
    stderr: float


def kernel_distance(real: Tensor, fake: Tensor) -> KernelDistance:
    r"""Return the kernel distance between two sets of features, KID for Inception features.

    .. math::
        \frac{1}{m(m-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{n(n-1)} \sum_{i \ne j} k(y_i, y_j)
        - \frac{2}{m n} \sum_{i, j} k(x_i, y_j),
        \qquad k(x, y) = \left(\frac{x^\top y}{d} + 1\right)^3

    over all pairs, in float64 and by blocks: memory is linear and time quadratic in m + n. Terms of
    the kernel that depend on one of its arguments cancel and are left out, so that features far
    from zero lose no digits. The often quoted mean over 100 random subsets of 1,000 estimates the
    same number with more noise, and the spread of those subsets is not the standard error of their
    mean.

    The standard error is the root of the first two terms of Hoeffding's decomposition,

    .. math::
        V_1 + V_2, \qquad
        V_2 = \frac{2 \tau_{xx}}{m(m-1)} + \frac{2 \tau_{yy}}{n(n-1)} + \frac{4 \tau_{xy}}{m n},
        \qquad
        V_1 = \frac{4}{m} \operatorname{Var} a + \frac{4}{n} \operatorname{Var} b - 2 V_2,

    :math:`a_i = \bar k(x_i, X) - \bar k(x_i, Y)`, :math:`b_j` defined alike, and :math:`\tau` the
    variances of kernel values after subtracting row and column means. So it also holds for equal
    distributions, where :math:`V_1` is zero. The estimate of :math:`V_1` is clipped at zero, so
    there the error is too large: by a factor of 1.4 in one dimension, 1.2 in ten.

    Args:
        real: features (m, d).
        fake: features (n, d).

    Raises:
        ValueError: if there are fewer than two rows, dimensions differ, or values are not finite.
        TypeError: if features are not floating-point tensors.

    Source: Binkowski et al., Demystifying MMD GANs, 2018, arXiv 1801.01401.

    >>> import torch
    >>> from diffusionkit.metrics import kernel_distance
    >>> x, y = torch.randn(200, 4), torch.randn(200, 4) + 1
    >>> distance = kernel_distance(x, y)
    >>> distance.value > 5 * distance.stderr
    True
    """
    check_pair(real, fake, least=2)
    m, n = len(real), len(fake)
    pairs_x, pairs_y, pairs_xy = m * (m - 1), n * (n - 1), m * n
    origin = center(real, fake)
    x, x_squares = _within(real, origin)
    y, y_squares = _within(fake, origin)
    rows, columns, squares = _between(real, fake, origin)
    means = (x.sum() / pairs_x, y.sum() / pairs_y, rows.sum() / pairs_xy)
    value = means[0] + means[1] - 2 * means[2]

    x, y, rows, columns = x / (m - 1), y / (n - 1), rows / n, columns / m
    rest_x = x_squares / pairs_x - means[0] ** 2 - 2 * x.var()
    rest_y = y_squares / pairs_y - means[1] ** 2 - 2 * y.var()
    rest_xy = squares / pairs_xy - means[2] ** 2 - rows.var() - columns.var()
    second = 2 * (rest_x / pairs_x + rest_y / pairs_y) + 4 * rest_xy / pairs_xy
    # The variances of the means contain the second term twice.
    first = 4 * ((x - rows).var() / m + (y - columns).var() / n) - 2 * second
    return KernelDistance(float(value), math.sqrt(max(float(first), 0.0) + float(second)))


def _kernel(x: Tensor, y: Tensor, origin: Tensor) -> Tensor:
    """Return k(x, y) - k(x, c) - k(c, y) + k(c, c) for rows x, y and a point c, (m, n).

    With u = x - c, v = y - c, w = u.v / d, a = u.c / d, b = v.c / d and p = c.c / d + 1 it is
    (q + w)^3 - q^3 + 3 a b (p + q), q = p + a + b.
    """
    d, (u, v) = len(origin), (double(z) - origin for z in (x, y))
    a, b = ((z @ origin / d) for z in (u, v))
    p = origin.square().sum() / d + 1
    w, q = (u @ v.T).div_(d), a.unsqueeze(1) + (b + p)
    between = (3 * a).unsqueeze(1) * b * (q + p)
    return w.mul(3 * q * (q + w) + w.square()).add_(between)


def _within(x: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of k(x_i, x_j) over j != i, (n,), and the sum of all their squares."""
    parts = torch.split(x, _BLOCK)
    sums = [double(part).new_zeros(len(part)) for part in parts]
    squares = sums[0].new_zeros(())
    for i, part in enumerate(parts):
        own = _kernel(part, part, origin).fill_diagonal_(0.0)
        sums[i] += own.sum(1)
        squares += own.square().sum()
        for j in range(i + 1, len(parts)):
            values = _kernel(part, parts[j], origin)
            sums[i] += values.sum(1)
            sums[j] += values.sum(0)
            squares += 2 * values.square().sum()
    return torch.cat(sums), squares


def _between(x: Tensor, y: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of k(x_i, y_j) over j, (m,), and i, (n,), and of all their squares."""
    rows, columns = [], double(y).new_zeros(len(y))
    squares = columns.new_zeros(())
    for part in torch.split(x, _BLOCK):
        values = [_kernel(part, other, origin) for other in torch.split(y, _BLOCK)]
        rows.append(torch.stack([block.sum(1) for block in values]).sum(0))
        columns += torch.cat([block.sum(0) for block in values])
        squares += torch.stack([block.square().sum() for block in values]).sum()
    return torch.cat(rows), columns, squares
