"""Ranks and simulation-based calibration: levels for exact posteriors, power for wrong ones."""

import math

import pytest
import torch

from diffusionkit.calibration import observation_ranks, simulation_based_calibration
from diffusionkit.calibration._uniform import binomial_band, uniform_p_value


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(seed, n=400, m=19, scale=1.0, shift=0.0, d=2):
    """A posterior N(data, I) of each case, and samples of one with another width and place."""
    draws = torch.randn(n, m + 1, d, generator=seeded(seed))
    data = torch.randn(n, 1, d, generator=seeded(seed + 10_000))
    return data + scale * draws[:, 1:] + shift, (data + draws[:, :1])[:, 0]


def rejected(**options):
    """The share of p-values below .05 of 400 parameters, each a simulation of its own."""
    found = simulation_based_calibration(*case(0, d=400, **options), generator=seeded())
    return float((found.p_value < 0.05).double().mean())


def test_exact_posteriors_are_rejected_at_the_level_of_the_test():
    """.05 of 400, at few samples too: four standard errors are .044."""
    for m in (1, 9, 50):
        assert 0.05 - 0.044 < rejected(n=100, m=m) < 0.05 + 0.044


@pytest.mark.parametrize(
    ("options", "power"),
    [({"shift": 0.2}, 0.85), ({"scale": 0.75}, 0.85), ({"scale": 1.35}, 0.85)],
    ids=["shifted", "overconfident", "too wide"],
)
def test_wrong_posteriors_are_rejected_with_power(options, power):
    assert rejected(n=400, **options) > power


def test_ranks_count_the_samples_below_and_ties_are_uniform():
    samples = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    for truth, rank in ((-1.0, 0), (0.5, 1), (2.5, 3), (9.0, 4)):
        assert observation_ranks(samples, torch.tensor([truth])).tolist() == [rank]
    n = 8000
    tied = torch.tensor([[0.0, 1.0, 1.0, 1.0, 2.0]]).expand(n, 5)
    ranks = observation_ranks(tied, torch.ones(n), generator=seeded())
    shares = torch.bincount(ranks, minlength=6) / n
    assert shares[0] == shares[5] == 0
    assert bool(((shares[1:5] - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / n)).all())


def test_rain_has_uniform_ranks():
    """Of a discrete distribution with half of its mass at 0."""
    draws = torch.randn(4000, 5, generator=seeded()).clamp_min(0.0)
    result = simulation_based_calibration(draws[:, 1:], draws[:, 0], generator=seeded(1))
    assert float(result.p_value) > 0.01
    assert bool(((result.counts >= result.low) & (result.counts <= result.high)).all())


def test_counts_are_those_of_the_ranks():
    samples, truth = case(3, n=600)
    result = simulation_based_calibration(samples, truth, bins=20, generator=seeded())
    for k in range(2):
        assert torch.equal(result.counts[:, k], torch.bincount(result.ranks[:, k], minlength=20))
    assert result.expected == 30
    coarse = simulation_based_calibration(samples, truth, bins=7, generator=seeded())
    assert coarse.counts.sum(0).tolist() == [600, 600]
    assert torch.equal(coarse.ranks, result.ranks)
    fields = samples.view(600, 19, 2, 1), truth.view(600, 2, 1)
    other = simulation_based_calibration(*fields, bins=20, generator=seeded())
    assert torch.equal(other.counts.flatten(1), result.counts)


def test_a_case_with_its_own_generator_does_not_depend_on_the_others():
    tied, truth = torch.zeros(4, 9), torch.zeros(4)
    whole = observation_ranks(tied, truth, generator=[seeded(i) for i in range(4)])
    alone = observation_ranks(tied[2:3], truth[2:3], generator=[seeded(2)])
    assert torch.equal(whole[2:3], alone)


def test_the_band_is_that_of_binomial_quantiles():
    """scipy.stats.binom.ppf at .005 and .995, and .025 and .975."""
    assert binomial_band(200, 0.1, 0.99) == (10, 32)
    assert binomial_band(1000, 0.05, 0.95) == (37, 64)
    assert binomial_band(5, 1.0, 0.9) == (5, 5)
    assert binomial_band(10_000, 0.5, 0.99) == (4871, 5129)


def test_p_values_are_those_of_the_kolmogorov_smirnov_distribution():
    """scipy.stats.kstest(u, "uniform", method="exact") for u = (i / n)^1.5."""
    for n, exact, digits in ((20, 0.7184872, 0.03), (200, 2.6953170e-4, 0.05)):
        u = (torch.arange(1, n + 1, dtype=torch.float64) / n) ** 1.5
        assert float(uniform_p_value(u)) == pytest.approx(exact, rel=digits)
    assert float(uniform_p_value((torch.arange(1000) + 0.5) / 1000)) == 1.0


def test_what_does_not_fit_is_refused():
    samples, truth = case(0, n=10)
    for options, error, message in (
        ({"bins": 0}, ValueError, "bins: expected an integer >= 1"),
        ({"level": 1.0}, ValueError, r"level: expected a probability in \(0, 1\), got 1"),
        ({"level": "x"}, TypeError, "level: expected a number"),
    ):
        with pytest.raises(error, match=message):
            simulation_based_calibration(samples, truth, **options)
    with pytest.raises(ValueError, match=r"samples: expected shape \(n, m, \*D\) for truth"):
        simulation_based_calibration(samples, truth[:5])
