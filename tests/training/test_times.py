"""Distributions of training times."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded
from support.processes import run_in_two_processes

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    ForwardSDE,
    ImportanceTimes,
    LikelihoodWeighting,
    LogNormalTimes,
    StratifiedTimes,
    SubVPSDE,
    TimeSampler,
    UniformTimes,
)

WIDE = EDMSDE(sigma_min=1.0, sigma_max=3.0)  # t_min is far from 0
SAMPLERS = [UniformTimes(), StratifiedTimes(), LogNormalTimes()]


def distance_from_uniform(u: torch.Tensor) -> float:
    """The Kolmogorov-Smirnov statistic, the largest gap between two distribution functions."""
    u, n = u.sort().values, len(u)
    below = torch.arange(n, dtype=u.dtype) / n
    return float(torch.maximum(u - below, below + 1 / n - u).max())


@given(
    sampler=st.sampled_from(SAMPLERS),
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
    sde=st.sampled_from([VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), WIDE]),
    dtype=st.sampled_from([None, torch.float32, torch.float64]),
)
def test_shape_dtype_range_and_weight_of_times(sampler: TimeSampler, n, seed, sde, dtype) -> None:
    t, weight = sampler.sample(sde, n, generator=seeded(seed), dtype=dtype)
    assert t.shape == weight.shape == (n,)
    assert t.dtype == weight.dtype == (dtype or torch.float64)
    assert bool((weight == 1).all())
    slack = 1e-6 * sde.T if dtype == torch.float32 else 0.0
    assert sde.t_min - slack <= float(t.min()) <= float(t.max()) <= sde.T + slack


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_generator_determines_the_times(sampler) -> None:
    first, second, other = (sampler.sample(WIDE, 5, generator=seeded(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_uniform_times_are_uniform() -> None:
    n = 20_000
    t, _ = UniformTimes().sample(WIDE, n, generator=seeded())
    assert distance_from_uniform((t - 1) / 2) < 1.95 / math.sqrt(n)  # exceeded 1 time in 1000


def test_weighted_means_are_means_over_the_interval() -> None:
    """E[weight h(t)] is the mean of h over [t_min, T]: 13/3 for t^2 over [1, 3]."""
    n = 20_000
    for sampler, error in ((UniformTimes(), 5 * 2.37 / math.sqrt(n)), (StratifiedTimes(), 1e-3)):
        t, weight = sampler.sample(WIDE, n, generator=seeded())
        assert float((weight * t**2).mean()) == pytest.approx(13 / 3, abs=error)


@given(n=st.integers(1, 300), seed=st.integers(0, 10_000))
def test_stratified_times_have_one_in_each_stratum(n, seed) -> None:
    t, _ = StratifiedTimes().sample(WIDE, n, generator=seeded(seed))
    strata = ((t - 1) / 2 * n).floor().long()
    assert strata.sort().values.tolist() == list(range(n))


def test_each_stratified_time_by_itself_is_uniform() -> None:
    draws, g = 4000, seeded()
    t = torch.stack([StratifiedTimes().sample(WIDE, 8, generator=g)[0] for _ in range(draws)])
    for column in (0, 3, 7):
        assert distance_from_uniform((t[:, column] - 1) / 2) < 1.95 / math.sqrt(draws)


def test_stratified_means_vary_less() -> None:
    """The mean of n shifted points has standard deviation 1 / (n sqrt(12)), that of n independent
    ones 1 / sqrt(12 n), times the length of the interval."""
    n, draws, g = 16, 2000, seeded()
    spread = {}
    for sampler in (UniformTimes(), StratifiedTimes()):
        means = torch.stack([sampler.sample(WIDE, n, generator=g)[0].mean() for _ in range(draws)])
        spread[type(sampler)] = float(means.std())
    assert spread[UniformTimes] == pytest.approx(2 / math.sqrt(12 * n), rel=0.08)
    assert spread[StratifiedTimes] == pytest.approx(2 / (n * math.sqrt(12)), rel=0.08)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()])
def test_log_normal_times_have_the_given_moments(sde) -> None:
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
def test_log_normal_times_are_clamped_to_the_interval(sde) -> None:
    t, _ = LogNormalTimes(0.0, 30.0).sample(sde, 1000, generator=seeded())
    assert float(t.min()) == sde.t_min
    assert float(t.max()) == sde.T


@pytest.mark.parametrize("sampler", [UniformTimes(), LogNormalTimes()])
def test_a_time_with_its_own_generator_does_not_depend_on_the_batch(sampler) -> None:
    together, _ = sampler.sample(VPSDE(), 7, generator=[seeded(i) for i in range(7)])
    assert len(set(together.tolist())) == 7
    for i in range(7):
        alone, _ = sampler.sample(VPSDE(), 1, generator=[seeded(i)])
        assert torch.equal(alone, together[i : i + 1])


def test_stratified_times_reject_one_generator_for_each_sample() -> None:
    with pytest.raises(
        ValueError, match=r"generator: expected .* got list; StratifiedTimes shifts"
    ):
        StratifiedTimes().sample(VPSDE(), 2, generator=[seeded(0), seeded(1)])


def test_update_does_nothing_by_default() -> None:
    assert UniformTimes().update(torch.rand(3), torch.rand(3)) is None


# 40-digit values: Z, and the quantiles at 1/10 and 1/2.
REFERENCE = [
    (VPSDE(), 23.864472365469528, 0.00010770140347459272, 0.11442144872953759),
    (VPSDE(t_min=5e-5), 22.251064280830285, 0.0004452868882902662, 0.1667941416784567),
    (VPSDE(t_min=1e-2), 16.26607037612435, 0.02723929951599541, 0.4493643128129915),
    (SubVPSDE(), 37.67894573193406, 6.543369468483156e-05, 0.030550228368014506),
    (SubVPSDE(t_min=5e-5), 34.45213358653557, 0.0002738842516292164, 0.04792961945723497),
    (SubVPSDE(t_min=1e-2), 22.484135752248697, 0.020319549378567187, 0.22890112358890474),
    (VESDE(), 17.034216038968648, 0.100009, 0.500005),
    (VESDE(t_min=1e-2), 16.86404251900415, 0.109, 0.505),
]


class Polynomial(ForwardSDE):
    """A process of which only alpha and sigma are given."""

    t_min = 1e-3

    def marginal(self, t):
        return torch.cos(1.5 * t), torch.sin(1.5 * t) ** 2 + 0.1 * t


@pytest.mark.parametrize(("sde", "z", "tenth", "half"), REFERENCE)
def test_normalizer_and_quantiles_against_40_digits(sde, z, tenth, half) -> None:
    sampler = ImportanceTimes()
    assert sampler.normalizer(sde) == pytest.approx(z, rel=1e-12)
    times = sampler.quantile(sde, torch.tensor([0.1, 0.5], dtype=torch.float64))
    assert times.tolist() == pytest.approx([tenth, half], rel=1e-10)
    ends = sampler.quantile(sde, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([sde.t_min, sde.T], rel=1e-9)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), Polynomial()])
def test_the_log_snr_of_importance_times_is_uniform(sde, stratified) -> None:
    n = 4000
    t, _ = ImportanceTimes(stratified=stratified).sample(sde, n, generator=seeded())
    ends = sde.log_snr(torch.tensor([sde.T, sde.t_min], dtype=torch.float64))
    u = ((sde.log_snr(t) - ends[0]) / (ends[1] - ends[0])).sort().values
    gap = float((u - torch.arange(n, dtype=u.dtype) / n).abs().max())
    assert gap < (1.5 / n if stratified else 1.63 / math.sqrt(n))
    if not stratified:
        assert gap > 2 / n


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(t_min=1e-2), VESDE(), Polynomial()])
def test_weights_keep_the_mean_over_uniform_times(sde) -> None:
    # With h that vanishes where the weight is large; stratified means converge as 1/n^2.
    n = 200_000
    t, weight = ImportanceTimes().sample(sde, n, generator=seeded())
    share = (t - sde.t_min) / (sde.T - sde.t_min)
    assert float((weight * share).mean()) == pytest.approx(1 / 2, abs=2e-3)
    assert float((weight * share**3).mean()) == pytest.approx(1 / 4, abs=2e-3)


def test_the_normalizer_is_the_integral_of_the_likelihood_weighting() -> None:
    sde = Polynomial()
    t = torch.linspace(sde.t_min, sde.T, 200_001, dtype=torch.float64)
    integral = torch.trapezoid(LikelihoodWeighting()(sde, t), t)
    assert ImportanceTimes().normalizer(sde) == pytest.approx(float(integral), rel=1e-5)


def test_importance_weights_cancel_the_likelihood_weighting() -> None:
    for sde in (VPSDE(), SubVPSDE(), VESDE(), Polynomial()):
        t, weight = ImportanceTimes().sample(sde, 50, generator=seeded())
        product = weight * LikelihoodWeighting()(sde, t) * (sde.T - sde.t_min)
        z = ImportanceTimes().normalizer(sde)
        assert product.tolist() == pytest.approx([z] * 50, rel=1e-9)


def test_subclasses_with_attributes_of_their_own_are_told_apart() -> None:
    class Slower(VPSDE):
        rate = 1.0

        def log_snr(self, t: torch.Tensor) -> torch.Tensor:
            return self.rate * super().log_snr(t)

    one, two = Slower(), Slower()
    object.__setattr__(two, "rate", 2.0)
    assert one == two  # as dataclasses, which know nothing of it
    normalizers = [ImportanceTimes().normalizer(sde) for sde in (one, two)]
    assert normalizers[1] == pytest.approx(2 * normalizers[0])


def test_dtype_and_generators_of_importance_times() -> None:
    sampler = ImportanceTimes(stratified=False)
    t, weight = sampler.sample(
        VPSDE(), 3, generator=[seeded(i) for i in range(3)], dtype=torch.float32
    )
    assert t.dtype == weight.dtype == torch.float32
    alone = sampler.sample(VPSDE(), 1, generator=[seeded(2)], dtype=torch.float32)[0]
    assert torch.equal(t[2:], alone)
    with pytest.raises(ValueError, match="got list; ImportanceTimes shifts the whole batch"):
        ImportanceTimes().sample(VPSDE(), 2, generator=[seeded(), seeded()])


def test_an_infinite_log_snr_raises() -> None:
    with pytest.raises(ValueError, match=r"t_min: expected a time with noise.* sigma\(0\) = 0"):
        ImportanceTimes().sample(VPSDE(t_min=0.0), 4)


@pytest.mark.parametrize("make", [VPSDE, SubVPSDE, VESDE])
def test_t_min_outside_its_range_raises(make) -> None:
    for bad in (-1e-3, 1.0, float("nan")):
        with pytest.raises(ValueError, match="t_min: expected a time"):
            make(t_min=bad)
    assert make(t_min=1e-2).t_min == 1e-2
    assert make(t_min=1e-2).t_stop >= 1e-2


RANKS = """
from diffusionkit import VPSDE, ImportanceTimes, StratifiedTimes
from diffusionkit.interfaces import ForwardSDE

