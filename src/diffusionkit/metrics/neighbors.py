"""Precision, recall, density and coverage, from nearest neighbors of features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_count, check_known
from ._features import center, check_features, check_pair, double

# Rows per block: of as many as make the block of features, or that of distances, 8 MB in float64.
_MOST_ROWS, _FEWEST_ROWS, _MOST_NUMBERS = 1024, 256, 2**20


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

    >>> import torch
    >>> from diffusionkit.metrics import precision_recall
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
    for x, radii in _blocks(real, real_radii):
        recalled = torch.zeros(len(x), dtype=torch.bool, device=fake_radii.device)
        reached, counts = recalled.clone(), []
        centered = double(x) - origin
        for y, other_radii in _blocks(fake, fake_radii):
            distances, error = _squared_distances(centered, double(y) - origin)
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


class Nearest(NamedTuple):
    """The nearest rows of a data set.

    Args:
        index: the indices of the nearest rows (n, k), the nearest first.
        distance: their Euclidean distances (n, k), in float64.
    """

    index: Tensor  # type: ignore[assignment]  # tuple has a method of this name
    distance: Tensor


def nearest(data: Tensor, queries: Tensor, k: int = 1) -> Nearest:
    r"""Return the k nearest rows of a data set for each of several queries.

    Use it to show generated images next to the most similar training images. In high dimensions
    neighbors in pixels are those with the same background; compare features instead.

    Args:
        data: the rows (N, \*D), of pixels or features; integers are accepted.
        queries: the queries (n, \*D).
        k: the number of neighbors.

    Raises:
        ValueError: if there are fewer than k rows, shapes differ, or values are not finite.
        TypeError: if an argument has the wrong type.

    >>> import torch
    >>> from diffusionkit.metrics import nearest
    >>> real = torch.tensor([[0.0], [2.0], [5.0]])
    >>> generated = torch.tensor([[4.0]])
    >>> nearest(real, generated, k=2)
    Nearest(index=tensor([[2, 1]]), distance=tensor([[1., 2.]], dtype=torch.float64))
    """
    check_count(k, "k")
    rows, sought = _rows(data, "data", k), _rows(queries, "queries", 1)
    if data.shape[1:] != queries.shape[1:] or data.device != queries.device:
        raise ValueError(
            f"queries: expected items of shape {tuple(data.shape[1:])} on {data.device}, as in "
            f"data, got {tuple(queries.shape[1:])} on {queries.device}"
        )
    squares, index = _nearest(sought, rows, k, other=False)
    return Nearest(index, squares.sqrt())


def _rows(x: Tensor, name: str, least: int) -> Tensor:
    """Return items (n, *D) as floating-point rows (n, d)."""
    check_known(x, name)
    flat = x.flatten(1) if x.ndim > 1 else x
    flat = flat if x.is_floating_point() else flat.to(torch.float32)
    check_features(flat, name, least=least)
    return flat


def _block(d: int) -> int:
    """Return the number of rows (n, d) of a block."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _MOST_NUMBERS // d))


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return rows (n, d) and numbers (n,) by blocks."""
    rows = _block(x.shape[1])
    return zip(torch.split(x, rows), torch.split(y, rows), strict=True)


def _mean(x: Tensor) -> float:
    return float(x.double().mean())


def _squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances (m, n) by a matrix product, and a bound on their error.

    The bound includes the rounding of x and y themselves.
    """
    sizes, eps = x.square().sum(1).unsqueeze(1) + y.square().sum(1), torch.finfo(x.dtype).eps
    distances = torch.addmm(sizes, x, y.T, alpha=-2)
    return distances, sizes.mul_(4 * (x.shape[1] + 2) * eps)


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distances of rows (n, d), in float64, from differences."""
    return (double(x) - double(y)).square_().sum(1)


def _within(distances: Tensor, radii: Tensor, x: Tensor, y: Tensor, error: Tensor) -> Tensor:
    """Return the mask (m, n) of squared distances up to the squared radii (m, 1) or (1, n)."""
    beyond = distances - radii
    inside = beyond <= 0
    doubtful = (beyond.abs_() <= error).nonzero()
    for pairs in torch.split(doubtful, _block(x.shape[1])):
        i, j = pairs.unbind(1)
        inside[i, j] = _exact(x[i], y[j]) <= radii.expand_as(distances)[i, j]
    return inside


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the squared distances to the k-th nearest other rows, (n,)."""
    return _nearest(features, features, k, other=True)[0][:, -1]


def _nearest(queries: Tensor, rows: Tensor, k: int, *, other: bool) -> tuple[Tensor, Tensor]:
    """Return the squared distances to the k nearest rows and their indices, each (n, k).

    Candidates are found by matrix products, and their distances computed from differences. With
    `other`, queries are the rows themselves, and a row is not its own neighbor.
    """
    distances_found, index_found = [], []
    origin, block = center(rows) if other else center(queries, rows), _block(rows.shape[1])
    for start in range(0, len(queries), block):
        x = queries[start : start + block]
        centered = double(x) - origin
        nearest = centered.new_zeros(len(x), 0)
        index = nearest.long()
        for first in range(0, len(rows), block):
            y = double(rows[first : first + block]) - origin
            distances, _ = _squared_distances(centered, y)
            if other and first == start:
                distances.fill_diagonal_(torch.inf)
            found, column = distances.topk(min(k, distances.shape[1]), largest=False)
            nearest, index = torch.cat([nearest, found], 1), torch.cat([index, column + first], 1)
            nearest, order = nearest.topk(min(k, nearest.shape[1]), largest=False)
            index = index.gather(1, order)
        places = index.to(rows.device)
        exact = torch.stack([_exact(x, rows[column]) for column in places.T], 1)
        exact, order = exact.sort(dim=1, stable=True)
        distances_found.append(exact)
        index_found.append(index.gather(1, order))
    return torch.cat(distances_found), torch.cat(index_found)
