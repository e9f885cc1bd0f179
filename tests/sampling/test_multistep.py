"""Multistep solvers, on data whose probability flow is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.flow_values import AT_SIGMA_MIN, AT_ZERO, Z, line_mixture, rms

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    ForwardSDE,
    GaussianMixtureModel,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    SubVPSDE,
    UniformGrid,
)
from diffusionkit.sampling.adams import DEIS, IPNDM, LMS, VelocityAdams
from diffusionkit.sampling.dpm_solver import DPMSolver2M, DPMSolver2MSDE, DPMSolver3M
from diffusionkit.sampling.unipc import UniPC

# Root mean square errors of an independent solver: after N steps at .002 on a Karras grid, at 0
# after N - 1 steps of it and one, and at .002 on a grid uniform in log(sigma).
ERRORS = {
    ("2m", 8): (0.19359490783053915, 0.2216571863391684, 0.09373507654347772),
    ("2m", 64): (0.0024505241320425942, 0.0025157473212403373, 0.0011883245215490688),
    ("3m", 8): (0.19649015438670972, 0.43015313120620124, 0.06325308332435518),
    ("3m", 64): (0.0013483451880381583, 0.0014108141653533062, 0.0011360533696797338),
    ("3m published", 8): (0.17812807990422877, 0.383837208249828, 0.08515195071650662),
    ("3m published", 64): (0.0015620238261798178, 0.0016186278166838673, 0.001210934908281227),
}
SOLVERS = {
    "2m": DPMSolver2M(),
    "3m": DPMSolver3M(),
    "3m published": DPMSolver3M("published"),
    "2m sde": DPMSolver2MSDE(0.0, "heun"),
    "unipc 2": UniPC(),
    "unipc 2 B1": UniPC(variant="B1"),
    "unipc 3": UniPC(3),
    "deis 2": DEIS(2),
    "deis 3": DEIS(),
    "deis 4": DEIS(4),
    "deis time": DEIS(4, "time"),
    "lms 3": LMS(3),
    "lms 4": LMS(),
    "ipndm": IPNDM(3),
    "velocity 2": VelocityAdams(2),
    "velocity 3": VelocityAdams(),
    "velocity 2 corrected": VelocityAdams(2, corrected=True),
    "velocity 3 corrected": VelocityAdams(corrected=True),
}


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


def run(predictor, grid, steps=None, sde=None, start=80 * Z, model=None):
    """Return the states after a run without denoising, and the number of evaluations."""
    model = model or line_mixture(sde or EDMSDE())
    sampler = PCSampler(model, predictor, grid=grid, steps=steps or 1, denoise=False)
    return sampler(start).squeeze(1), sampler.nfe


def levels(steps, sde=None):
    """Return times equally spaced in log(sigma / alpha), from 80 to .002."""
    l = torch.linspace(-math.log(80), -math.log(0.002), steps + 1, dtype=torch.float64)
    return (sde or EDMSDE()).time_at_log_snr(2 * l)


@pytest.mark.parametrize(("name", "steps"), ERRORS)
def test_errors_equal_those_of_an_independent_solver(name, steps):
    grids = (KarrasGrid(), KarrasGrid(to_zero=True), LogSNRGrid())
    ends = (AT_SIGMA_MIN, AT_ZERO, AT_SIGMA_MIN)
    found = [rms(run(SOLVERS[name], g, steps)[0], e) for g, e in zip(grids, ends, strict=True)]
    assert found == pytest.approx(ERRORS[name, steps], rel=1e-10)


# Results of released codes for the first three states in 12 steps: UniPC's for VP on a grid uniform
# in log-SNR to t = .01, k-diffusion's LMS on EDM's grid.
@pytest.mark.parametrize(
    ("predictor", "expected"),
    [
        (UniPC(2, "B1"), [-1.3191833739964482, -1.0106792230297812, -0.20612116126696145]),
        (UniPC(3, "B1"), [-1.2886663208316844, -0.9446391630503773, -0.16325545729021163]),
        (UniPC(2, "B2"), [-1.303970314230662, -0.9959528137716116, -0.10876384341672023]),
        (UniPC(3, "B2"), [-1.2886628610245545, -0.944636203106326, -0.16322821596477854]),
        (LMS(4), [-1.2398608810560825, -0.9482218111769339, -0.011962892827668195]),
    ],
)
def test_states_equal_those_of_released_codes(predictor, expected):
    if isinstance(predictor, LMS):
        x, nfe = run(predictor, KarrasGrid(), 12)
    else:
        sde = VPSDE()
        start = Z * sde.marginal(torch.ones(1, dtype=torch.float64))[1]
        x, nfe = run(predictor, LogSNRGrid(t_end=0.01), 12, sde, start)
    assert x[:3].tolist() == pytest.approx(expected, abs=1e-12)
    assert nfe == 12


# UniPC's corrector adds one to its order. The fourth order shows until the errors of the first
# steps dominate, which are of lower order and small near T.
@pytest.mark.parametrize(
    ("name", "steps", "order"),
    [
        ("2m", 160, 2),
        ("2m sde", 160, 2),
        ("3m", 160, 3),
        ("3m published", 320, 2),
        ("unipc 2", 160, 3),
        ("unipc 2 B1", 160, 3),
        ("unipc 3", 320, 4),
        ("deis 2", 160, 2),
        ("deis 3", 160, 3),
        ("deis 4", 80, 4),
        ("lms 3", 160, 3),
        ("lms 4", 80, 4),
        ("ipndm", 320, 2),
        ("velocity 2", 160, 2),
        ("velocity 3", 160, 3),
        ("velocity 2 corrected", 1280, 2),
        ("velocity 3 corrected", 1280, 3),
    ],
)
def test_order_of_convergence(name, steps, order):
    coarse, fine = (rms(run(SOLVERS[name], levels(n))[0], AT_SIGMA_MIN) for n in (steps, 2 * steps))
    assert fine < 2e-4
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_order_of_polynomials_in_the_time_of_a_process(order):
    """To the same noise level, in the time of VP."""
    sde, errors = VPSDE(), []
    for steps in (320, 640):
        times = levels(steps, sde)
        alpha, sigma = sde.marginal(times[[0, -1]])
        x, _ = run(DEIS(order, "time"), times, sde=sde, start=Z * sigma[0])
        errors.append(rms(x / alpha[1], AT_SIGMA_MIN))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    "sde", [VPSDE(), SubVPSDE(), VESDE(sigma_min=0.002, sigma_max=80.0)], ids=["vp", "subvp", "ve"]
)
@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "deis time"])
def test_solvers_do_not_depend_on_the_process(sde, name):
    """In x / alpha and sigma / alpha, each process is EDM's."""
    times = levels(10, sde)
    alpha, sigma = sde.marginal(times[[0, -1]])
    x, _ = run(SOLVERS[name], times, sde=sde, start=Z * sigma[0])
    torch.testing.assert_close(
        x / alpha[1], run(SOLVERS[name], levels(10))[0], rtol=1e-6, atol=1e-8
    )


