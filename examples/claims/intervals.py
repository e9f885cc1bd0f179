"""Intervals over seeds, and the verdicts that they allow."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# The 97.5% quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
            2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A 95% interval of a mean over seeds.

    Args:
        mean: the mean.
        half: half of its width, infinite for a single seed or equal values.
        count: the number of seeds.
    """

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half


def interval(values: Iterable[float]) -> Interval:
    r"""Return the 95% interval of Student's t distribution of the mean of values, one per seed.

    .. math::
        \bar v \pm t_{n - 1}\, s / \sqrt n

    It contains the spread of seeds: of initial weights, the order of data, and of the noise of
    training and evaluation. Of two seeds it is 12.7 standard errors wide on each side, of five 2.8.
    Equal values, as counts may be, tell nothing about their spread: their interval is infinite.
    """
    values = list(values)
    if not values:
        raise ValueError("values: expected at least one, got none")
    mean = statistics.fmean(values)
    if len(set(values)) == 1:
        return Interval(mean, math.inf, len(values))
    freedom = len(values) - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.5 / freedom
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """Return the interval of a - b, of values by seed: of the seeds that both have, in pairs.

    Runs of equal seeds have the same initial weights, data order, times and noise, so that the
    difference of a pair varies less than either.
    """
    seeds = sorted(a.keys() & b.keys())
    return interval(a[seed] - b[seed] for seed in seeds)


def verdict(found: Interval, claimed: int) -> str:
    """Return "shown", "opposite" or "not resolved" for a difference claimed to have a sign.

    Args:
        found: the interval of the difference.
        claimed: +1 if the claim says that it is positive, -1 if negative.
    """
    if claimed not in (-1, 1):
        raise ValueError(f"claimed: expected 1 or -1, got {claimed}")
    low, high = sorted((claimed * found.low, claimed * found.high))
    if low > 0:
        return "shown"
    return "opposite" if high < 0 else "not resolved"
