"""DPM-Solver++: the single-step and the stochastic solver."""

import math

import pytest
import torch
from support import full, seeded
from support.flow_values import Z, line_mixture
from support.gaussian_runs import flow_error, moments_error
from support.noise import GivenNoise

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    ForwardSDE,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
)
from diffusionkit.sampling.dpm_solver import (
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver2SAncestral,
    DPMSolver3M,
    DPMSolver3MSDE,
)

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
    h = math.log(4)
    # With the line's value at the midpoint, and with its integral e^-h int e^l (l - l_t) dl.
    for solver, share in (("midpoint", 0.75 * h / 2), ("heun", h - 0.75)):
        expected = x / 4 + 0.75 * first + share * (second - first) / (r * h)
        found = DPMSolver2S(r, solver).step(model, row([x]), row(2.0), row(0.5))
        assert float(found.x) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("r", "solver"), [(0.3, "midpoint"), (0.5, "heun"), (1.0, "midpoint")])
def test_2s_is_of_order_two(sde, r, solver):
    if isinstance(sde, DDPMChain):
        pytest.skip("its log-SNR has a corner at every step of the chain")
    coarse, fine = (flow_error(sde, DPMSolver2S(r, solver), steps) for steps in (64, 128))
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
    sde, errors = VPSDE(), []
    for steps in (64, 128):
        times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1, dtype=torch.float64))
        errors.append(moments_error(sde, DPMSolver2MSDE(eta, solver), times))
    assert errors[1] < 3e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


# --- 3M-SDE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("form", ["exact", "published"])
def test_3m_sde_by_hand(form, eta):
    """Four steps with noise 1, by the divided differences and phi functions of the released code.

    Published, the quadratic term has half of its weight.
    """
    sde, y = VPSDE(), full(0.3, 2).view(2, 1)
    model, path = line_mixture(sde), GivenNoise(torch.ones(2).double())
    times = torch.tensor([0.8, 0.7, 0.5, 0.42, 0.3], dtype=torch.float64)
    l = [0.5 * float(v) for v in sde.log_snr(times)]
    (alpha, sigma) = (c.tolist() for c in sde.marginal(times))
    state, past, x = None, [], 0.3 / alpha[0]  # k-diffusion's state is x / alpha
    for k in range(4):
        t, s = (times[j].expand(2) for j in (k, k + 1))
        past = [float(model.predict(y, t).x0[0]), *past]
        h, z = l[k + 1] - l[k], (1 + eta) * (l[k + 1] - l[k])
        phi2 = math.expm1(-z) / z + 1
        x = math.exp(-z) * x - math.expm1(-z) * past[0]
        if k == 1:
            x += phi2 * (past[0] - past[1]) * h / (l[1] - l[0])
        if k > 1:
            r0, r1 = (l[k] - l[k - 1]) / h, (l[k - 1] - l[k - 2]) / h
            first, second = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
            d1 = first + (first - second) * r0 / (r0 + r1)
            d2 = (first - second) / (r0 + r1)
            x += phi2 * d1 - (1 if form == "published" else 2) * (phi2 / z - 0.5) * d2
        step = DPMSolver3MSDE(eta, form).step(model, y, t, s, state, generator=path)
        assert float(step.mean[0]) == pytest.approx(alpha[k + 1] * x, rel=1e-10)
        x += sigma[k + 1] / alpha[k + 1] * math.sqrt(-math.expm1(-2 * h * eta))
        y, state = step.x, step.state
        assert float(y[0]) == pytest.approx(alpha[k + 1] * x, rel=1e-10)


@pytest.mark.parametrize("form", ["exact", "published"])
def test_3m_sde_without_noise_is_3m(form):
    found, plain = (
        PCSampler(line_mixture(EDMSDE()), p, grid=KarrasGrid(to_zero=True), steps=9)(80 * Z)
        for p in (DPMSolver3MSDE(0.0, form), DPMSolver3M(form))
    )
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("form", "eta"), [("exact", 1.0), ("exact", 0.5), ("published", 1.0)], ids=str
)
def test_3m_sde_is_of_weak_order_two(form, eta):
    sde, errors = VPSDE(), []
    for steps in (64, 128):
        times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1, dtype=torch.float64))
        errors.append(moments_error(sde, DPMSolver3MSDE(eta, form), times))
    assert errors[1] < 2e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


# --- 2S ancestral ----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_2s_ancestral_by_hand(eta):
    """EDM from 2 to 1/2 with noise .7, in the words of the released code: sigma_down, sigma_up."""
    model, x = line_mixture(EDMSDE()), 0.6

    def row(value):
        return torch.tensor([value], dtype=torch.float64)

    def data(y, level):
        return float(model.predict(row([y]), row(level)).x0)

    up = min(0.5, eta * math.sqrt(0.25 * (4 - 0.25) / 4))
    down = math.sqrt(0.25 - up**2)
    middle = math.sqrt(2 * down)
    inner = middle / 2 * x + (1 - middle / 2) * data(x, 2.0)
    mean = down / 2 * x + (1 - down / 2) * data(inner, middle)
    found = DPMSolver2SAncestral(eta).step(
        model, row([x]), row(2.0), row(0.5), generator=GivenNoise(row(0.7))
    )
    assert float(found.mean) == pytest.approx(mean, rel=1e-12)
    assert float(found.x) == pytest.approx(mean + 0.7 * up, rel=1e-12)


def test_2s_ancestral_without_noise_is_2s():
    found, plain = (
        PCSampler(line_mixture(EDMSDE()), p, grid=KarrasGrid(to_zero=True), steps=9)(80 * Z)
        for p in (DPMSolver2SAncestral(0.0), DPMSolver2S())
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_2s_ancestral_is_of_weak_order_two(sde, eta):
    if isinstance(sde, DDPMChain):
        pytest.skip("its log-SNR has a corner at every step of the chain")
    errors = []
    for steps in (64, 128):
        times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1, dtype=torch.float64))
        errors.append(moments_error(sde, DPMSolver2SAncestral(eta), times))
    assert errors[1] < 1e-2
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


def test_2s_ancestral_is_never_evaluated_below_its_end():
    """VE has no smaller noise than at its last time."""
    sde, levels = VESDE(), []
    model = line_mixture(sde)
    predict = model.predict

    def watch(x, t):
        levels.append(float(sde.marginal(t.double())[1].min()))
        return predict(x, t)

    model.predict = watch
    grid = LogSNRGrid(t_end=0.0)
    sampler = PCSampler(model, DPMSolver2SAncestral(), grid=grid, steps=5, denoise=False)
    assert bool(sampler((4, 1), generator=seeded()).isfinite().all())
    assert len(levels) == 10
    assert min(levels) >= float(sde.marginal(full(0.0, 1))[1]) * (1 - 1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DPMSolver3MSDE(-1.0), ValueError, "eta: expected a finite number >= 0, got -1"),
        (lambda: DPMSolver3MSDE(form="x"), ValueError, "form: expected one of 'exact', 'publ"),
        (lambda: DPMSolver2SAncestral(1.5), ValueError, r"eta: expected a number in \[0, 1\]"),
        (lambda: DPMSolver2S(0.0), ValueError, r"r: expected a number in \(0, 1\], got 0.0"),
        (lambda: DPMSolver2S(1.5), ValueError, r"r: expected a number in \(0, 1\], got 1.5"),
        (lambda: DPMSolver2S(solver="euler"), ValueError, "solver: expected one of 'midpoint', 'h"),
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
