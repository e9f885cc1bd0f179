"""Precision, recall, density and coverage, from nearest neighbors of features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_count
from ._features import center, check_pair, double

_BLOCK = 2048  # rows per block of distances


class PrecisionRecall(NamedTuple):
    """Overlap of two sets of features.

    Args:
        precision: the fraction of generated samples within the ball of any real sample.
        recall: the fraction of real samples within the ball of any generated sample.
        density: the mean number of real samples' balls that contain a generated sample, divided
            by k; it may exceed 1.
        coverage: the fraction of real samples with a generated sample in their ball.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> PrecisionRecall:
    r"""Return improved precision and recall, density and coverage.

    The closed ball of a sample extends to its k-th nearest neighbor in its own set. Distances are
    computed by blocks in float64, about the features' center. If a distance from a matrix product
    is too close to a radius to decide, it is recomputed from differences, so that copies and ties
    are exact. Memory is that of the features and a few blocks, for any n.

    All four depend on k and the numbers of samples: compare only results with equal settings.
    Published results use k = 3 for precision and recall, k = 5 for density and coverage.

    Args:
        real: features (m, d).
        fake: features (n, d).
        k: the neighbor that sets the radius.

    Raises:
        ValueError: if a set has fewer than k + 1 rows, dimensions differ, or values are not finite.
        TypeError: if features are not floating-point tensors, or k is not an integer.

    Source: Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative
    Models, 2019, arXiv 1904.06991; Naeem et al., Reliable Fidelity and Diversity Metrics for
    Generative Models, 2020, arXiv 2002.09797, whose released code uses open balls, which differ
    only at ties.

    >>> real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> precision_recall(real, real + 1.5, k=1)
    PrecisionRecall(precision=0.75, recall=0.75, density=1.25, coverage=0.75)
    """
    check_count(k, "k")
    check_pair(real, fake, least=k + 1)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    origin = center(real, fake)
    in_recall, covered = [], []
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake_radii.device)
    for part, radii in _blocks(real, real_radii):
        x = double(part)
        recalled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        reached, counts = recalled.clone(), []
        for other, other_radii in _blocks(fake, fake_radii):
            y = double(other)
            distances, error = _squared_distances(x - origin, y - origin)
            inside = _within(distances, radii.unsqueeze(1), x, y, error)
            counts.append(inside.sum(0))
            reached |= inside.any(1)
            recalled |= _within(distances, other_radii.unsqueeze(0), x, y, error).any(1)
        balls += torch.cat(counts)
        in_recall.append(recalled)
        covered.append(reached)
    return PrecisionRecall(
        precision=_mean(balls > 0),
        recall=_mean(torch.cat(in_recall)),
        density=_mean(balls) / k,
        coverage=_mean(torch.cat(covered)),
    )


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x, _BLOCK), torch.split(y, _BLOCK), strict=True)


def _mean(x: Tensor) -> float:
    return float(x.double().mean())


def _squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances (m, n) by a matrix product, and a bound on their error.

    The bound includes the rounding of x and y themselves.
    """
    sizes, eps = x.square().sum(1).unsqueeze(1) + y.square().sum(1), torch.finfo(x.dtype).eps
    return torch.addmm(sizes, x, y.T, alpha=-2), sizes * (4 * (x.shape[1] + 2) * eps)


def _exact(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(1)


def _within(distances: Tensor, radii: Tensor, x: Tensor, y: Tensor, error: Tensor) -> Tensor:
    """Return the mask (m, n) of squared distances up to the squared radii (m, 1) or (1, n)."""
    inside = distances <= radii
    doubtful = ((distances - radii).abs() <= error).nonzero()
    for i, j in _blocks(doubtful[:, 0], doubtful[:, 1]):
        inside[i, j] = _exact(x[i], y[j]) <= radii.expand_as(distances)[i, j]
    return inside


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the squared distances to the k-th nearest other rows, (n,)."""
    found, origin = [], center(features)
    for start in range(0, len(features), _BLOCK):
        x = double(features[start : start + _BLOCK])
        nearest, index = x.new_zeros(len(x), 0), x.new_zeros(len(x), 0, dtype=torch.int64)
        for first in range(0, len(features), _BLOCK):
            y = double(features[first : first + _BLOCK])
            distances, _ = _squared_distances(x - origin, y - origin)
            if first == start:
                distances.fill_diagonal_(torch.inf)
            number = torch.arange(first, first + distances.shape[1], device=x.device)
            nearest = torch.cat([nearest, distances], 1)
            index = torch.cat([index, number.expand_as(distances)], 1)
            nearest, order = nearest.topk(min(k, nearest.shape[1]), largest=False)
            index = index.gather(1, order)
        exact = [_exact(x, double(features[column])) for column in index.T]
        found.append(torch.stack(exact).amax(0))
    return torch.cat(found)
