"""The adaptive solver: its step by hand, and errors that follow the tolerance."""

import math
from itertools import pairwise

import pytest
import torch

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


def full(value, n):
    return torch.full((n,), value, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(sde):
    return GaussianMixtureModel(sde, [[-0.6, 0.0], [0.8, 0.4]], [0.5, 0.7], [0.3, 0.7])


def counting(model):
    """The times the model is asked at, in a list that grows."""
    asked, predict = [], model.predict

    def watch(x, t, **cond):
        asked.append(t.tolist())
        return predict(x, t, **cond)

    model.predict = watch
    return asked


# --- one step by hand: VP from .5 to .4, the model's noise is .2 x -----------------------------

T, S, X = 0.5, 0.4, (0.8, -1.1)
BETA = {0.5: 0.1 + 19.9 * 0.5, 0.4: 0.1 + 19.9 * 0.4}
SIGMA = {v: math.sqrt(-math.expm1(-(0.1 * v + 19.9 * v**2 / 2))) for v in (0.5, 0.4)}


def proposals(x, z):
    """x', x'' and x'' without noise: d = -beta (x / 2 + score), score = -.2 x / sigma."""

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
    asked = counting(model)
    step = AdaptiveSDE(rtol, atol).step(
        model, x, full(T, 1), full(S, 1), full(1.0, 1), generator=path
    )
    return step, last, mean, error, asked


def test_a_step_that_is_accepted():
    step, last, mean, error, asked = by_hand(1.0, 1.0)
    assert error < 1
    assert asked == [[T], [S]]
    torch.testing.assert_close(step.x, last, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(step.mean, mean, rtol=1e-10, atol=1e-10)
    # What the end cut short is no reason for shorter steps.
    assert float(step.state) == pytest.approx(max(1.0, 0.1 * min(5, 0.9 * error ** (-2 / 3))))


@pytest.mark.parametrize("kind", ["rtol", "atol"])
def test_the_tolerance_decides(kind):
    """Just above the error of the proposals, two evaluations; just below, a shorter step."""

    def settings(tolerance):
        return (tolerance, 1e-12) if kind == "rtol" else (1e-12, tolerance)

    needed = by_hand(*settings(1.0))[3]
    assert len(by_hand(*settings(needed * 1.001))[4]) == 2
    *_, error, asked = by_hand(*settings(needed * 0.999))
    assert error == pytest.approx(1 / 0.999)
    assert asked[2] == [T]
    # h becomes .9 h E^(-2/3)
    assert asked[3][0] == pytest.approx(T - 0.1 * 0.9 * error ** (-2 / 3), rel=1e-12)


def test_the_next_step_is_of_the_length_the_last_one_asks_for():
    """A step within the move, accepted: 1 / 100 of T, then five times that at the most."""
    model = EpsModel(lambda x, noise_label: 0.2 * x, VPSDE())
    asked = counting(model)
    x = torch.tensor([X], dtype=torch.float64)
    AdaptiveSDE(10.0, 10.0).step(model, x, full(T, 1), full(S, 1), generator=BrownianPath([0]))
    assert [round(t[0], 9) for t in asked] == [0.5, 0.49, 0.49, 0.44, 0.44, 0.4]
    del asked[:]
    tight = AdaptiveSDE(1e-9, 1e-9, max_steps=1)
    with pytest.raises(ValueError, match=r"max_steps = 1, got to t = 0\.5;"):
        tight.step(model, x, full(T, 1), full(S, 1), generator=BrownianPath([0]))
    with pytest.raises(ValueError, match="max_steps = 2"):
        AdaptiveSDE(1e-6, 1e-6, max_steps=2).step(
            model, x, full(T, 1), full(S, 1), full(0.05, 1), generator=BrownianPath([0])
        )
    assert asked[-1][0] == pytest.approx(0.5 - 0.005)  # a tenth of it at the least
    model = X0Model(lambda x, noise_label: 0.5 * x, EDMSDE())
    asked = counting(model)
    AdaptiveSDE(1e3, 1e3).step(model, x, full(80.0, 1), full(70.0, 1), generator=BrownianPath([0]))
    assert asked[1] == [pytest.approx(79.2)]


# --- errors ----------------------------------------------------------------------------------


def end_of(sde):
    return float(sde.time_at_log_snr(full(4.0, 1)))


def strong_errors(sde, tolerances, n, fine):
    """Root mean square distances from a fine run along the same path, and evaluations."""
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


def test_the_error_follows_the_tolerance(process):
    """It falls as its power 2/3, the evaluations grow so."""
    errors, counts = strong_errors(process, (0.3, 0.03), 50, 384)
    assert errors[1] < 0.1
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2 / 3, abs=0.2)
    assert math.log10(counts[1] / counts[0]) == pytest.approx(2 / 3, abs=0.2)


@pytest.mark.slow
def test_the_error_follows_the_tolerance_over_three_decades(process):
    errors, counts = strong_errors(process, (0.3, 0.03, 0.003, 0.0003), 60, 8192)
    for a, b in pairwise(errors):
        assert math.log10(a / b) == pytest.approx(2 / 3, abs=0.2)
    for a, b in pairwise(counts):
        assert math.log10(b / a) == pytest.approx(2 / 3, abs=0.2)


def test_the_law_of_the_samples(process):
    """Gaussian data, 3200 numbers: within 4 standard errors and the solver's own 3 per cent."""
    model = GaussianMixtureModel(process, [[MEAN] * 16], [STD])
    sampler = PCSampler(model, AdaptiveSDE(0.05, 0.05), steps=1)
    x = sampler((200, 16), generator=seeded(), dtype=torch.float64)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(x.std()) == pytest.approx(STD, rel=0.08)


# --- samples, times and generators -----------------------------------------------------------


def test_a_sample_depends_on_its_own_generator_alone():
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
    """Of which one starts below t_stop, ends without noise, and takes one step: to the data."""
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
def test_the_end_without_noise(dtype):
    """In steps to t_stop, as without it, and from there to the predicted data at once."""
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


def test_the_end_without_noise_of_a_process_that_scales():
    """To alpha(0) times the predicted data, from a float32 time that rounds t_stop up."""

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


def test_with_correctors_and_other_grids():
    model = GaussianMixtureModel(EDMSDE(), [[MEAN]], [STD])
    sampler = PCSampler(
        model, AdaptiveSDE(0.1, 0.1), AnnealedLangevin(), grid=KarrasGrid(to_zero=True), steps=12
    )
    x = sampler((500, 1), generator=seeded())
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.1)
    assert float(x.std()) == pytest.approx(STD, rel=0.2)
    assert sampler.nfe > 36


def test_states_of_one_number():
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
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        AdaptiveSDE(**options)


def test_bad_moves():
    x, t = torch.ones(2, 1), torch.tensor([0.5, 0.75])
    model = EpsModel(lambda x, noise_label: x * math.nan, VPSDE())
    with pytest.raises(ValueError, match=r"finite predictions, got NaN.* in a step from t = 0.5"):
        AdaptiveSDE().step(model, x, t, 0.5 * t)
    with pytest.raises(ValueError, match=r"expected s < t, got s = \[0.5, 0.75\]"):
        AdaptiveSDE().step(model, x, t, t)
    slow = PCSampler(mixture(VPSDE()), AdaptiveSDE(1e-3, 1e-3, max_steps=20), steps=1)
    with pytest.raises(ValueError, match=r"within max_steps = 20, got to t = 0\..*; ask for less"):
        slow((2, 2), generator=seeded())
