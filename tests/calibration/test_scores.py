"""CRPS and energy score: closed forms, unbiasedness at every ensemble size, other libraries."""

import math

import pytest
import torch

from diffusionkit.calibration import crps, energy_score


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def by_pairs(x, y, fair):
    """The definition, all pairs in memory."""
    m = x.shape[1]
    pairs = (x.unsqueeze(1) - x.unsqueeze(2)).abs().sum((1, 2)) / 2
    return (x - y.unsqueeze(1)).abs().mean(1) - pairs / (m * (m - 1) if fair else m * m)


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)], ids=str)
def test_sorting_gives_the_sum_over_pairs(shape, fair):
    for m in (2, 3, 8, 17):
        x, y = drawn(shape[0], m, *shape[1:]), drawn(*shape, seed=1)
        torch.testing.assert_close(crps(x, y, fair=fair), by_pairs(x, y, fair))


def gaussian_crps(y):
    """Of N(0, 1): y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi)."""
    inside = torch.special.ndtr(y) * 2 - 1
    density = torch.exp(-0.5 * y.square()) / math.sqrt(2 * math.pi)
    return y * inside + 2 * density - 1 / math.sqrt(math.pi)


@pytest.mark.parametrize("m", [2, 3, 10])
def test_fair_scores_are_unbiased_and_plain_ones_are_too_large(m):
    y = torch.tensor([-1.3, 0.0, 0.4, 2.5], dtype=torch.float64)
    n = 40_000
    x = drawn(n, m, 1).expand(n, m, 4)
    for fair in (True, False):
        scores = crps(x, y.expand(n, 4), fair=fair)
        error = scores.std(0) / math.sqrt(n)
        # E|X - X'| / (2 m) = 1 / (m sqrt(pi))
        bias = 0.0 if fair else 1 / (m * math.sqrt(math.pi))
        gap = scores.mean(0) - gaussian_crps(y) - bias
        assert bool((gap.abs() < 4 * error).all())
        assert float(error.max()) < 0.01  # and 1 / (m sqrt(pi)) is at least .056


def test_one_member_has_its_distance_as_the_plain_score():
    x, y = drawn(4, 1), drawn(4, seed=1)
    torch.testing.assert_close(crps(x, y, fair=False), (x[:, 0] - y).abs())
    for score in (crps, energy_score):
        with pytest.raises(ValueError, match="ensemble: expected at least 2 members, got 1"):
            score(x, y)


def test_a_large_common_value_costs_no_digits():
    x, y = drawn(6, 50), drawn(6, seed=1)
    large = (x + 2.0**20).float(), (y + 2.0**20).float()
    right = crps(large[0].double(), large[1].double())
    torch.testing.assert_close(crps(*large).double(), right, rtol=1e-5, atol=1e-6)


def test_the_energy_score_is_the_crps_in_one_dimension():
    x, y = drawn(5, 7), drawn(5, seed=1)
    for fair in (True, False):
        torch.testing.assert_close(energy_score(x, y, fair=fair), crps(x, y, fair=fair))
        one = energy_score(x.view(5, 7, 1, 1), y.view(5, 1, 1), fair=fair)
        torch.testing.assert_close(one, crps(x, y, fair=fair))


def test_the_fair_energy_score_is_unbiased():
    """For N(0, I) in d dimensions and y = 0, E|X| - E|X - X'| / 2 = (1 - 1 / sqrt(2)) E|X|."""
    n, d = 20_000, 5
    norm = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    for m in (2, 5):
        scores = energy_score(drawn(n, m, d), torch.zeros(n, d, dtype=torch.float64))
        error = float(scores.std()) / math.sqrt(n)
        assert abs(float(scores.mean()) - (1 - math.sqrt(0.5)) * norm) < 4 * error < 0.05


def test_weights_are_those_of_squared_differences():
    """An integer weight repeats an element, 0 leaves it out, whatever its value."""
    x, y = drawn(4, 6, 3), drawn(4, 3, seed=1)
    repeated = [0, 0, 0, 0, 2]
    right = energy_score(x[..., repeated], y[:, repeated])
    holes = x.clone()
    holes[..., 1] = math.nan
    missing = y.clone()
    missing[:, 1] = math.inf
    got = energy_score(holes, missing, weights=torch.tensor([[4.0, 0.0, 1.0]]))
    torch.testing.assert_close(got, right)


def test_the_energy_score_sees_correlations_that_the_crps_does_not():
    """Of two independent numbers and of two equal ones the CRPS is the same."""
    n, m = 4000, 10
    y = drawn(n, 1, seed=1).expand(n, 2)
    apart, alike = drawn(n, m, 2), drawn(n, m, 1).expand(n, m, 2)
    difference = energy_score(apart, y) - energy_score(alike, y)
    assert float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(n)
    difference = (crps(apart, y) - crps(alike, y)).mean(1)
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(n)


def test_values_of_other_libraries():
    """properscoring 0.1, crps_ensemble (plain); scoringrules 0.10, fair CRPS and energy score."""
    x = torch.tensor([[0.3, -1.1, 2.4, 0.7, -0.2]], dtype=torch.float64)
    y = torch.tensor([0.9], dtype=torch.float64)
    assert float(crps(x, y, fair=False)) == pytest.approx(0.448, rel=1e-12)
    assert float(crps(x, y)) == pytest.approx(0.29, rel=1e-12)
    pairs = torch.stack([x, x.flip(1).cos()], 2)
    truth = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    plain, fair = (float(energy_score(pairs, truth, fair=one)) for one in (False, True))
    assert plain == pytest.approx(0.6158584352179656, rel=1e-12)
    assert fair == pytest.approx(0.43530742785007526, rel=1e-12)


def test_half_precision_is_widened():
    x, y = drawn(3, 4, 2), drawn(3, 2, seed=1)
    for score in (crps, energy_score):
        got = score(x.bfloat16(), y.bfloat16())
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, score(x.bfloat16().float(), y.bfloat16().float()))


@pytest.mark.parametrize("score", [crps, energy_score])
def test_what_does_not_fit_is_refused(score):
    with pytest.raises(ValueError, match=r"ensemble: expected shape \(n, m, \*D\) for observation"):
        score(torch.zeros(3, 2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="observation: expected finite values"):
        score(torch.zeros(3, 2), torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(TypeError, match="ensemble: expected a floating-point tensor"):
        score(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3))
    with pytest.raises(ValueError, match="weights: expected numbers >= 0"):
        energy_score(torch.zeros(3, 2, 4), torch.zeros(3, 4), weights=-torch.ones(1, 4))
