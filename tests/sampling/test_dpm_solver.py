"""DPM-Solver++: the single-step and the stochastic solver."""

import math

import pytest
import torch
from support import full
from support.flow_values import Z, line_mixture
from support.gaussian_runs import MEAN, STD, flow_error, gaussian
from support.noise import GivenNoise

from diffusionkit import (
    DDIM,
    EDMSDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    ForwardSDE,
    KarrasGrid,
    PCSampler,
)
from diffusionkit.sampling.dpm_solver import DPMSolver2M, DPMSolver2MSDE, DPMSolver2S

# --- 2S --------------------------------------------------------------------------------------


def test_2s_equals_a_released_code():
    """k-diffusion, in 12 steps of EDM's grid."""
    sampler = PCSampler(
        line_mixture(EDMSDE()), DPMSolver2S(), grid=KarrasGrid(), steps=12, denoise=False
    )
    expected = [-1.266582096426643, -0.9660685695313777, -0.05124136749463482]
    assert sampler(80 * Z).flatten()[:3].tolist() == pytest.approx(expected, abs=1e-12)
    assert sampler.nfe == 24


@pytest.mark.parametrize("r", [0.3, 0.5, 1.0])
def test_2s_by_hand(r):
    """At levels 2, 2^(1 - 2r) and 1/2 of EDM, in scalar arithmetic."""
    model, x = line_mixture(EDMSDE()), 0.6

    def row(value):
        return torch.tensor([value], dtype=torch.float64)

    def data(y, level):
        return float(model.predict(row([y]), row(level)).x0)

    middle = 2 ** (1 - 2 * r)
    first = data(x, 2.0)
    second = data(x * middle / 2 + (1 - middle / 2) * first, middle)
    expected = x / 4 + 0.75 * (first + (second - first) / (2 * r))
    found = DPMSolver2S(r).step(model, row([x]), row(2.0), row(0.5))
    assert float(found.x) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("r", [0.3, 0.5, 1.0])
def test_2s_is_of_order_two(sde, r):
    if isinstance(sde, DDPMChain):
        pytest.skip("its log-SNR has a corner at every step of the chain")
    coarse, fine = (flow_error(sde, DPMSolver2S(r), steps) for steps in (64, 128))
    assert fine < 1e-3
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.25)