generator = torch.Generator().manual_seed(rank)
own, options = torch.Generator().manual_seed(rank), dict(generator=generator, dtype=torch.float64)
sde, result = VPSDE(), {}
for name, n in (("equal", 4), ("unequal", 4 - rank)):
    t, _ = StratifiedTimes().sample(sde, n, **options)
    result[name, "uniform"] = (t - sde.t_min) / (sde.T - sde.t_min)
    t, _ = ImportanceTimes().sample(sde, n, **options)
    ends = sde.log_snr(torch.tensor([sde.t_min, sde.T], dtype=torch.float64))
    result[name, "importance"] = (sde.log_snr(t) - ends[0]) / (ends[1] - ends[0])
result["next"] = torch.rand(1, **options)
result["own"] = torch.rand(5, generator=own, dtype=torch.float64)  # each draw takes one
with torch.no_grad():  # on one rank alone, as in an evaluation: the other draws nothing
    if rank == 1:
        t, _ = StratifiedTimes().sample(sde, 4, **options)
        result["alone"] = (t - sde.t_min) / (sde.T - sde.t_min)
        ImportanceTimes().sample(sde, 4, **options)
dist.barrier()
"""


def gaps(u: torch.Tensor) -> torch.Tensor:
    """The distances between neighbors on a circle of length 1."""
    u = u.sort().values
    return torch.diff(u, append=u[:1] + 1)


def test_times_of_all_processes_together_are_evenly_spaced(tmp_path) -> None:
    """Though each process has its own generator; for unequal batches those of each process are."""
    first, second = run_in_two_processes(RANKS, tmp_path)
    for kind, tolerance in (("uniform", 1e-12), ("importance", 1e-9)):
        together = torch.cat([first["equal", kind], second["equal", kind]])
        torch.testing.assert_close(
            gaps(together), torch.full((8,), 1 / 8, dtype=torch.float64), rtol=0, atol=tolerance
        )
        for result, n in ((first, 4), (second, 3)):
            each = torch.full((n,), 1 / n, dtype=torch.float64)
            torch.testing.assert_close(gaps(result["unequal", kind]), each, rtol=0, atol=tolerance)
    assert not torch.equal(first["own"], second["own"])
    for result in (first, second):  # each generator advances as it does alone
        assert torch.equal(result["next"], result["own"][4:])
    torch.testing.assert_close(gaps(second["alone"]), torch.full((4,), 0.25, dtype=torch.float64))
