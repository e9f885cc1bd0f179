"""Spread-skill ratios, rank histograms and the accumulator of many fields."""

import math

import pytest
import torch

from diffusionkit.calibration import (
    EnsembleScores,
    crps,
    energy_score,
    observation_ranks,
    rank_histogram,
    spread_skill,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fields(n=600, m=5, scale=1.0, shift=0.0, seed=0):
    """Fields of 6 elements that depend on each other, with a signal of each case."""
    draw = seeded(seed)
    noise = torch.randn(n, m + 1, 6, generator=draw, dtype=torch.float64)
    noise = (noise + noise.roll(1, 2) + noise.mean(2, keepdim=True)) / 1.8
    signal = torch.randn(n, 1, 6, generator=draw, dtype=torch.float64)
    return signal + scale * noise[:, 1:] + shift, (signal + noise[:, :1])[:, 0]


@pytest.mark.parametrize("m", [2, 3, 12])
def test_the_ratio_is_one_for_exact_ensembles_of_any_size(m):
    found = spread_skill(*fields(6000, m))
    assert abs(found.ratio - 1) < 4 * found.stderr < 0.1
    narrow = spread_skill(*fields(6000, m, scale=0.5))
    # sqrt((m + 1) / m) .5 / sqrt(1 + .25 / m)
    right = math.sqrt((m + 1) / m) * 0.5 / math.sqrt(1 + 0.25 / m)
    assert abs(narrow.ratio - right) < 4 * narrow.stderr


def test_the_ratio_and_its_parts_by_hand():
    ensemble = torch.tensor([[1.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    observation = torch.tensor([5.0, 1.0], dtype=torch.float64)
    found = spread_skill(ensemble, observation)
    assert found.spread == pytest.approx(math.sqrt((2 + 8) / 2))
    assert found.rmse == pytest.approx(math.sqrt((9 + 1) / 2))
    assert found.ratio == pytest.approx(math.sqrt(1.5))


def test_standard_errors_are_those_of_repetitions():
    found = [EnsembleScores() for _ in range(100)]
    for i, scores in enumerate(found):
        scores.update(*fields(200, seed=i), generator=seeded(i))
    results = [scores.result() for scores in found]

    def both(read):
        values = torch.tensor([read(r)[0] for r in results], dtype=torch.float64)
        return float(values.std()), sum(read(r)[1] for r in results) / len(results)

    for read in (
        lambda r: (r.crps, r.crps_stderr),
        lambda r: (r.spread_skill.ratio, r.spread_skill.stderr),
        lambda r: (float(r.rank_histogram.frequency[0]), float(r.rank_histogram.stderr[0])),
    ):
        spread, stated = both(read)
        assert stated == pytest.approx(spread, rel=0.25)


def test_rank_histograms_are_flat_for_exact_ensembles_and_tell_the_fault_of_others():
    flat = rank_histogram(*fields(3000), generator=seeded())
    assert bool(((flat.frequency - 1 / 6).abs() < 4 * flat.stderr).all())
    assert float(flat.frequency.sum()) == pytest.approx(1.0)
    narrow = rank_histogram(*fields(3000, scale=0.5)).frequency
    wide = rank_histogram(*fields(3000, scale=2.0)).frequency
    high = rank_histogram(*fields(3000, shift=0.5)).frequency
    assert narrow[0] > 1.5 * narrow[2]
    assert narrow[5] > 1.5 * narrow[3]
    assert wide[0] < 0.7 * wide[2]
    assert wide[5] < 0.7 * wide[3]
    assert bool((high.diff() < 0.01).all())
    assert high[0] > 2 * high[5]


def test_batches_and_processes_give_the_result_of_all_at_once():
    ensemble, observation = fields(40)
    weights = torch.rand(1, 6, generator=seeded(1)) + 0.1
    whole, parts, other = (EnsembleScores(energy=True) for _ in range(3))
    whole.update(ensemble, observation, weights=weights)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 25)):
        parts.update(ensemble[rows], observation[rows], weights=weights)
    other.update(ensemble[25:], observation[25:], weights=weights)
    parts.merge(EnsembleScores(energy=True))
    parts.merge(other)
    one, two = whole.result(), parts.result()
    assert (one.cases, one.members) == (two.cases, two.members) == (40, 5)
    for name in ("crps", "crps_stderr", "energy_score", "energy_score_stderr"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-10)
    assert one.spread_skill.ratio == pytest.approx(two.spread_skill.ratio, rel=1e-10)
    assert one.spread_skill.stderr == pytest.approx(two.spread_skill.stderr, rel=1e-10)
    torch.testing.assert_close(one.rank_histogram.frequency, two.rank_histogram.frequency)
    torch.testing.assert_close(one.rank_histogram.stderr, two.rank_histogram.stderr)


def test_the_scores_are_the_means_of_the_functions():
    ensemble, observation = fields(30)
    scores = EnsembleScores(energy=True)
    scores.update(ensemble, observation)
    got = scores.result()
    each = crps(ensemble, observation).mean(1)
    assert got.crps == pytest.approx(float(each.mean()))
    assert got.crps_stderr == pytest.approx(float(each.std()) / math.sqrt(30))
    energy = energy_score(ensemble, observation)
    assert got.energy_score == pytest.approx(float(energy.mean()))
    ratio = spread_skill(ensemble, observation)
    assert (got.spread_skill.spread, got.spread_skill.rmse) == pytest.approx(
        (ratio.spread, ratio.rmse)
    )
    ranks = observation_ranks(ensemble, observation)
    shares = torch.bincount(ranks.flatten(), minlength=6) / 180
    torch.testing.assert_close(got.rank_histogram.frequency, shares.double())
    assert str(got).startswith(f"CRPS {got.crps:.5g} +- {got.crps_stderr:.2g}, spread/skill")


def test_land_may_be_nan_and_weights_are_areas():
    """Elements of weight 0 have no part; an integer weight repeats an element."""
    ensemble, observation = fields(30)
    repeated = [0, 0, 0, 3, 4]
    weights = torch.tensor([[3.0, 0.0, 0.0, 1.0, 1.0, 0.0]])
    land = ensemble.clone(), observation.clone()
    land[0][..., weights[0] == 0] = math.nan
    land[1][..., weights[0] == 0] = math.nan
    got, right = EnsembleScores(), EnsembleScores()
    got.update(*land, weights=weights)
    right.update(ensemble[..., repeated], observation[..., repeated])
    one, two = got.result(), right.result()
    assert one.crps == pytest.approx(two.crps)
    assert one.spread_skill.ratio == pytest.approx(two.spread_skill.ratio)
    torch.testing.assert_close(one.rank_histogram.frequency, two.rank_histogram.frequency)


def test_one_case_has_no_standard_error():
    scores = EnsembleScores(energy=True)
    scores.update(*(x[:1] for x in fields(3)))
    result = scores.result()
    assert math.isnan(result.crps_stderr)
    assert math.isnan(result.spread_skill.stderr)
    assert bool(result.rank_histogram.stderr.isnan().all())
    assert math.isnan(spread_skill(*(x[:1] for x in fields(3))).stderr)
    assert bool(rank_histogram(*(x[:1] for x in fields(3))).stderr.isnan().all())


def test_what_does_not_fit_is_refused():
    scores = EnsembleScores()
    with pytest.raises(ValueError, match="update: expected at least one case, got none"):
        scores.result()
    scores.update(*fields(4, m=3))
    with pytest.raises(ValueError, match="ensemble: expected 3 members, as before, got 4"):
        scores.update(*fields(4, m=4))
    with pytest.raises(ValueError, match="ensemble: expected at least 2 members, got 1"):
        scores.update(*fields(4, m=1))
    other = EnsembleScores()
    other.update(*fields(4, m=4))
    with pytest.raises(ValueError, match="other: expected 3 members and energy=False, got 4"):
        scores.merge(other)
    with pytest.raises(TypeError, match="other: expected a EnsembleScores"):
        scores.merge(None)
    assert repr(EnsembleScores(energy=True)) == "EnsembleScores(energy=True)"
