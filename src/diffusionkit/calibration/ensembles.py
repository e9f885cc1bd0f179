"""Scores of many ensembles, case by case: CRPS, spread-skill ratio and rank histogram."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_flag, check_part
from .._masks import mean
from .._repr import Described
from ..random import Generators
from ._cases import checked, weighted
from .ranks import ranks_of
from .scores import case_energy, element_crps

_NAMES = ("ensemble", "observation")


@dataclass(frozen=True, slots=True, eq=False)
class SpreadSkill:
    """The spread of ensembles and the error of their means.

    Args:
        spread: the root of the mean variance of the members, in units of the data.
        rmse: the root mean square error of the ensemble mean, in units of the data.
        ratio: sqrt((m + 1) / m) spread / rmse, 1 if calibrated, below 1 if overconfident.
        stderr: the standard error of the ratio, NaN for one case.
    """

    spread: float
    rmse: float
    ratio: float
    stderr: float


@dataclass(frozen=True, slots=True, eq=False)
class RankHistogram:
    """The distribution of ranks of observations among the members of their ensembles.

    Args:
        frequency: the share of each rank (m + 1,), 1 / (m + 1) if calibrated.
        stderr: the standard errors over cases (m + 1,), NaN for one case.
    """

    frequency: Tensor
    stderr: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EnsembleResult:
    """Scores of ensembles, means over cases.

    Args:
        cases: the number n of cases.
        members: the number m of members.
        crps: the mean fair CRPS, in units of the data; smaller is better.
        crps_stderr: its standard error over cases, NaN for one case.
        energy_score: the mean fair energy score, None unless requested.
        energy_score_stderr: its standard error over cases.
        spread_skill: the spread-skill ratio.
        rank_histogram: the distribution of ranks.
    """

    cases: int
    members: int
    crps: float
    crps_stderr: float
    energy_score: float | None
    energy_score_stderr: float | None
    spread_skill: SpreadSkill
    rank_histogram: RankHistogram

    @override
    def __str__(self) -> str:
        ratio = self.spread_skill
        return (
            f"CRPS {self.crps:.5g} +- {self.crps_stderr:.2g}, "
            f"spread/skill {ratio.ratio:.3f} +- {ratio.stderr:.3f} ({self.cases} cases)"
        )


class EnsembleScores(Described):
    r"""Scores of ensembles that arrive in batches: fields that do not fit in memory together.

    A case is one ensemble and its observation. Of each case the mean over its elements is taken,
    weighted if there are weights, and standard errors are those over cases: the elements of a field
    are not independent, its cases should be. Memory depends on the number of members only.

    Args:
        energy: whether to compute the energy score as well, in O(m^2).

    >>> import torch
    >>> from diffusionkit.calibration import EnsembleScores
    >>> generator = torch.Generator().manual_seed(0)
    >>> scores = EnsembleScores()
    >>> for _ in range(4):
    ...     fields = torch.randn(50, 9, 4, 4, generator=generator)
    ...     scores.update(fields[:, 1:], fields[:, 0], generator=generator)
    >>> print(scores.result())
    CRPS 0.57251 +- 0.0088, spread/skill 0.981 +- 0.013 (200 cases)
    """

    def __init__(self, *, energy: bool = False) -> None:
        check_flag(energy, "energy")
        self.energy = energy
        self._members, self._count = 0, 0
        # Of the values of each case: CRPS, variance, squared error, energy score, ranks.
        self._mean, self._products = torch.zeros(0), torch.zeros(0, 0)

    def update(
        self,
        ensemble: Tensor,
        observation: Tensor,
        *,
        weights: Tensor | None = None,
        generator: Generators = None,
    ) -> None:
        """Add cases.

        Args:
            ensemble: the members (n, m, *D), m >= 2, as many in every call.
            observation: the observations (n, *D).
            weights: weights >= 0 of the elements, (n, *D) or with sizes of 1, such as the cosine of
                the latitude; values may be NaN where they are 0.
            generator: the source of randomness for tied ranks: one, one for each case, or None.

        Raises:
            ValueError: if shapes do not fit, the number of members changes, weights are negative or
                all 0, or values are not finite.
            TypeError: if an argument is not a tensor, or not floating-point.
        """
        ensemble, observation = checked(ensemble, observation, least=2, names=_NAMES)
        m = ensemble.shape[1]
        if self._count and m != self._members:
            raise ValueError(f"ensemble: expected {self._members} members, as before, got {m}")
        weights, ensemble, observation = weighted(weights, ensemble, observation, _NAMES)
        rows = _values(weights, ensemble, observation, generator, energy=self.energy)
        self._members = m
        self._add(len(rows), rows.mean(0), _products(rows))

    def merge(self, other: EnsembleScores) -> None:
        """Add the cases of another object, such as that of another process.

        Raises:
            ValueError: if its number of members or its choice of scores differs.
            TypeError: if it is no EnsembleScores.
        """
        check_part(other, EnsembleScores, "other")
        if not other._count:
            return
        if other.energy != self.energy or (self._count and other._members != self._members):
            raise ValueError(
                f"other: expected {self._members or 'any'} members and energy={self.energy}, "
                f"got {other._members} and energy={other.energy}"
            )
        self._members = other._members
        self._add(other._count, other._mean, other._products)

    def _add(self, n: int, center: Tensor, products: Tensor) -> None:
        """Add moments by Chan's update; raw sums of squares would lose digits."""
        if not self._count:
            self._count, self._mean, self._products = n, center, products
            return
        total = self._count + n
        delta = center - self._mean
        shift = torch.outer(delta, delta) * (self._count * n / total)
        self._products = self._products + products + shift
        self._mean, self._count = self._mean + delta * (n / total), total

    def result(self) -> EnsembleResult:
        """Return the scores of all cases so far.

        Raises:
            ValueError: if there are none.
        """
        n, m = self._count, self._members
        if not n:
            raise ValueError("update: expected at least one case, got none")
        covariance = self._products / (n * (n - 1)) if n > 1 else self._products + math.nan
        error = covariance.diagonal().clamp_min(0.0).sqrt()
        first = 3 + self.energy
        return EnsembleResult(
            cases=n,
            members=m,
            crps=float(self._mean[0]),
            crps_stderr=float(error[0]),
            energy_score=float(self._mean[3]) if self.energy else None,
            energy_score_stderr=float(error[3]) if self.energy else None,
            spread_skill=_ratio(self._mean[1:3], covariance[1:3, 1:3], m),
            rank_histogram=RankHistogram(self._mean[first:].clone(), error[first:].clone()),
        )