def test_two_predictions_have_order_two_on_every_process(sde):
    """N(0, .5^2), whose flow is known: errors of .0137, .00092 and .000058 in 16 to 256 steps.

    A published exponential Adams-Bashforth rule with sigma_t in the place of sigma_s has .106,
    and .0055 in the end: order 1.
    """
    model = GaussianMixtureModel(sde, [[0.0]], [0.5])
    errors = []
    for steps in (16, 64, 256):
        grid = sde.time_at_log_snr(torch.linspace(-6.0, 6.0, steps + 1, dtype=torch.float64))
        alpha, sigma = sde.marginal(grid[[0, -1]])
        stds = (0.25 * alpha**2 + sigma**2).sqrt()
        x = PCSampler(model, DEIS(order=2), grid=grid, denoise=False)(stds[:1].view(1, 1))
        errors.append(abs(float(x / stds[1]) - 1))
    assert errors == pytest.approx([0.0137, 0.00092, 0.000058], rel=0.01)


def test_tab_is_lms_where_time_is_the_noise_level():
    tab, lms = (run(p, KarrasGrid(), 9)[0] for p in (DEIS(4, "time"), LMS(4)))
    torch.testing.assert_close(tab, lms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_weights_of_equal_steps_are_exact_on_equal_steps(order):
    times = torch.linspace(80.0, 0.002, 10, dtype=torch.float64)
    ipndm, lms = (run(p, times)[0] for p in (IPNDM(order), LMS(order)))
    torch.testing.assert_close(ipndm, lms, rtol=1e-9, atol=1e-9)


def test_ipndm_is_the_published_loop():
    """Crowson's and diffusers' form, x + (s - t) d with d of constant weights, in sigma."""
    model, x, past = line_mixture(EDMSDE()), 80 * Z, []
    times = KarrasGrid()(EDMSDE(), 7)
    for t, s in itertools.pairwise(times):
        past = [(x - model.predict(x, t.expand(len(x))).x0) / t, *past][:4]
        weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12],
                   4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}[len(past)]  # fmt: skip
        x = x + (s - t) * sum(w * d for w, d in zip(weights, past, strict=True))
    torch.testing.assert_close(run(IPNDM(4), times)[0], x.squeeze(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", [EDMSDE(), VPSDE(), SubVPSDE()], ids=["edm", "vp", "subvp"])
def test_velocity_adams_is_the_rule_in_u(sde):
    """x / (alpha + sigma) with polynomials of u = sigma / (alpha + sigma), by numpy."""
    model, past = line_mixture(sde), []
    times = LogSNRGrid()(sde, 7)
    (alpha, sigma) = sde.marginal(times)
    x = start = sigma[0] * Z
    u, scale = (sigma / (alpha + sigma)).tolist(), alpha + sigma
    for k in range(7):
        prediction = model.predict(x, times[k].expand(len(x)))
        past = [(u[k], prediction.eps - prediction.x0), *past][:3]
        change = 0.0
        for j, (node, velocity) in enumerate(past):
            others = [other for i, (other, _) in enumerate(past) if i != j]
            basis = np.atleast_1d(np.poly(others)) / np.prod([node - other for other in others])
            area = np.polyval(np.polyint(basis), [u[k], u[k + 1]])
            change = change + float(area[1] - area[0]) * velocity
        x = scale[k + 1] * (x / scale[k] + change)
    found = run(VelocityAdams(3), times, sde=sde, start=start)[0]
    torch.testing.assert_close(found, x.squeeze(1), rtol=1e-7, atol=1e-8)


def area(past, nodes, ends):
    """Return the integral of the polynomial through values at nodes, by numpy's polynomials."""
    total = 0.0
    for node in nodes:
        others = [other for other in nodes if other != node]
        basis = np.atleast_1d(np.poly(others)) / np.prod([node - other for other in others])
        between = np.polyval(np.polyint(basis), ends)
        total = total + float(between[1] - between[0]) * past[node]
    return total


@pytest.mark.parametrize("sde", [EDMSDE(), VPSDE()], ids=["edm", "vp"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_corrected_velocity_takes_each_step_again(sde, order):
    """Adams-Moulton's rule of the same order, with the data predicted where the first try ended."""
    model = line_mixture(sde)
    times = LogSNRGrid(to_zero=True, t_end=sde.T / 100)(sde, 7)
    alpha, sigma = sde.marginal(times)
    u, scale = (sigma / (alpha + sigma)).tolist(), alpha + sigma
    x = start = sigma[0] * Z
    past = {}
    for k in range(7):
        x0 = model.predict(x, times[k].expand(len(x))).x0
        new = (x - alpha[k] * x0) / sigma[k] - x0
        past[u[k]] = new
        nodes = u[k::-1][:order]
        if k:  # the step that led here, through the new velocity as well
            ends, without = u[k - 1 : k + 1], u[k - 1 :: -1][:order]
            x = x + scale[k] * (area(past, nodes, ends) - area(past, without, ends))
        # The next step goes on from there with the same data, and remembers the velocity as it was.
        now = (x - alpha[k] * x0) / sigma[k] - x0
        more = area(past, nodes, u[k : k + 2]) - (u[k + 1] - u[k]) * new
        x = scale[k + 1] * (x / scale[k] + (u[k + 1] - u[k]) * now + more)
    found = run(VelocityAdams(order, corrected=True), times, sde=sde, start=start)[0]
    torch.testing.assert_close(found, x.squeeze(1), rtol=1e-7, atol=1e-8)


def test_deis_is_ten_times_as_accurate_as_ddim():
    """In 20 evaluations; DDIM's error is .08."""
    for sde in (EDMSDE(), VPSDE()):
        errors = []
        for predictor in (DDIM(), DEIS(3)):
            times = levels(20, sde)
            alpha, sigma = sde.marginal(times[[0, -1]])
            x, nfe = run(predictor, times, sde=sde, start=Z * sigma[0])
            assert nfe == 20
            errors.append(rms(x / alpha[1], AT_SIGMA_MIN))
        assert errors[0] > 10 * errors[1]


def test_each_sample_has_its_own_times(sde, solver):
    """In a user's loop, where one sample ends without noise."""
    model = line_mixture(sde)
    times = sde.T * torch.tensor(
        [[0.9, 0.7, 0.4, 0.3, 0.0], [0.8, 0.75, 0.5, 0.1, 0.05], [0.5, 0.4, 0.33, 0.2, 0.19]],
        dtype=torch.float64,
    )
    x = start = torch.tensor([[0.4], [-0.9], [1.2]], dtype=torch.float64)
    state = None
    for t, s in itertools.pairwise(times.T):
        step = solver.step(model, x, t, s, state)
        x, state = step.x, step.state
        assert len(state) <= solver.memory
    for i in range(3):
        alone = PCSampler(model, solver, grid=times[i], denoise=False)(start[i : i + 1])
        torch.testing.assert_close(x[i : i + 1], alone, rtol=1e-8, atol=1e-9)


def keeps_its_order(solver):
    """Whether polynomials have a limit where the noise vanishes."""
    return isinstance(solver, (LMS, IPNDM, VelocityAdams))


def test_the_step_to_zero_noise_is_the_predicted_data(solver):
    """With the memory full, in float32."""
    model = line_mixture(EDMSDE())
    sampler = PCSampler(model, solver, grid=KarrasGrid(to_zero=True), steps=8)
    *_, before, _, last = sampler.iterate((80 * Z).float())
    assert before.step == 7
    if not isinstance(solver, UniPC) and not keeps_its_order(solver):  # UniPC corrects first
        x0 = model.predict(before.x, torch.full((8,), before.t)).x0
        torch.testing.assert_close(last.x, x0, rtol=1e-4, atol=1e-5)
    assert last.x.dtype == torch.float32
    double = run(solver, KarrasGrid(to_zero=True), 8)[0]
    torch.testing.assert_close(last.x.squeeze(1).double(), double, rtol=1e-3, atol=1e-3)


def test_lms_to_zero_noise_is_the_released_loop():
    """k-diffusion's: the last of the sigmas is 0, and its step has the order of the others."""
    model, x, past = line_mixture(EDMSDE()), 80 * Z, []
    times = KarrasGrid(to_zero=True)(EDMSDE(), 12)
    for k, (t, s) in enumerate(itertools.pairwise(times.tolist())):
        past = [(x - model.predict(x, torch.full((8,), t, dtype=torch.float64)).x0) / t, *past][:4]
        nodes = times[max(k - 3, 0) : k + 1].flip(0).tolist()
        for j, (node, d) in enumerate(zip(nodes, past, strict=True)):
            others = [other for i, other in enumerate(nodes) if i != j]
            basis = np.atleast_1d(np.poly(others)) / np.prod([node - other for other in others])
            area = np.polyval(np.polyint(basis), [t, s])
            x = x + float(area[1] - area[0]) * d
    found = run(LMS(4), KarrasGrid(to_zero=True), 12)[0]
    torch.testing.assert_close(found, x.squeeze(1), rtol=1e-9, atol=1e-9)


def to_zero(steps, sde):
    """Return times from sigma / alpha = 80 to 0: first of equal ratios, then of equal lengths."""
    w = torch.linspace(math.asinh(160), 0, steps + 1, dtype=torch.float64)[:-1]
    times = sde.time_at_log_snr(-2 * torch.log(0.5 * torch.sinh(w)))
    return torch.cat([times, times.new_zeros(1)])


@pytest.mark.parametrize("sde", [EDMSDE(), VPSDE()], ids=["edm", "vp"])
@pytest.mark.parametrize(
    ("make", "order"),
    [(lambda: LMS(3), 3), (VelocityAdams, 3), (lambda: IPNDM(3), 2)],
    ids=["lms", "velocity", "ipndm"],
)
def test_the_order_holds_to_zero_noise(sde, make, order):
    errors = []
    for steps in (320, 640):
        times = to_zero(steps, sde)
        start = Z * sde.marginal(times[:1])[1]
        errors.append(rms(run(make(), times, sde=sde, start=start)[0], AT_ZERO))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (DPMSolver2M("heun"), 2),
        (DPMSolver3M(solver="midpoint"), 3),
        (DPMSolver3M("published", "midpoint"), 2),
    ],
    ids=str,
)
def test_order_with_either_second_step(solver, order):
    coarse, fine = (rms(run(solver, levels(n))[0], AT_SIGMA_MIN) for n in (640, 1280))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_second_steps_by_hand():
    """After two steps: the midpoint's and the exact integral of the line, in l."""
    model, times = line_mixture(EDMSDE()), levels(10)[4:7]
    l, x = (-torch.log(times)).tolist(), 2 * Z
    first = model.predict(x, times[0].expand(8)).x0
    middle = times[1] / times[0] * x + -math.expm1(l[0] - l[1]) * first
    second = model.predict(middle, times[1].expand(8)).x0
    h, slope = l[2] - l[1], (second - first) / (l[1] - l[0])
    gain = -math.expm1(-h)
    for name, share in (("midpoint", 0.5 * h * gain), ("heun", h - gain)):
        expected = times[2] / times[1] * middle + gain * second + share * slope
        for solver in (DPMSolver2M(name), DPMSolver3M("published", name)):
            found = run(solver, times, start=x)[0]
            torch.testing.assert_close(found, expected.squeeze(1), rtol=1e-9, atol=1e-10)


FINAL = {
    "2m": (DPMSolver2M, {}, DPMSolver2M, {}),
    "3m": (DPMSolver3M, {}, DPMSolver2M, {"solver": "heun"}),
    "deis": (DEIS, {"order": 3}, DEIS, {"order": 2}),
    "lms": (LMS, {"order": 3}, LMS, {"order": 2}),
    "ipndm": (IPNDM, {"order": 3}, IPNDM, {"order": 2}),
    "velocity": (VelocityAdams, {"order": 3}, VelocityAdams, {"order": 2}),
}


@pytest.mark.parametrize("name", FINAL)
@pytest.mark.parametrize("first", [0, 4])
def test_lower_order_in_the_last_steps(name, first):
    """The last step is DDIM's, the one before it that of order 2, also in a run from the middle."""
    kind, settings, second, own = FINAL[name]
    model, times = line_mixture(EDMSDE()), levels(9)
    solver = kind(**settings, lower_order_final=True)
    sampler = PCSampler(model, solver, grid=times, denoise=False)
    x, state = (80 * Z, None) if first == 0 else (Z, None)
    steps = list(itertools.pairwise(times))[first:]
    for k, (t, s) in enumerate(steps):
        left = len(steps) - k
        used = {1: DDIM(), 2: second(**own)}.get(left, kind(**settings))
        given = state[: used.memory] if state and left > 1 else None
        step = used.step(model, x, t.expand(8), s.expand(8), given)
        value = step.state[0] if left > 1 else None
        x, state = step.x, ((value, *(state or ())) if value else None)
        state = state[: kind(**settings).memory] if state else None
    if first == 0:
        found = sampler(80 * Z)
    else:
        with torch.no_grad():
            *_, last = sampler._run(Z, None, {}, first=first)
        found = last.x
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_unipc_lowers_its_order_as_published():
    """Diffusers' rule: p is at most the number of steps left, and corrects with its own p."""
    model, times = line_mixture(EDMSDE()), levels(7)
    x, values, orders = 80 * Z, [], []
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        left = len(times) - 1 - k
        x0 = model.predict(x, t.expand(8)).x0
        if values:  # the correction of the step that led here
            past = [(times[k - 1 - j], v) for j, v in enumerate(values[: orders[-1]])]
            with_new = change(times[k - 1], t, [(t, x0), *past[1:]], past[0][1])
            x = x + with_new - change(times[k - 1], t, past[1:], past[0][1])
        values = [x0, *values][:3]
        orders.append(min(3, left, len(values)))
        past = [(times[k - j], v) for j, v in enumerate(values[: orders[-1]])]
        ratio = s / t
        x = ratio * x + (1 - ratio) * x0 + change(t, s, past[1:], x0)
    found = run(UniPC(3, lower_order_final=True), times)[0]
    torch.testing.assert_close(found, x.squeeze(1), rtol=1e-8, atol=1e-8)


def change(t, s, others, x0):
    """Return what other predictions change in UniPC's step from t, where the data are x0, to s."""
    found = UniPC(3).correction(EDMSDE(), t[None], s[None], [time[None] for time, _ in others])
    return sum((w * (v - x0) for w, (_, v) in zip(found, others, strict=True)), 0.0)


class ZeroSNR(ForwardSDE):
    """A process with no signal at T, where the log-SNR is minus infinity."""

    def marginal(self, t):
        return 1 - t, t

    def time_at_log_snr(self, log_snr):
        return torch.sigmoid(-0.5 * log_snr)


def test_a_run_may_start_without_signal(solver):
    """The flow maps the normal distribution's quantile at -2 to the data's."""
    x, _ = run(solver, UniformGrid(t_end=1e-3), 100, ZeroSNR(), Z)
    assert float(x[0] / 0.999) == pytest.approx(-1.2867335345, abs=0.02)
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("steps", [3, 8])
def test_only_the_prediction_without_signal_is_left_out(solver, steps):
    """After a first step from alpha = 0 a run goes on as one that begins at its end."""
    if isinstance(solver, VelocityAdams) or getattr(solver, "variable", "") == "time":
        pytest.skip("its polynomials pass through the prediction at alpha = 0")
    times = torch.linspace(1.0, 0.1, steps + 1, dtype=torch.float64)
    whole, _ = run(solver, times, sde=ZeroSNR(), start=Z)
    first, _ = run(DDIM(), times[:2], sde=ZeroSNR(), start=Z)
    rest, _ = run(solver, times[1:], sde=ZeroSNR(), start=first.unsqueeze(1))
    torch.testing.assert_close(whole, rest, rtol=1e-10, atol=1e-12)


def test_in_time_only_the_first_step_from_no_signal_is_of_first_order():
    """For a Gaussian, whose flow is linear, what is lost after the first step has order 3."""
    sde = ZeroSNR()
    model = GaussianMixtureModel(sde, [[0.7]], [0.4])

    def flow(t):
        alpha, sigma = sde.marginal(t.view(1))
        return 0.7 * alpha + torch.hypot(0.4 * alpha, sigma) * Z, torch.hypot(0.4 * alpha, sigma)

    def lost(steps):
        times = torch.linspace(1.0, 0.125, steps + 1, dtype=torch.float64)
        (after, std), (end, last) = flow(times[1]), flow(times[-1])
        found, _ = run(DEIS(3, "time"), times, start=Z, model=model)
        first, _ = run(DDIM(), times[:2], start=Z, model=model)
        of_first = (first - after.flatten()) * (last / std)
        return float((found - end.flatten() - of_first).abs().max())

    assert math.log2(lost(28) / lost(56)) == pytest.approx(3.0, abs=0.25)


def test_a_step_without_memory_is_ddims(solver):
    """A run that loses its memory midway equals two runs."""
    times = levels(8)

    class Forgetful(type(solver)):
        def step(self, model, x, t, s, state=None, **kwargs):
            return super().step(
                model, x, t, s, None if float(t[0]) == times[3] else state, **kwargs
            )

    settings = {name: getattr(solver, name) for name in solver.__dataclass_fields__}
    found, _ = run(Forgetful(**settings), times)
    half, _ = run(solver, times[:4])
    rest, _ = run(solver, times[3:], start=half.unsqueeze(1))
    torch.testing.assert_close(found, rest, rtol=1e-12, atol=1e-13)
    t, s = times[2].expand(8), times[3].expand(8)
    model = line_mixture(EDMSDE())
    first, ddim = (p.step(model, Z, t, s).x for p in (solver, DDIM()))
    torch.testing.assert_close(first, ddim, rtol=1e-12, atol=1e-13)


def test_a_grid_of_one_step_raises(solver):
    with pytest.raises(ValueError, match=r"grid: expected at least 2 steps for \w+.*, got 1"):
        PCSampler(line_mixture(EDMSDE()), solver, grid=torch.tensor([1.0, 0.5]))


def test_invalid_times_and_states_raise(solver):
    model, x = line_mixture(EDMSDE()), torch.ones(2, 1)
    t = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"expected s < t, got s = \[0.5, 3.0\]"):
        solver.step(model, x, t, torch.tensor([0.5, 3.0]))
    state = solver.step(model, x, t, t / 2).state
    with pytest.raises(ValueError, match=r"state: expected predictions at times above t"):
        solver.step(model, x, t, t / 2, state)
    solver.prepare(EDMSDE(), [t, t / 2, t / 4])  # does nothing for times that are not a grid's


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: DPMSolver3M("fixed"),
            ValueError,
            "form: expected one of 'exact', 'published', got",
        ),
        (lambda: UniPC(4), ValueError, "order: expected 2 or 3, got 4"),
        (lambda: UniPC(1), ValueError, "order: expected an integer >= 2, got 1"),
        (
            lambda: UniPC(variant="bh1"),
            ValueError,
            "variant: expected one of 'B1', 'B2', got 'bh1'",
        ),
        (lambda: DEIS(5), ValueError, "order: expected 2, 3 or 4, got 5"),
        (
            lambda: DEIS(variable="rho"),
            ValueError,
            "variable: expected one of 'log_snr', 'time', got",
        ),
        (lambda: LMS(1), ValueError, "order: expected an integer >= 2, got 1"),
        (lambda: LMS(2.0), TypeError, "order: expected an integer, got float"),
    ],
)
def test_invalid_settings_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()
