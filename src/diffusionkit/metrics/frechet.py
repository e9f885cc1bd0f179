"""The Frechet distance between two sets of features, from streaming moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_count, check_mapping, numbers
from ._features import check_features, double, from_numpy

# Block sizes of the float64 computation: rows of features, columns of the scatter matrix.
_ROWS, _COLUMNS = 4096, 256
# The most negative eigenvalue attributed to rounding, relative to the largest.
_NEGATIVE = 1e-3


class FeatureMoments:
    r"""The streaming mean and covariance of features.

    .. math::
        \mu = \frac{1}{n} \sum_i x_i, \qquad
        S = \frac{1}{n - 1} \sum_i (x_i - \mu)(x_i - \mu)^\top

    in float64. Batches are centered on their own means, so features far from zero lose no
    precision. Memory is that of one (d, d) matrix, whatever the number of samples.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances, 1982.

    >>> import torch
    >>> from diffusionkit.metrics import FeatureMoments
    >>> moments = FeatureMoments()
    >>> for _ in range(10):
    ...     moments.update(torch.randn(100, 8))
    >>> moments.count, moments.covariance.shape
    (1000, torch.Size([8, 8]))
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # its upper triangle

    @override
    def __repr__(self) -> str:
        return f"FeatureMoments(count={self.count}, dims={len(self._mean)})"

    @property
    def mean(self) -> Tensor:
        """The mean (d,).

        Raises:
            ValueError: if there are no samples.
        """
        self._need(1)
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """The covariance (d, d), divided by n - 1.

        Raises:
            ValueError: if there are fewer than two samples.
        """
        self._need(2)
        upper = self._scatter.triu() / (self.count - 1)
        return upper + upper.triu(1).T

    def update(self, features: Tensor) -> None:
        """Add features (n, d).

        Raises:
            ValueError: if they are not finite, or d differs from earlier calls.
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
        """Add the samples of another accumulator.

        Raises:
            ValueError: if its features have a different d.
            TypeError: if other is not FeatureMoments.
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
        """Restore the state returned by `state_dict`.

        Raises:
            ValueError: if its entries or shapes are wrong.
        """
        check_mapping(state, "state")
        if set(state) != {"count", "mean", "scatter"}:
            raise ValueError(f"state: expected count, mean and scatter, got {sorted(state)}")
        mean, scatter = (numbers(state[name], name) for name in ("mean", "scatter"))
        check_count(state["count"], "count", least=0, most=2**62)
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
            raise ValueError(
                "state: expected a mean (d,) and a scatter matrix (d, d), "
                f"got {tuple(mean.shape)} and {tuple(scatter.shape)}"
            )
        self.count, self._mean, self._scatter = state["count"], mean, scatter.clone()

    def _need(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"features: expected at least {least} samples, got {self.count}")

    def _shift(self, count: int, mean: Tensor) -> None:
        """Add the number and mean of new samples, without their scatter about that mean."""
        if not self.count:
            self._mean = torch.zeros_like(mean)
            self._scatter = mean.new_zeros(len(mean), len(mean))
        if len(mean) != len(self._mean):
            raise ValueError(
                f"features: expected {len(self._mean)} dimensions, as before, got {len(mean)}"
            )
        self._mean, self._scatter = self._mean.to(mean.device), self._scatter.to(mean.device)
        total = self.count + count
        delta = mean - self._mean
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total