def spread_skill(
    ensemble: Tensor, observation: Tensor, *, weights: Tensor | None = None
) -> SpreadSkill:
    r"""Compare the spread of ensembles with the error of their means.

    .. math::
        \mathrm{ratio} = \sqrt{\frac{m + 1}{m}}\,
        \sqrt{\frac{\overline{s^2}}{\overline{(\bar x - y)^2}}}, \quad
        s^2 = \frac{1}{m - 1} \sum_i (x_i - \bar x)^2

    With the factor, the ratio is 1 at every m if the observation is one more draw from the
    distribution of the members, since the mean of m members itself has 1 / m of their variance. The
    converse does not hold; see `rank_histogram` for the shape.

    Args:
        ensemble: the members (n, m, *D), m >= 2.
        observation: the observations (n, *D).
        weights: weights of the elements, as in `EnsembleScores.update`.

    Raises:
        ValueError: if shapes do not fit, weights are negative or all 0, or values are not finite.
        TypeError: if an argument is not a tensor, or not floating-point.

    Source: Fortin et al., Why Should Ensemble Spread Match the RMSE of the Ensemble Mean?, 2014.

    >>> import torch
    >>> from diffusionkit.calibration import spread_skill
    >>> draws = torch.randn(
    ...     2000, 6, generator=torch.Generator().manual_seed(0)
    ... )
    >>> round(spread_skill(draws[:, 1:], draws[:, 0]).ratio, 2)
    1.0
    """
    ensemble, observation = checked(ensemble, observation, least=2, names=_NAMES)
    rows = _spread(*weighted(weights, ensemble, observation, _NAMES))
    n = len(rows)
    covariance = _products(rows) / (n * (n - 1)) if n > 1 else torch.full((2, 2), math.nan)
    return _ratio(rows.mean(0), covariance, ensemble.shape[1])


