"""The Frechet distance of two sets of features, from moments that are kept while they stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._features import check_features, double

# What is in float64 at once: rows of features, and columns of the scatter matrix.
_ROWS, _COLUMNS = 4096, 256


class FeatureMoments:
    r"""The mean and the covariance of features, whose rows are not kept.

    .. math::
        \mu = \frac{1}{n} \sum_i x_i, \qquad
        S = \frac{1}{n - 1} \sum_i (x_i - \mu)(x_i - \mu)^\top

    in float64, each batch about its own mean, so that features far from zero lose nothing. Memory
    is that of one (d, d) matrix, however many samples there are.

    Source: the update by batches is Chan, Golub, LeVeque (1982), "Updating formulae and a pairwise
    algorithm for computing sample variances".

    >>> moments = FeatureMoments()
    >>> for _ in range(10):
    ...     moments.update(torch.randn(100, 8))
    >>> moments.count, moments.covariance.shape
    (1000, torch.Size([8, 8]))
    """

    def __init__(self) -> None:
        """Start with no samples."""
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # its upper triangle

    @property
    def mean(self) -> Tensor:
        """The mean (d,).

        Raises:
            ValueError: if there was no sample.
        """
        self._need(1)
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """The covariance (d, d), divided by n - 1.

        Raises:
            ValueError: if there were fewer than two samples.
        """
        self._need(2)
        upper = self._scatter.triu() / (self.count - 1)
        return upper + upper.triu(1).T

    def update(self, features: Tensor) -> None:
        """Take in features (n, d).

        Raises:
            ValueError: if they are not finite, or of another d than before.
            TypeError: if they are not a floating-point tensor.
        """
        check_features(features, "features")
        for part in torch.split(features, _ROWS):
            rows = double(part)
            mean = rows.mean(0)
            self._shift(len(rows), mean)
            rows = rows - mean
            for start in range(0, rows.shape[1], _COLUMNS):
                stop = start + _COLUMNS
                self._scatter[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]

    def merge(self, other: FeatureMoments) -> None:
        """Take in the samples that another has seen.

        Raises:
            ValueError: if their features have another d.
            TypeError: if it is something else.
        """
        if not isinstance(other, FeatureMoments):
            raise TypeError(f"other: expected FeatureMoments, got {type(other).__name__}")
        if other.count:
            self._shift(other.count, other._mean)
            self._scatter += other._scatter.to(self._scatter.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the count, the mean and the scatter matrix, on the CPU."""
        return {
            "count": self.count,
            "mean": self._mean.cpu(),
            "scatter": self._scatter.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: if it is not one.
        """
        if set(state) != {"count", "mean", "scatter"}:
            raise ValueError(f"state: expected count, mean and scatter, got {sorted(state)}")
        mean, scatter = (torch.as_tensor(state[name]).double() for name in ("mean", "scatter"))
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
            raise ValueError(
                "state: expected a mean (d,) and a scatter matrix (d, d), "
                f"got {tuple(mean.shape)} and {tuple(scatter.shape)}"
            )
        self.count, self._mean, self._scatter = int(state["count"]), mean, scatter.clone()

    def _need(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"expected at least {least} samples, got {self.count}")

    def _shift(self, count: int, mean: Tensor) -> None:
        """Take in the number and the mean of new samples, but for their scatter about it."""
        if not self.count:
            self._mean = torch.zeros_like(mean)
            self._scatter = mean.new_zeros(len(mean), len(mean))
        if len(mean) != len(self._mean):
            raise ValueError(
                f"features: expected {len(self._mean)} dimensions as before, got {len(mean)}"
            )
        self._mean, self._scatter = self._mean.to(mean.device), self._scatter.to(mean.device)
        total = self.count + count
        delta = mean - self._mean
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total


Gaussian: TypeAlias = FeatureMoments | Tensor | tuple[Tensor, Tensor]


def frechet_distance(real: Gaussian, fake: Gaussian) -> float:
    r"""Return the Frechet distance of two sets of features, FID where they are Inception's.

    .. math::
        |\mu_1 - \mu_2|^2 + \operatorname{tr}\left(S_1 + S_2 - 2 (S_1 S_2)^{1/2}\right)

    The trace of the root is the sum of the singular values of :math:`L_1^\top L_2` with
    :math:`S_i = L_i L_i^\top`. No complex number comes up, and covariances of any rank do, as
    those of fewer samples than dimensions. It is biased upwards, by about 1 / n: compare numbers
    of the same n only.

    Args:
        real: `FeatureMoments`, features (n, d), or a mean (d,) and a covariance (d, d), as they
            are published for data sets.
        fake: likewise.

    Raises:
        ValueError: if dimensions differ, values are not finite, a covariance is not symmetric, or
            there are fewer than two samples.
        TypeError: if an argument is none of the three.

    Source: Heusel et al. (2017), arXiv:1706.08500.

    >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    >>> round(frechet_distance(x, x + 3), 6)
    18.0
    """
    mean, covariance = _gaussian(real, "real")
    other_mean, other_covariance = (x.to(mean.device) for x in _gaussian(fake, "fake"))
    if len(mean) != len(other_mean):
        raise ValueError(f"fake: expected {len(mean)} dimensions as real's, got {len(other_mean)}")
    root = torch.linalg.svdvals(_factor(covariance).T @ _factor(other_covariance)).sum()
    distance = (
        (mean - other_mean).square().sum()
        + (covariance.diagonal() + other_covariance.diagonal()).sum()
        - 2 * root
    )
    return max(float(distance), 0.0)  # rounding may take a zero below itself


def _gaussian(x: Gaussian, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(x, Tensor):
        check_features(x, name, least=2)
        moments = FeatureMoments()
        moments.update(x)
        return moments.mean, moments.covariance
    if isinstance(x, FeatureMoments):
        return x.mean, x.covariance
    if not (isinstance(x, tuple) and len(x) == 2 and all(isinstance(y, Tensor) for y in x)):
        raise TypeError(
            f"{name}: expected FeatureMoments, features (n, d) or a pair of tensors, mean and "
            f"covariance, got {type(x).__name__}"
        )
    mean, covariance = (double(y) for y in x)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{name}: expected a mean (d,) and a covariance (d, d), "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError(f"{name}: expected a finite mean and covariance")
    if not torch.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8):
        raise ValueError(f"{name}: expected a symmetric covariance")
    return mean, covariance


def _factor(covariance: Tensor) -> Tensor:
    """Return L with L L^T = S: Cholesky's, or from eigenvectors where S is nearly singular.

    There Cholesky's last pivots are rounding, of which L would hold the roots.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal().square()
    if not failed and bool(pivots.min() > 1e-8 * pivots.max()):
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor
