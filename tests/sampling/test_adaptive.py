"""The adaptive solver: a step computed by hand, and errors proportional to the tolerance."""

import math
from itertools import pairwise

import pytest
import torch
from support import full, seeded

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    AnnealedLangevin,
    EpsModel,
    GaussianMixtureModel,
    KarrasGrid,
    PCSampler,
    SubVPSDE,
    UniformGrid,
    X0Model,
)
from diffusionkit.sampling.adaptive import AdaptiveSDE
from diffusionkit.sampling.brownian import BrownianPath
from diffusionkit.sampling.stochastic_heun import StochasticHeun

SDES = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(sigma_max=20.0)}
MEAN, STD = 0.7, 0.4


@pytest.fixture(params=SDES)
def process(request):
    return SDES[request.param]


def mixture(sde):
    return GaussianMixtureModel(sde, [[-0.6, 0.0], [0.8, 0.4]], [0.5, 0.7], [0.3, 0.7])


def counting(model):
    """Return a list to which the times of the model's evaluations are appended."""
    times, predict = [], model.predict

    def watch(x, t, **cond):
        times.append(t.tolist())
        return predict(x, t, **cond)

    model.predict = watch
    return times


# --- one step by hand: VP from .5 to .4, predicted noise .2 x -----------------------------------

T, S, X = 0.5, 0.4, (0.8, -1.1)
BETA = {0.5: 0.1 + 19.9 * 0.5, 0.4: 0.1 + 19.9 * 0.4}
SIGMA = {v: math.sqrt(-math.expm1(-(0.1 * v + 19.9 * v**2 / 2))) for v in (0.5, 0.4)}


def proposals(x, z):
    """Return x', x'' and x'' without noise: d = -beta (x / 2 + score), score = -.2 x / sigma."""

    def d(x, t):
        return -0.5 * BETA[t] * x + BETA[t] * 0.2 * x / SIGMA[t]

    g, g_s = math.sqrt(BETA[T] * 0.1), math.sqrt(BETA[S] * 0.1)
    first = x - 0.1 * d(x, T) + g * z
    other = x - 0.1 * d(first, S) + g_s * z
    last = 0.5 * (first + other)
    return first, last, last - 0.5 * (g + g_s) * z


def by_hand(rtol, atol):
    path, model = BrownianPath([0]), EpsModel(lambda x, noise_label: 0.2 * x, VPSDE())
    x = torch.tensor([X], dtype=torch.float64)
    z = path.increment(x, VPSDE(), full(T, 1), full(S, 1))
    first, last, mean = proposals(x, z)
    size = (rtol * torch.maximum(x.abs(), first.abs())).clamp_min(atol)
    error = float(((first - last) / size).square().mean().sqrt())
    evaluated = counting(model)
    step = AdaptiveSDE(rtol, atol).step(
        model, x, full(T, 1), full(S, 1), full(1.0, 1), generator=path
    )
    return step, last, mean, error, evaluated


def test_an_accepted_step_is_the_mean_of_the_proposals():
    step, last, mean, error, evaluated = by_hand(1.0, 1.0)
    assert error < 1
    assert evaluated == [[T], [S]]
    torch.testing.assert_close(step.x, last, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(step.mean, mean, rtol=1e-10, atol=1e-10)
    # A step that the end cut short does not shorten the next one.
    assert float(step.state) == pytest.approx(max(1.0, 0.1 * min(5, 0.9 * error ** (-2 / 3))))


@pytest.mark.parametrize("kind", ["rtol", "atol"])
def test_the_tolerance_accepts_or_rejects_a_step(kind):
    """Just above the error of the proposals it is accepted, just below rejected."""

    def settings(tolerance):
        return (tolerance, 1e-12) if kind == "rtol" else (1e-12, tolerance)

    needed = by_hand(*settings(1.0))[3]
    assert len(by_hand(*settings(needed * 1.001))[4]) == 2
    *_, error, evaluated = by_hand(*settings(needed * 0.999))
    assert error == pytest.approx(1 / 0.999)
    assert evaluated[2] == [T]
    # h becomes .9 h E^(-2/3)
    assert evaluated[3][0] == pytest.approx(T - 0.1 * 0.9 * error ** (-2 / 3), rel=1e-12)


def test_step_lengths_grow_and_shrink_within_bounds():
    """The first step is T / 100; the next is at most five times, at least a tenth as long."""
    model = EpsModel(lambda x, noise_label: 0.2 * x, VPSDE())
    evaluated = counting(model)
    x = torch.tensor([X], dtype=torch.float64)
    AdaptiveSDE(10.0, 10.0).step(model, x, full(T, 1), full(S, 1), generator=BrownianPath([0]))
    assert [round(t[0], 9) for t in evaluated] == [0.5, 0.49, 0.49, 0.44, 0.44, 0.4]
    del evaluated[:]
    tight = AdaptiveSDE(1e-9, 1e-9, max_steps=1)
    with pytest.raises(ValueError, match=r"got 1, which reach t = 0\.5; raise"):
        tight.step(model, x, full(T, 1), full(S, 1), generator=BrownianPath([0]))
    with pytest.raises(ValueError, match="got 2, which reach"):
        AdaptiveSDE(1e-6, 1e-6, max_steps=2).step(
            model, x, full(T, 1), full(S, 1), full(0.05, 1), generator=BrownianPath([0])
        )
    assert evaluated[-1][0] == pytest.approx(0.5 - 0.005)
    model = X0Model(lambda x, noise_label: 0.5 * x, EDMSDE())
    evaluated = counting(model)
    AdaptiveSDE(1e3, 1e3).step(model, x, full(80.0, 1), full(70.0, 1), generator=BrownianPath([0]))
    assert evaluated[1] == [pytest.approx(79.2)]


# --- errors ----------------------------------------------------------------------------------


def end_of(sde):
    return float(sde.time_at_log_snr(full(4.0, 1)))


def strong_errors(sde, tolerances, n, fine):
    """Return root mean square distances from a fine run on the same path, and evaluations."""
    model, path, end = mixture(sde), BrownianPath(range(n)), end_of(sde)
    start = sde.prior_sample((n, 2), generator=seeded()).double()
    times = sde.time_at_log_snr(
        torch.linspace(float(sde.log_snr(full(sde.T, 1))), 4.0, fine + 1, dtype=torch.float64)
    )
    times[0], times[-1] = sde.T, end
    best = PCSampler(model, StochasticHeun(), grid=times, denoise=False)(start, generator=path)
    errors, counts = [], []
    for tolerance in tolerances:
        sampler = PCSampler(
            model, AdaptiveSDE(tolerance, tolerance), steps=1, grid=UniformGrid(t_end=end),
            denoise=False,
        )  # fmt: skip
        x = sampler(start, generator=path)
        errors.append(float((x - best).square().sum(1).mean().sqrt()))
        counts.append(sampler.nfe)
    return errors, counts


def test_the_error_decreases_with_the_tolerance(process):
    """As its power 2/3; the evaluations grow at the same rate."""
    errors, counts = strong_errors(process, (0.3, 0.03), 30, 384)
    assert errors[1] < 0.1
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2 / 3, abs=0.2)
    assert math.log10(counts[1] / counts[0]) == pytest.approx(2 / 3, abs=0.2)


@pytest.mark.slow
def test_the_error_decreases_with_the_tolerance_over_three_decades(process):
    errors, counts = strong_errors(process, (0.3, 0.03, 0.003, 0.0003), 60, 8192)
    for a, b in pairwise(errors):
        assert math.log10(a / b) == pytest.approx(2 / 3, abs=0.2)
    for a, b in pairwise(counts):
        assert math.log10(b / a) == pytest.approx(2 / 3, abs=0.2)


def test_samples_have_the_distribution_of_the_data(process):
    """Gaussian data, 3200 numbers: within 4 standard errors and the solver's error of 3%."""
    model = GaussianMixtureModel(process, [[MEAN] * 16], [STD])
    sampler = PCSampler(model, AdaptiveSDE(0.05, 0.05), steps=1)
    x = sampler((200, 16), generator=seeded(), dtype=torch.float64)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(x.std()) == pytest.approx(STD, rel=0.08)


# --- samples, times and generators -----------------------------------------------------------


def test_a_sample_depends_on_its_own_generator_only():
    sampler = PCSampler(mixture(VPSDE()), AdaptiveSDE(0.1, 0.1), steps=2)
    together = sampler((3, 2), generator=[seeded(i) for i in range(3)], dtype=torch.float64)
    for i in range(3):
        alone = sampler((1, 2), generator=[seeded(i)], dtype=torch.float64)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    one = [sampler((3, 2), generator=seeded(4)) for _ in range(2)]
    assert torch.equal(*one)
    assert not torch.equal(one[0], sampler((3, 2), generator=seeded(5)))
    assert torch.isfinite(sampler((3, 2))).all()  # torch's global state


