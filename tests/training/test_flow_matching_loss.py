"""The loss of flow matching, and the distributions of times used with it."""

import math

import pytest
import torch
from support import f64, seeded

from diffusionkit import (
    EDMSDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    FlowMatchingSDE,
    ImportanceTimes,
    LogitNormalTimes,
    LogNormalTimes,
    ModeTimes,
    ScoreMatching,
    ShiftedTimes,
    StratifiedTimes,
    SubVPSDE,
    TimeLabel,
    UniformTimes,
    VelocityModel,
    VelocityWeighting,
    VModel,
    X0Model,
)

SDE = FlowMatchingSDE()
X0, F = (torch.randn(7, 5, generator=seeded(i), dtype=torch.float64) for i in range(2))
TIMES = [0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0]
PROCESSES = {
    "flow": SDE, "VP": VPSDE(), "sub-VP": SubVPSDE(), "EDM": EDMSDE(),
    "chain": DDPMChain.cosine(10).zero_terminal_snr(),
}  # fmt: skip


def network(x, noise_label):
    return F.to(x.dtype)


def loss(model, t, dtype):
    objective = ScoreMatching(VelocityWeighting())
    return objective(model, X0.to(dtype), t=t.to(dtype), generator=seeded(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_is_that_of_flow_matching(name, dtype):
    """The mean of |F - (eps - x0)|^2, with every process, at its ends too."""
    sde = PROCESSES[name]
    t = f64(*TIMES) * sde.T
    eps = sde.perturb(X0.to(dtype), t.to(dtype), generator=seeded(2)).eps
    right = (F.to(dtype) - (eps - X0.to(dtype))).square().mean(1)
    got = loss(VelocityModel(network, sde), t, dtype)
    torch.testing.assert_close(got, right, rtol=1e-6, atol=0)


def test_the_loss_of_other_models_is_that_of_their_velocity():
    t = f64(*TIMES[1:], 0.3)  # at 0 the noise does not follow from the data
    sample = SDE.perturb(X0, t, generator=seeded(2))
    for model in (
        X0Model(network, SDE),
        VModel(network, SDE),
        EDMModel(network, SDE, label=TimeLabel()),
    ):
        prediction = model.predict(sample.x, t)
        error = prediction.eps - prediction.x0 - (sample.eps - sample.x0)
        got = loss(model, t, torch.float64)
        torch.testing.assert_close(got, error.square().mean(1), rtol=1e-6, atol=0)


def fractions_below(sampler, at, sde=SDE, n=40_000):
    t, weight = sampler.sample(sde, n, generator=seeded())
    assert bool((weight == 1).all())
    return [float((t < a * sde.T).double().mean()) for a in at]


QUARTERS = (0.1, 0.25, 0.5, 0.75, 0.9)


def normal(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@pytest.mark.parametrize("sde", [SDE, EDMSDE(), VPSDE()], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_the_logit_of_times_is_normal(sde, mean, std):
    right = [normal((math.log(a / (1 - a)) - mean) / std) for a in QUARTERS]
    got = fractions_below(LogitNormalTimes(mean, std), QUARTERS, sde)
    assert got == pytest.approx(right, abs=0.012)  # five standard errors at most


def test_on_flow_matching_logit_normal_times_are_log_normal():
    ours, theirs = (
        kind(0.3, 1.1).sample(SDE, 50, generator=seeded())[0]
        for kind in (LogitNormalTimes, LogNormalTimes)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.29, 1.75])
def test_mode_times_have_the_published_distribution(scale):
    """u -> 1 - u - s (cos^2(pi u / 2) - 1 + u) decreases from 1 to 0: invert it by bisection."""

    def above(time):
        low, high = 0.0, 1.0
        for _ in range(60):
            u = 0.5 * (low + high)
            value = 1 - u - scale * (math.cos(0.5 * math.pi * u) ** 2 - 1 + u)
            low, high = (u, high) if value > time else (low, u)
        return low

    right = [1 - above(a) for a in QUARTERS]
    assert fractions_below(ModeTimes(scale), QUARTERS) == pytest.approx(right, abs=0.012)


@pytest.mark.parametrize("sde", [SDE, EDMSDE()], ids=str)
def test_shifted_times_have_shifted_quantiles(sde):
    m = 3.0
    shifted = [m * a / (1 + (m - 1) * a) for a in QUARTERS]
    got = fractions_below(ShiftedTimes(m), shifted, sde)
    assert got == pytest.approx(QUARTERS, abs=0.012)
    back = ShiftedTimes(m, ShiftedTimes(1 / m, LogitNormalTimes()))
    plain, twice = (s.sample(sde, 9, generator=seeded())[0] for s in (LogitNormalTimes(), back))
    torch.testing.assert_close(twice, plain, rtol=1e-12, atol=0)


def test_the_shift_multiplies_the_noise_to_signal_ratio():
    plain, moved = (
        s.sample(SDE, 50, generator=seeded())[0] for s in (UniformTimes(), ShiftedTimes(2.5))
    )
    torch.testing.assert_close(moved / (1 - moved), 2.5 * plain / (1 - plain))


SAMPLERS = [LogitNormalTimes(), LogitNormalTimes(0.0, 50.0), ModeTimes(), ShiftedTimes(0.1)]


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("sde", [SDE, VPSDE(), EDMSDE(sigma_min=1.0, sigma_max=3.0)], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_times_are_within_the_interval(sampler, sde, dtype):
    t, weight = sampler.sample(sde, 500, generator=seeded(), dtype=dtype)
    assert t.dtype == weight.dtype == (dtype or torch.float64)
    assert sde.t_min - 1e-7 <= float(t.min()) <= float(t.max()) <= sde.T
    assert not sampler.unbiased
    together, _ = sampler.sample(sde, 3, generator=[seeded(i) for i in range(3)])
    alone, _ = sampler.sample(sde, 1, generator=[seeded(2)])
    assert torch.equal(together[2:], alone)


def test_shifted_times_keep_the_weights_and_strata_of_the_others():
    t, _ = ShiftedTimes(3.0, StratifiedTimes()).sample(SDE, 64, generator=seeded())
    u = t / (3 - 2 * t)
    assert ((u - SDE.t_min) / (1 - SDE.t_min) * 64).floor().sort().values.tolist() == [*range(64)]
    inner = ImportanceTimes(stratified=False)
    _, weight = ShiftedTimes(2.0, inner).sample(VPSDE(), 5, generator=seeded())
    assert torch.equal(weight, inner.sample(VPSDE(), 5, generator=seeded())[1])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: ModeTimes(2.0), r"scale: expected a number from -1 to 1.75\d*, got 2.0"),
        (lambda: ModeTimes(math.nan), "scale: expected a number from -1"),
        (lambda: LogitNormalTimes(math.inf), "mean: expected a finite number, got inf"),
        (lambda: LogitNormalTimes(0.0, 0.0), "std: expected a finite number > 0, got 0"),
        (lambda: ShiftedTimes(0.0), "shift: expected a finite number > 0, got 0"),
        (lambda: FlowMatchingSDE(1.0), r"t_min: expected a time in \[0, T\)"),
    ],
)
def test_wrong_settings(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