def test_2s_takes_different_times_for_each_sample(sde):
    """Samples that end without noise take one stage, others two."""
    model = line_mixture(sde)
    t = torch.tensor([0.9, 0.3, 0.5], dtype=torch.float64) * sde.T
    s = torch.tensor([0.4, 0.0, 0.45], dtype=torch.float64) * sde.T
    x = torch.tensor([[0.4], [-0.9], [1.2]], dtype=torch.float64)
    for predictor in (DPMSolver2S(), DPMSolver2S(r=1.0)):
        together = predictor.step(model, x, t, s).x
        for i in range(3):
            times = torch.stack([t[i], s[i]])
            alone = PCSampler(model, predictor, grid=times, denoise=False)(x[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_2s_takes_one_evaluation_to_a_time_without_noise():
    model = line_mixture(EDMSDE())
    sampler = PCSampler(model, DPMSolver2S(), grid=KarrasGrid(to_zero=True), steps=6)
    *_, before, _, last = sampler.iterate((80 * Z).float())
    assert sampler.nfe == 11
    x0 = model.predict(before.x, torch.full((8,), before.t)).x0
    torch.testing.assert_close(last.x, x0, rtol=1e-5, atol=1e-6)
    assert last.x.dtype == torch.float32


class ZeroSNR(ForwardSDE):
    """A process with no signal at T, where the log-SNR is minus infinity."""

    def marginal(self, t):
        return 1 - t, t


def test_2s_takes_ddims_step_from_a_start_without_signal():
    grid = torch.tensor([1.0, 0.9], dtype=torch.float64)
    two, one = (
        PCSampler(line_mixture(ZeroSNR()), p, grid=grid, denoise=False)
        for p in (DPMSolver2S(), DDIM())
    )
    torch.testing.assert_close(two(Z), one(Z), rtol=1e-12, atol=1e-13)
    assert two.nfe == 1


# --- 2M-SDE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_2m_sde_by_hand(solver, eta):
    """Two steps with noise 1, in scalar arithmetic, with the signs of the released code."""
    sde, x = VPSDE(), 0.3
    model, path = line_mixture(sde), GivenNoise(torch.ones(2).double())
    times = torch.tensor([0.7, 0.5, 0.4], dtype=torch.float64)
    l = [0.5 * float(v) for v in sde.log_snr(times)]
    (alpha, sigma) = (c.tolist() for c in sde.marginal(times))
    state, old, y = None, None, torch.full((2, 1), x, dtype=torch.float64)
    for k in range(2):
        t, s = (times[j].expand(2) for j in (k, k + 1))
        h = l[k + 1] - l[k]
        prediction = float(model.predict(y, t).x0[0])
        gain = -math.expm1(-h - eta * h)
        x = sigma[k + 1] / sigma[k] * math.exp(-eta * h) * x + alpha[k + 1] * gain * prediction
        if old is not None:
            slope = (prediction - old) * h / (l[k] - l[k - 1])
            share = 0.5 * gain if solver == "midpoint" else gain / (-h - eta * h) + 1
            x += alpha[k + 1] * share * slope
        old = prediction
        step = DPMSolver2MSDE(eta, solver).step(model, y, t, s, state, generator=path)
        torch.testing.assert_close(step.mean, torch.full_like(y, x), rtol=1e-11, atol=1e-12)
        x += sigma[k + 1] * math.sqrt(-math.expm1(-2 * eta * h))
        y, state = step.x, step.state
        torch.testing.assert_close(y, torch.full_like(y, x), rtol=1e-11, atol=1e-12)


def test_2m_sde_begins_with_an_ancestral_step(sde):
    t, s = full(0.6 * sde.T, 2), full(0.35 * sde.T, 2)
    x = torch.tensor([[0.4], [-0.9]], dtype=torch.float64)
    found, ancestral = (
        p.step(line_mixture(sde), x, t, s, generator=GivenNoise(torch.ones(2).double()))
        for p in (DPMSolver2MSDE(), Ancestral())
    )
    torch.testing.assert_close(found.mean, ancestral.mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.x, ancestral.x, rtol=1e-7, atol=1e-10)


def test_2m_sde_without_noise_is_2m():
    grid = KarrasGrid(to_zero=True)
    found, plain = (
        PCSampler(line_mixture(EDMSDE()), p, grid=grid, steps=9)(80 * Z)
        for p in (DPMSolver2MSDE(eta=0.0), DPMSolver2M())
    )
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("eta", "solver"), [(1.0, "midpoint"), (1.0, "heun"), (0.5, "midpoint")])
def test_2m_sde_is_of_weak_order_two(eta, solver):
    """On Gaussian data: the rows of the batch are the mean and the effect of each noise."""
    sde, errors = VPSDE(), []
    for steps in (64, 128):
        times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1, dtype=torch.float64))
        alpha, sigma = sde.marginal(times)
        std = torch.sqrt((alpha * STD) ** 2 + sigma**2)
        start = (alpha[0] * MEAN).expand(steps + 2, 1).clone()
        start[1] += std[0]
        sampler = PCSampler(gaussian(sde), DPMSolver2MSDE(eta, solver), grid=times, denoise=False)
        noise = torch.eye(steps + 2, dtype=torch.float64)[1:]
        x = sampler(start, generator=GivenNoise(noise.__getitem__, steps + 2))
        assert float(x[0]) == pytest.approx(float(alpha[-1] * MEAN), rel=1e-12)
        errors.append(abs(float((x[1:] - x[0]).square().sum().sqrt() - std[-1])))
    assert errors[1] < 3e-4
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DPMSolver2S(0.0), ValueError, r"r: expected a number in \(0, 1\], got 0.0"),
        (lambda: DPMSolver2S(1.5), ValueError, r"r: expected a number in \(0, 1\], got 1.5"),
        (lambda: DPMSolver2S("1"), TypeError, "r: expected a number, got str"),
        (lambda: DPMSolver2MSDE(-1.0), ValueError, "eta: expected a finite number >= 0, got -1"),
        (lambda: DPMSolver2MSDE(math.inf), ValueError, "eta: expected a finite number >= 0"),
        (lambda: DPMSolver2MSDE(None), TypeError, "eta: expected a number, got NoneType"),
        (
            lambda: DPMSolver2MSDE(solver="euler"),
            ValueError,
            "solver: expected one of 'midpoint', 'h",
        ),
    ],
)
def test_invalid_settings_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_invalid_times_raise():
    model, t = line_mixture(EDMSDE()), torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"expected s < t, got s = \[0.5, 3.0\]"):
        DPMSolver2S().step(model, torch.ones(2, 1), t, torch.tensor([0.5, 3.0]))
    DPMSolver2S().prepare(EDMSDE(), [t, t / 2])  # does nothing for times that are not a grid's