def test_each_sample_has_its_own_times():
    """The last one starts below t_stop, ends without noise, and steps directly to the data."""
    sde = VPSDE()
    model, path = mixture(sde), BrownianPath(range(3))
    t = torch.tensor([0.9, 0.5, 0.5 * sde.t_stop], dtype=torch.float64)
    s = torch.tensor([0.4, 0.0, 0.0], dtype=torch.float64)
    x = torch.tensor([[0.4, 0.1], [-0.9, 0.2], [1.2, 0.0]], dtype=torch.float64)
    step = AdaptiveSDE(0.1, 0.1).step(model, x, t, s, generator=path)
    for i in range(3):
        row = slice(i, i + 1)
        alone = AdaptiveSDE(0.1, 0.1).step(model, x[row], t[row], s[row], generator=path[row])
        for name in ("x", "mean", "state"):
            ours, other = getattr(step, name)[row], getattr(alone, name)
            torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)
    data = model.predict(x, t).x0
    torch.testing.assert_close(step.x[2], data[2], rtol=1e-12, atol=0)
    assert torch.equal(step.mean[1:], step.x[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_to_time_zero_steps_from_t_stop_to_the_predicted_data(dtype):
    sde = VPSDE()
    model = mixture(sde)
    found = []
    for grid in (torch.tensor([1.0, sde.t_stop]), torch.tensor([1.0, 0.0])):
        sampler = PCSampler(model, AdaptiveSDE(0.1, 0.1), grid=grid.double())
        found.append((sampler((5, 2), generator=seeded(), dtype=dtype), sampler.nfe))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][0].dtype == dtype
    assert found[0][1] == found[1][1]
    assert found[0][1] % 2 == 1


def test_the_last_step_scales_the_predicted_data_by_alpha():
    """From a float32 time that rounds t_stop up."""

    class Doubled(VPSDE):
        t_stop = 1e-3

        def marginal(self, t):
            alpha, sigma = super().marginal(t)
            return 2 * alpha, 2 * sigma

    t = torch.tensor([1e-3])
    assert float(t) > 1e-3
    model, x = X0Model(lambda x, noise_label: 0.5 * x, Doubled()), torch.tensor([[0.6]])
    step = AdaptiveSDE().step(model, x, t, torch.zeros(1), generator=seeded())
    assert float(step.x) == pytest.approx(0.6, rel=1e-6)


def test_it_runs_with_correctors_and_on_other_grids():
    model = GaussianMixtureModel(EDMSDE(), [[MEAN]], [STD])
    sampler = PCSampler(
        model, AdaptiveSDE(0.1, 0.1), AnnealedLangevin(), grid=KarrasGrid(to_zero=True), steps=12
    )
    x = sampler((500, 1), generator=seeded())
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.1)
    assert float(x.std()) == pytest.approx(STD, rel=0.2)
    assert sampler.nfe > 36


def test_scalar_states():
    model = X0Model(lambda x, noise_label: 0.5 * x, EDMSDE())
    step = AdaptiveSDE(0.1, 0.1).step(
        model, torch.ones(3), full(2.0, 3), full(1.0, 3), generator=seeded()
    )
    assert step.x.shape == (3,)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": 0.0}, ValueError, "rtol: expected a finite number > 0, got 0.0"),
        ({"rtol": math.nan}, ValueError, "rtol: expected a finite number > 0, got nan"),
        ({"atol": -1.0}, ValueError, "atol: expected a finite number > 0, got -1.0"),
        ({"atol": "1"}, TypeError, "atol: expected a number, got str"),
        ({"max_steps": 0}, ValueError, "max_steps: expected an integer >= 1, got 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps: expected an integer, got float"),
    ],
)
def test_invalid_settings_raise(options, error, message):
    with pytest.raises(error, match=message):
        AdaptiveSDE(**options)


def test_failed_steps_raise():
    x, t = torch.ones(2, 1), torch.tensor([0.5, 0.75])
    model = EpsModel(lambda x, noise_label: x * math.nan, VPSDE())
    with pytest.raises(ValueError, match=r"finite predictions, got NaN.* in a step from t = 0.5"):
        AdaptiveSDE().step(model, x, t, 0.5 * t)
    with pytest.raises(ValueError, match=r"expected s < t, got s = \[0.5, 0.75\]"):
        AdaptiveSDE().step(model, x, t, t)
    slow = PCSampler(mixture(VPSDE()), AdaptiveSDE(1e-3, 1e-3, max_steps=20), steps=1)
    with pytest.raises(ValueError, match=r"reach s, got 20, which reach t = 0\..*; raise rtol"):
        slow((2, 2), generator=seeded())


@pytest.mark.parametrize("process", [*SDES, "edm"], indirect=False)
@pytest.mark.parametrize("short", [1e-3, 1e-6, 1e-9, 1e-12])
def test_no_step_is_left_that_is_too_short_for_the_noise(process, short):
    """A step that ends just before the end is stretched to it."""
    sde = EDMSDE() if process == "edm" else SDES[process]
    t, s = (torch.tensor([c * sde.T], dtype=torch.float64) for c in (0.5, 0.49))
    model = mixture(sde)
    times = counting(model)
    generator = torch.Generator().manual_seed(0)
    solver = AdaptiveSDE(rtol=10.0, atol=10.0)  # every step is accepted
    solver.step(model, torch.zeros(1, 2), t, s, (t - s) * (1 - short), generator=generator)
    assert times == [[t.item()], [s.item()]]
