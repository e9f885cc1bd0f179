"""Ranks of the truth among samples: simulation-based calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_count, check_number
from ..random import Generators, rand
from ._cases import checked, weighted
from ._uniform import binomial_band, uniform_p_value

_NAMES = ("samples", "truth")


@dataclass(frozen=True, slots=True, eq=False)
class SBCResult:
    """Ranks of true parameters among samples of their posteriors.

    All but the ranks are on the CPU.

    Args:
        ranks: the number of samples below the truth (n, *D), from 0 to m.
        p_value: the p-values (*D) of the Kolmogorov-Smirnov test that the ranks are uniform.
        counts: the numbers of cases in each bin of the ranks (bins, *D).
        expected: the number of cases expected in each bin.
        low: the least count in the band that a bin of a calibrated posterior is in with
            probability `level`.
        high: the largest count in the band.
        level: the probability of the band, of each bin.
    """

    ranks: Tensor
    p_value: Tensor
    counts: Tensor
    expected: float
    low: int
    high: int
    level: float


def observation_ranks(
    ensemble: Tensor, observation: Tensor, *, generator: Generators = None
) -> Tensor:
    r"""Return the ranks of observations among the members of their ensembles.

    .. math::
        r = \#\{i : x_i < y\} + u, \quad u \text{ uniform on } 0, \dots, \#\{i : x_i = y\}

    Ties are broken at random, so that the rank is uniform on 0 ... m whenever the observation is
    one more draw from the distribution of the members, also a discrete one such as rain.

    Args:
        ensemble: the members (n, m, *D).
        observation: the observations (n, *D).
        generator: the source of randomness for ties: one, one for each case, or None.

    Returns:
        The ranks (n, *D), int64.

    Raises:
        ValueError: if shapes do not fit or values are not finite.
        TypeError: if either is not a floating-point tensor.

    Source: Hamill, Interpretation of Rank Histograms for Verifying Ensemble Forecasts, 2001.

    >>> import torch
    >>> from diffusionkit.calibration import observation_ranks
    >>> ensemble = torch.tensor([[0.0, 1.0, 3.0]])
    >>> observation_ranks(ensemble, torch.tensor([2.0]))
    tensor([2])
    """
    names = ("ensemble", "observation")
    ensemble, observation = checked(ensemble, observation, names=names)
    _, ensemble, observation = weighted(None, ensemble, observation, names)
    return ranks_of(ensemble, observation, generator)


def ranks_of(ensemble: Tensor, observation: Tensor, generator: Generators) -> Tensor:
    """Return the ranks (n, *D) of validated tensors."""
    y = observation.unsqueeze(1)
    ties = (ensemble == y).sum(1)
    u = rand(observation.shape, generator=generator, device=y.device, dtype=observation.dtype)
    return (ensemble < y).sum(1) + (u * (ties + 1)).long().minimum(ties)


def uniform_numbers(ranks: Tensor, members: int, generator: Generators) -> Tensor:
    """Return (r + u) / (m + 1), uniform on [0, 1) exactly if r is uniform on 0 ... m.

    They are in float64 on the CPU: float64 is not on every device.
    """
    u = rand(ranks.shape, generator=generator, device=ranks.device, dtype=torch.float32)
    return (ranks.cpu() + u.cpu().double()) / (members + 1)


def simulation_based_calibration(
    samples: Tensor,
    truth: Tensor,
    *,
    bins: int | None = None,
    level: float = 0.99,
    generator: Generators = None,
) -> SBCResult:
    r"""Compare the ranks of true parameters among samples of their posteriors with uniform ones.

    Draw n parameters from the prior, simulate data of each, and draw m samples from the model's
    posterior for these data. If the model is right, the truth is one more draw, and its rank among
    the samples is uniform on 0 ... m, for each parameter and each function of the parameters: to
    test such a function, pass its values. A U shape of the counts means that the posterior is too
    narrow, a hump that it is too wide, a slope that it is shifted.

    Uniform ranks do not imply that a posterior is right: the prior itself, for all data, has them
    too. See `expected_coverage` and `energy_score`. Ranks between several parameters of one case
    are dependent; multiply the smallest p-value by their number.

    Args:
        samples: the samples (n, m, *D), independent within each posterior.
        truth: the parameters (n, *D) that the data were simulated with.
        bins: the number of bins of the counts, by default m + 1, or n / 20 if that is smaller.
        level: the probability that the count of a bin of a calibrated posterior is in the band.
        generator: the source of randomness, for ties and bins that part a rank: one, one for each
            case, or None.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or bins or level is out of range.
        TypeError: if an argument has the wrong type.

    Source: Talts et al., Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration, 2018, arXiv 1804.06788.

    >>> import torch
    >>> from diffusionkit.calibration import simulation_based_calibration
    >>> generator = torch.Generator().manual_seed(0)
    >>> draws = torch.randn(200, 20, 2, generator=generator)
    >>> samples, truth = draws[:, 1:], draws[:, 0]
    >>> result = simulation_based_calibration(
    ...     samples, truth, generator=generator
    ... )
    >>> result.p_value.shape, result.counts.shape, result.low, result.high
    (torch.Size([2]), torch.Size([10, 2]), 10, 32)
    """
    samples, truth = checked(samples, truth, names=_NAMES)
    _, samples, truth = weighted(None, samples, truth, _NAMES)
    n, m = samples.shape[:2]
    if bins is None:
        bins = max(1, min(m + 1, n // 20))
    check_count(bins, "bins")
    check_number(level, "level")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a probability in (0, 1), got {level}")
    ranks = ranks_of(samples, truth, generator)
    u = uniform_numbers(ranks, m, generator)
    part = (u * bins).long().clamp_max(bins - 1)
    counts = torch.zeros(bins, *truth.shape[1:], dtype=torch.int64)
    counts.scatter_add_(0, part, torch.ones_like(part))
    low, high = binomial_band(n, 1 / bins, level)
    return SBCResult(ranks, uniform_p_value(u), counts, n / bins, low, high, level)
