"""SA-Solver: runs by hand, weak and strong orders, and moments of Gaussian data."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from support import f64, full, seeded
from support.flow_values import Z, line_mixture
from support.gaussian_runs import flow_error, moments_error
from support.noise import GivenNoise

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    DPMSolver2MSDE,
    DPMSolver2SAncestral,
    DPMSolver3MSDE,
    FlowMatchingSDE,
    GaussianMixtureModel,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    SASolver,
    SubVPSDE,
    UniformGrid,
    UniPC,
)
from diffusionkit._log_snr import with_signal
from diffusionkit.sampling.brownian import BrownianPath


def rising(log_snr):
    return 1.4 * torch.sigmoid(log_snr)


# --- a run by hand ---------------------------------------------------------------------------


def algorithm(model, times, taus, orders, lines, x, noise, lower=False):
    """The algorithm of the paper: the corrector repeats a step from its beginning, in its noise.

    The integrals are quadratures of polynomials, but for lines: there the change over the step
    has the weight kappa h / 2 where published, and half of the constant's by the midpoint rule.
    """
    sde = model.sde
    l = (0.5 * sde.log_snr(times)).tolist()
    alpha, sigma = (c.tolist() for c in sde.marginal(times))
    data = {}

    def move(k, x, nodes):
        """Take x from time k to k + 1 with the predictions at the nodes."""
        rate, h = 1 + taus[k] ** 2, l[k + 1] - l[k]
        new = sigma[k + 1] / sigma[k] * math.exp(-(taus[k] ** 2) * h) * x
        for j in nodes:
            others = [l[i] for i in nodes if i != j]
            basis = np.atleast_1d(np.poly(others)) / np.prod([l[j] - other for other in others])
            area = quad(
                lambda v, basis=basis: (
                    rate * math.exp(rate * (v - l[k + 1])) * np.polyval(basis, v)
                ),
                l[k], l[k + 1], epsabs=0, epsrel=1e-12,
            )[0]  # fmt: skip
            if lines != "exact" and len(nodes) == 2:
                (other,) = (i for i in nodes if i != j)
                total = -math.expm1(-rate * h)
                share = rate * h if lines == "published" else total
                area = (total if j == k else 0.0) + 0.5 * share * h / (l[j] - l[other])
            new = new + alpha[k + 1] * area * data[j]
        std = sigma[k + 1] * math.sqrt(-math.expm1(-2 * taus[k] ** 2 * h))
        return new + std * noise[k]

    steps, before = len(times) - 1, None
    for k in range(steps):
        data[k] = float(model.predict(x.view(1, 1), times[k : k + 1]).x0)
        if k > 0 and orders[1]:
            used = min(orders[1], steps - k + 2) if lower else orders[1]
            last = list(range(k, max(k - used, -1), -1))
            x = move(k - 1, before, last)
        before = x
        used = min(orders[0], steps - k) if lower else orders[0]
        x = move(k, x, list(range(k, max(k - used, -1), -1)))
    return float(x)


@pytest.mark.parametrize("lines", ["midpoint", "exact", "published"])
@pytest.mark.parametrize("orders", [(1, 2), (2, 0), (2, 2), (3, 0), (3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.8, "interval", rising])
def test_a_run_by_hand(tau, orders, lines):
    sde = VPSDE()
    model, times = line_mixture(sde), f64(0.9, 0.7, 0.6, 0.45, 0.4, 0.2)
    ratio = torch.exp(-0.5 * sde.log_snr(times))
    options = {"lines": lines, "predictor_order": orders[0], "corrector_order": orders[1]}
    if tau == "interval":  # of the five steps, the second to fourth
        options |= {"s_min": float(ratio[3]), "s_max": float(ratio[1])}
        taus, predictor = [0.0, 1.3, 1.3, 1.3, 0.0], SASolver(1.3, **options)
    else:
        taus = tau(sde.log_snr(times)).tolist() if callable(tau) else [tau] * 5
        predictor = SASolver(tau, **options)
    noise = [0.5, -1.0, 0.3, 2.0, -0.6]
    expected = algorithm(model, times, taus, orders, lines, f64(0.3), noise)
    path = GivenNoise(lambda k: full(noise[k - 1], 1), 1)
    sampler = PCSampler(model, predictor, grid=times, denoise=False)
    assert float(sampler(f64([0.3]), generator=path)) == pytest.approx(expected, rel=1e-9)
    assert sampler.nfe == 5


@pytest.mark.parametrize("orders", [(2, 2), (3, 3), (2, 4), (3, 0)], ids=str)
def test_the_last_steps_may_be_of_lower_order(orders):
    model, times = line_mixture(VPSDE()), f64(0.9, 0.7, 0.6, 0.45, 0.4, 0.2)
    noise = [0.5, -1.0, 0.3, 2.0, -0.6]
    expected = algorithm(model, times, [0.8] * 5, orders, "exact", f64(0.3), noise, lower=True)
    path = GivenNoise(lambda k: full(noise[k - 1], 1), 1)
    predictor = SASolver(0.8, *orders, lines="exact", lower_order_final=True)
    sampler = PCSampler(model, predictor, grid=times, denoise=False)
    assert float(sampler(f64([0.3]), generator=path)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("lines", "variant"), [("published", "B1"), ("midpoint", "B2")])
@pytest.mark.parametrize("order", [2, 3])
def test_without_noise_it_is_unipc(order, lines, variant):
    ours, theirs = (
        PCSampler(line_mixture(EDMSDE()), p, grid=KarrasGrid(to_zero=True), steps=9)(80 * Z)
        for p in (SASolver(0.0, order, order + 1, lines=lines), UniPC(order, variant))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_without_a_corrector_it_is_dpm_solver(eta):
    """tau^2 is eta; three predictions are 3M SDE, two are 2M SDE."""
    tau = math.sqrt(eta)
    for ours, other in (
        (SASolver(tau, 3, 0, lines="exact"), DPMSolver3MSDE(eta)),
        (SASolver(tau, 2, 0, lines="exact"), DPMSolver2MSDE(eta, "heun")),
        (SASolver(tau, 2, 0), DPMSolver2MSDE(eta)),
    ):
        x, right = (
            PCSampler(line_mixture(VPSDE()), p, grid=LogSNRGrid(), steps=7)(Z, generator=seeded())
            for p in (ours, other)
        )
        torch.testing.assert_close(x, right, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="at least 2 steps for SASolver, which remembers"):
        PCSampler(line_mixture(VPSDE()), SASolver(), steps=1)
    one, ancestral = (
        PCSampler(line_mixture(VPSDE()), p, grid=UniformGrid(), steps=1)(Z, generator=seeded())
        for p in (SASolver(1.0, 1, 0), Ancestral())
    )
    torch.testing.assert_close(one, ancestral, rtol=1e-6, atol=1e-6)


# --- orders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orders", "expected"), [((2, 0), 2), ((1, 2), 2), ((3, 0), 3), ((3, 3), 3), ((2, 3), 3)]
)
def test_the_strong_order_without_noise(orders, expected):
    """On Gaussian data from the middle, where a first step that is not corrected limits it to 2."""
    coarse, fine = (flow_error(VPSDE(), SASolver(0.0, *orders), n) for n in (160, 320))
    reached = 2 if orders == (3, 0) else expected
    assert math.log2(coarse / fine) > reached - 0.25
    assert fine < 1e-4


SETTINGS = {
    "2 without": SASolver(1.0, 2, 0),
    "2 published": SASolver(1.0, 2, 2, lines="published"),
    "3": SASolver(1.0, 3, 3),
    "3, half": SASolver(0.5, 3, 3),
    "3, interval": SASolver(1.0, 3, 3, s_min=0.2, s_max=5.0),
    "3, function": SASolver(rising, 3, 3),
    "4": SASolver(1.0, 3, 4),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_weak_order_is_two(name):
    errors = []
    for steps in (96, 192):
        times = VPSDE().time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1).double())
        errors.append(moments_error(VPSDE(), SETTINGS[name], times))
    assert errors[1] < 1e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("tau", [0.3, 1.0, 1.5, rising])
def test_the_distribution_does_not_depend_on_the_noise(sde, tau):
    """Gaussian data keep their mean and deviation, on every process."""
    times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, 81, dtype=torch.float64))
    for predictor in (SASolver(tau), SASolver(tau, 3, 3, s_min=0.3, s_max=3.0)):
        assert moments_error(sde, predictor, times) < 6e-3


PREDICTORS = [
    SASolver(), SASolver(0.5, 3, 3), SASolver(rising, 3, 4, s_max=2.0), DPMSolver3MSDE(),
    DPMSolver3MSDE(0.5, "published"), DPMSolver2SAncestral(), DPMSolver2SAncestral(0.5),
]  # fmt: skip
PROCESSES = {
    "VP": VPSDE(), "sub-VP": SubVPSDE(), "VE": VESDE(sigma_max=50.0), "EDM": EDMSDE(),
    "flow": FlowMatchingSDE(), "zero SNR": DDPMChain.linear(1000).zero_terminal_snr(),
}  # fmt: skip


@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
@pytest.mark.parametrize("process", PROCESSES)
def test_runs_from_the_end_and_from_the_middle(process, predictor):
    """Of 60 steps; from alpha = 0 the first is an exact transition of the predicted data."""
    sde = PROCESSES[process]
    last = sde.time_at_log_snr(f64(6.0)).clamp_max(0.3 * sde.T)
    times = LogSNRGrid(t_end=float(last))(sde, 60).double()
    assert moments_error(sde, predictor, times) < 0.04
    assert moments_error(sde, predictor, times[25:]) < 0.04


@pytest.mark.parametrize("predictor", [PREDICTORS[1], DPMSolver3MSDE(), DPMSolver2SAncestral()])
def test_the_strong_order_is_one(predictor):
    sde = VPSDE()
    model = GaussianMixtureModel(sde, [[-0.6, 0.0], [0.8, 0.4]], [0.5, 0.7], [0.3, 0.7])
    start, path = sde.prior_sample((100, 2), generator=seeded()).double(), BrownianPath(range(100))
    grid = LogSNRGrid(t_end=float(sde.time_at_log_snr(f64(4.0))))
    runs = [
        PCSampler(model, predictor, steps=n, grid=grid, denoise=False)(start, generator=path)
        for n in (24, 48, 96)
    ]
    coarse, fine = (float((a - b).square().sum(1).mean().sqrt()) for a, b in pairwise(runs))
    assert fine < 0.1
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.25)


# --- in a sampler ----------------------------------------------------------------------------


def test_a_step_to_zero_is_the_predicted_data():
    model = line_mixture(EDMSDE())
    sampler = PCSampler(model, SASolver(), grid=KarrasGrid(to_zero=True), steps=6)
    *_, before, _, last = sampler.iterate((80 * Z).float(), generator=seeded())
    assert sampler.nfe == 6
    assert last.prediction is not None
    torch.testing.assert_close(last.x, last.prediction.x0, rtol=1e-5, atol=1e-6)
    assert last.x.dtype == torch.float32
    assert before.t > 0


def test_changes_of_the_state_between_steps_are_kept():
    """Such as those of a constraint or a corrector."""
    model, state = GaussianMixtureModel(VPSDE(), [[0.0]], [1e-9]), None  # predicts 0
    times, x = f64(0.9, 0.6, 0.4, 0.3), f64([0.3])
    predictor, zero = SASolver(0.7, 3, 3), GivenNoise(full(0.0, 1))
    for t, s in pairwise(times[:3]):
        step = predictor.step(model, x, t[None], s[None], state, generator=zero)
        x, state = step.x, step.state
    moved = [
        predictor.step(model, y, times[2:3], times[3:], state, generator=zero).x for y in (x, x + 1)
    ]
    h = 0.5 * float(VPSDE().log_snr(times[3:]) - VPSDE().log_snr(times[2:3]))
    sigma = VPSDE().marginal(times)[1]
    kept = float(sigma[3] / sigma[2]) * math.exp(-0.49 * h)
    assert float(moved[1] - moved[0]) == pytest.approx(kept, rel=1e-6)


def test_samples_do_not_depend_on_their_batch():
    def generators(*seeds):
        return [seeded(seed) for seed in seeds]

    model, predictor = line_mixture(VPSDE()), SASolver(rising, 3, 3, s_min=0.1)
    sampler = PCSampler(model, predictor, grid=LogSNRGrid(), steps=8)
    x = sampler((3, 1), generator=generators(0, 1, 2))
    assert torch.equal(x, sampler((3, 1), generator=generators(0, 1, 2)))
    assert torch.equal(x[1:2], sampler((1, 1), generator=generators(1)))


def test_each_sample_has_its_own_times(sde):
    """In a user's loop, with noise by a function of each sample's log-SNR."""
    model, predictor = line_mixture(sde), SASolver(rising, 3, 3, s_min=0.05)
    times = sde.T * f64([0.9, 0.7, 0.4, 0.3], [0.8, 0.75, 0.5, 0.1], [0.5, 0.4, 0.33, 0.2]).T
    x, state = f64([0.4], [-0.9], [1.2]), None
    for t, s in pairwise(times):
        step = predictor.step(model, x, t, s, state, generator=GivenNoise(f64(0.5, -1.0, 0.2)))
        x, state = step.x, step.state
    for i, (start, z) in enumerate(((0.4, 0.5), (-0.9, -1.0), (1.2, 0.2))):
        alone = PCSampler(model, predictor, grid=times[:, i], denoise=False)
        found = alone(f64([start]), generator=GivenNoise(full(z, 1)))
        torch.testing.assert_close(x[i : i + 1], found, rtol=1e-9, atol=1e-9)


def test_functions_get_log_snrs_and_no_infinity():
    seen = []

    def tau(log_snr):
        seen.append(log_snr)
        return torch.ones_like(log_snr)

    sampler = PCSampler(line_mixture(FlowMatchingSDE()), SASolver(tau), steps=5)
    x = sampler((4, 1), generator=seeded())
    plain = PCSampler(sampler.model, SASolver(1.0), steps=5)((4, 1), generator=seeded())
    torch.testing.assert_close(x, plain, rtol=1e-6, atol=1e-6)
    assert all(bool(values.isfinite().all()) and values.ndim == 1 for values in seen)
    expected = with_signal(FlowMatchingSDE().log_snr(sampler.times.double()[:-1]))
    found = {round(value, 5) for values in seen for value in values.tolist()}
    assert {round(value, 5) for value in expected.tolist()} <= found


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SASolver(-1.0), ValueError, "tau: expected a finite number >= 0, got -1.0"),
        (lambda: SASolver("1"), TypeError, "tau: expected a number, got str"),
        (lambda: SASolver(1.0, 4), ValueError, "predictor_order: expected 1, 2 or 3, got 4"),
        (lambda: SASolver(1.0, 2, 1), ValueError, "corrector_order: expected 0, 2, 3 or 4, got 1"),
        (lambda: SASolver(s_min=2.0, s_max=1.0), ValueError, "expected 0 <= s_min <= s_max"),
        (lambda: SASolver(lines="B1"), ValueError, "lines: expected one of 'midpoint', 'ex"),
        (
            lambda: run(lambda l: 1.0),
            ValueError,
            r"tau: expected a tensor of shape \(\d,\), got",
        ),
        (lambda: run(lambda l: l[:0]), ValueError, r"of shape \(\d,\), got shape \(0,\)"),
        (lambda: run(lambda l: -torch.ones_like(l)), ValueError, "tau: expected finite values >= "),
    ],
)
def test_invalid_settings_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def run(tau):
    return PCSampler(line_mixture(VPSDE()), SASolver(tau), steps=3)
