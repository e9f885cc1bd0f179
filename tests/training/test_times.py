"""The laws of the times a loss is taken at."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    LogNormalTimes,
    StratifiedTimes,
    SubVPSDE,
    TimeSampler,
    UniformTimes,
)

WIDE = EDMSDE(sigma_min=1.0, sigma_max=3.0)  # t_min is far from 0
LAWS = [UniformTimes(), StratifiedTimes(), LogNormalTimes()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance_from_uniform(u: torch.Tensor) -> float:
    """The Kolmogorov-Smirnov statistic, the largest gap between two distribution functions."""
    u, n = u.sort().values, len(u)
    below = torch.arange(n, dtype=u.dtype) / n
    return float(torch.maximum(u - below, below + 1 / n - u).max())


@given(
    law=st.sampled_from(LAWS),
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
    sde=st.sampled_from([VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), WIDE]),
    dtype=st.sampled_from([None, torch.float32, torch.float64]),
)
def test_shape_dtype_range_and_weight(law: TimeSampler, n, seed, sde, dtype) -> None:
    t, weight = law.sample(sde, n, generator=seeded(seed), dtype=dtype)
    assert t.shape == weight.shape == (n,)
    assert t.dtype == weight.dtype == (dtype or torch.float64)
    assert bool((weight == 1).all())
    slack = 1e-6 * sde.T if dtype == torch.float32 else 0.0
    assert sde.t_min - slack <= float(t.min()) <= float(t.max()) <= sde.T + slack


@pytest.mark.parametrize("law", LAWS)
def test_the_generator_decides(law) -> None:
    first, second, other = (law.sample(WIDE, 5, generator=seeded(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_uniform_times_are_uniform() -> None:
    n = 20_000
    t, _ = UniformTimes().sample(WIDE, n, generator=seeded())
    assert distance_from_uniform((t - 1) / 2) < 1.95 / math.sqrt(n)  # exceeded 1 time in 1000


def test_weighted_times_average_over_the_interval() -> None:
    """E[weight h(t)] is the mean of h over [t_min, T]: of t^2 over [1, 3] it is 13/3."""
    n = 20_000
    for law, error in ((UniformTimes(), 5 * 2.37 / math.sqrt(n)), (StratifiedTimes(), 1e-3)):
        t, weight = law.sample(WIDE, n, generator=seeded())
        assert float((weight * t**2).mean()) == pytest.approx(13 / 3, abs=error)


@given(n=st.integers(1, 300), seed=st.integers(0, 10_000))
def test_stratified_times_have_one_in_each_stratum(n, seed) -> None:
    t, _ = StratifiedTimes().sample(WIDE, n, generator=seeded(seed))
    strata = ((t - 1) / 2 * n).floor().long()
    assert strata.sort().values.tolist() == list(range(n))


def test_each_stratified_time_alone_is_uniform() -> None:
    draws, g = 4000, seeded()
    t = torch.stack([StratifiedTimes().sample(WIDE, 8, generator=g)[0] for _ in range(draws)])
    for column in (0, 3, 7):
        assert distance_from_uniform((t[:, column] - 1) / 2) < 1.95 / math.sqrt(draws)


def test_stratified_means_vary_less() -> None:
    """The mean of n shifted points varies by 1 / (n sqrt(12)), of n independent ones by
    1 / sqrt(12 n), each times the length of the interval."""
    n, draws, g = 16, 2000, seeded()
    spread = {}
    for law in (UniformTimes(), StratifiedTimes()):
        means = torch.stack([law.sample(WIDE, n, generator=g)[0].mean() for _ in range(draws)])
        spread[type(law)] = float(means.std())
    assert spread[UniformTimes] == pytest.approx(2 / math.sqrt(12 * n), rel=0.08)
    assert spread[StratifiedTimes] == pytest.approx(2 / (n * math.sqrt(12)), rel=0.08)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()])
def test_log_normal_times(sde) -> None:
    """The mean and standard deviation of ln(sigma / alpha), within 5 standard errors."""
    n, mean, std = 40_000, -0.5, 0.8
    t, _ = LogNormalTimes(mean, std).sample(sde, n, generator=seeded())
    alpha, sigma = sde.marginal(t)
    log = torch.log(sigma / alpha)
    assert float(log.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(n))
    assert float(log.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * n))
    third = ((log - mean) / std).pow(3).mean()
    assert abs(float(third)) < 5 * math.sqrt(15 / n)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), WIDE])
def test_log_normal_times_are_kept_inside(sde) -> None:
    t, _ = LogNormalTimes(0.0, 30.0).sample(sde, 1000, generator=seeded())
    assert float(t.min()) == sde.t_min
    assert float(t.max()) == sde.T


@pytest.mark.parametrize("law", [UniformTimes(), LogNormalTimes()])
def test_a_time_with_its_own_generator_does_not_depend_on_the_batch(law) -> None:
    together, _ = law.sample(VPSDE(), 7, generator=[seeded(i) for i in range(7)])
    assert len(set(together.tolist())) == 7
    for i in range(7):
        alone, _ = law.sample(VPSDE(), 1, generator=[seeded(i)])
        assert torch.equal(alone, together[i : i + 1])


def test_stratified_times_refuse_a_generator_for_each_sample() -> None:
    with pytest.raises(TypeError, match=r"StratifiedTimes shares one shift.*got list"):
        StratifiedTimes().sample(VPSDE(), 2, generator=[seeded(0), seeded(1)])


def test_update_is_a_no_op_by_default() -> None:
    assert UniformTimes().update(torch.rand(3), torch.rand(3)) is None