def rank_histogram(
    ensemble: Tensor,
    observation: Tensor,
    *,
    weights: Tensor | None = None,
    generator: Generators = None,
) -> RankHistogram:
    r"""Return the distribution of ranks of observations among the members of their ensembles.

    All elements of all cases are counted, by their weights. The standard errors are those over
    cases, so that the elements of a field may depend on each other. A U shape means that the
    ensembles are too narrow, a hump that they are too wide, a slope that they are shifted; ties are
    broken at random, see `observation_ranks`.

    Args:
        ensemble: the members (n, m, *D).
        observation: the observations (n, *D).
        weights: weights of the elements, as in `EnsembleScores.update`.
        generator: the source of randomness for ties: one, one for each case, or None.

    Raises:
        ValueError: if shapes do not fit, weights are negative or all 0, or values are not finite.
        TypeError: if an argument is not a tensor, or not floating-point.

    Source: Hamill, Interpretation of Rank Histograms for Verifying Ensemble Forecasts, 2001.

    >>> import torch
    >>> from diffusionkit.calibration import rank_histogram
    >>> draws = torch.randn(
    ...     2000, 4, generator=torch.Generator().manual_seed(0)
    ... )
    >>> narrow = rank_histogram(0.5 * draws[:, 1:], draws[:, 0])
    >>> narrow.frequency  # U
    tensor([0.3425, 0.1645, 0.1615, 0.3315], dtype=torch.float64)
    """
    ensemble, observation = checked(ensemble, observation, names=_NAMES)
    rows = _frequencies(*weighted(weights, ensemble, observation, _NAMES), generator)
    error = rows.std(0) / math.sqrt(len(rows)) if len(rows) > 1 else rows[0] * math.nan
    return RankHistogram(rows.mean(0), error)


def _values(
    weights: Tensor | None,
    ensemble: Tensor,
    observation: Tensor,
    generator: Generators,
    *,
    energy: bool,
) -> Tensor:
    """Return what is averaged over cases (n, k), in float64 on the CPU."""
    score = mean(element_crps(ensemble, observation), weights).cpu().double()
    columns = [score.unsqueeze(1), _spread(weights, ensemble, observation)]
    if energy:
        columns.append(case_energy(weights, ensemble, observation).cpu().double().unsqueeze(1))
    columns.append(_frequencies(weights, ensemble, observation, generator))
    return torch.cat(columns, 1)


def _spread(weights: Tensor | None, ensemble: Tensor, observation: Tensor) -> Tensor:
    """Return the variances and squared errors (n, 2) of cases, in float64 on the CPU."""
    error = (ensemble.mean(1) - observation).square()
    parts = [mean(x, weights) for x in (ensemble.var(1), error)]
    return torch.stack(parts, 1).cpu().double()


def _frequencies(
    weights: Tensor | None, ensemble: Tensor, observation: Tensor, generator: Generators
) -> Tensor:
    """Return the shares of ranks (n, m + 1) of cases, in float64 on the CPU."""
    n, m = ensemble.shape[:2]
    ranks = ranks_of(ensemble, observation, generator).reshape(n, -1).cpu()
    each = torch.ones_like(ranks) if weights is None else weights.reshape(n, -1).cpu()
    each = each.double()
    shares = torch.zeros(n, m + 1, dtype=torch.float64)
    return shares.scatter_add_(1, ranks, each) / each.sum(1, keepdim=True)


def _products(rows: Tensor) -> Tensor:
    """Return the sums of products of deviations from the mean (k, k) of rows (n, k)."""
    centered = rows - rows.mean(0)
    return centered.T @ centered


def _ratio(means: Tensor, covariance: Tensor, members: int) -> SpreadSkill:
    """Return the ratio of mean variance and squared error (2,), whose covariance is (2, 2)."""
    variance, square = means.tolist()
    ratio = math.sqrt((members + 1) / members * variance / square) if square else math.inf
    # The logarithm of the ratio is half the difference of two logarithms.
    slope = torch.tensor([1 / variance if variance else math.inf, -1 / square if square else 0.0])
    slope = 0.5 * slope.double()
    square_error = float(slope @ covariance.double() @ slope)
    error = ratio * math.sqrt(max(square_error, 0.0))  # in this order NaN stays
    return SpreadSkill(math.sqrt(variance), math.sqrt(square), ratio, error)