@dataclass(frozen=True, slots=True, eq=False)
class FeatureStatistics:
    """The mean and covariance of features, read from a file.

    Args:
        mean: the mean (d,), in float64.
        covariance: the covariance (d, d), in float64.
        count: the number of samples, None if the file does not state it.
        features: the name of the feature extractor, None if the file does not state it.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None
    features: str | None


Array: TypeAlias = Tensor | np.ndarray[Any, Any]
Gaussian: TypeAlias = FeatureMoments | FeatureStatistics | Tensor | tuple[Array, Array]


def frechet_distance(real: Gaussian, fake: Gaussian) -> float:
    r"""Return the Frechet distance between two sets of features, FID for Inception features.

    .. math::
        |\mu_1 - \mu_2|^2 + \operatorname{tr}\left(S_1 + S_2 - 2 (S_1 S_2)^{1/2}\right)

    The trace of the root is the sum of the singular values of :math:`L_1^\top L_2` with
    :math:`S_i = L_i L_i^\top`. No complex numbers arise, and covariances may have any rank, as
    with fewer samples than dimensions. The bias is positive, of order 1 / n: compare only results
    with equal n.

    Args:
        real: `FeatureMoments`, features (n, d), what `load_statistics` reads, or a pair of a mean
            (d,) and a covariance (d, d), as tensors or NumPy arrays.
        fake: the same for the other set.

    Raises:
        ValueError: if dimensions differ, values are not finite, a covariance is not symmetric or
            has an eigenvalue too negative for rounding, or there are fewer than two samples.
        TypeError: if an argument is none of these.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium, 2017, arXiv 1706.08500.

    >>> import torch
    >>> from diffusionkit.metrics import frechet_distance
    >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    >>> round(frechet_distance(x, x + 3), 6)
    18.0
    """
    mean, covariance = _gaussian(real, "real")
    other_mean, other_covariance = (x.to(mean.device) for x in _gaussian(fake, "fake"))
    if len(mean) != len(other_mean):
        raise ValueError(
            f"fake: expected {len(mean)} dimensions, as in real, got {len(other_mean)}"
        )
    factor, other_factor = _factor(covariance, "real"), _factor(other_covariance, "fake")
    root = torch.linalg.svdvals(factor.T @ other_factor).sum()
    distance = (
        (mean - other_mean).square().sum()
        + (covariance.diagonal() + other_covariance.diagonal()).sum()
        - 2 * root
    )
    return max(float(distance), 0.0)  # rounding may make a zero distance negative


def _gaussian(x: Gaussian, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(x, Tensor):
        check_features(x, name, least=2)
        moments = FeatureMoments()
        moments.update(x)
        return moments.mean, moments.covariance
    if isinstance(x, FeatureMoments):
        return x.mean, x.covariance
    if isinstance(x, FeatureStatistics):
        x = (x.mean, x.covariance)
    pair = tuple(from_numpy(y) for y in x) if isinstance(x, tuple) else ()
    if len(pair) != 2 or not all(isinstance(y, Tensor) for y in pair):
        of = f" of {', '.join(type(y).__name__ for y in pair)}" if pair else ""
        raise TypeError(
            f"{name}: expected FeatureMoments, a tensor of features (n, d) or a pair of tensors or "
            f"arrays, mean and covariance, got {type(x).__name__}{of}"
        )
    mean, covariance = (double(y) for y in pair)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{name}: expected a mean (d,) and a covariance (d, d), "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    bad = sum(int((~torch.isfinite(y)).sum()) for y in (mean, covariance))
    if bad:
        raise ValueError(
            f"{name}: expected a finite mean and covariance, got {bad} values NaN or infinite"
        )
    if not torch.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8):
        apart = float((covariance - covariance.T).abs().max())
        raise ValueError(
            f"{name}: expected a symmetric covariance, got mirrored entries {apart:.3g} apart"
        )
    return mean, covariance


def _factor(covariance: Tensor, name: str) -> Tensor:
    """Return L with L L^T = S, by Cholesky or, if S is nearly singular, by eigendecomposition.

    In that case the last Cholesky pivots are rounding errors, whose roots L would contain.
    Slightly negative eigenvalues are rounding too, of covariances published in low precision.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal().square()
    if not failed and bool(pivots.min() > 1e-8 * pivots.max()):
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    lowest, largest = float(values[0]), float(values[-1])
    if lowest < -_NEGATIVE * largest:
        raise ValueError(
            f"{name}: expected a covariance, got an eigenvalue of {lowest:.3g}, "
            f"where the largest is {largest:.3g}"
        )
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor
