"""The single-step and the stochastic DPM-Solver++."""

import math

import pytest
import torch

from diffusionkit import (
    DDIM,
    EDMSDE,
    VPSDE,
    Ancestral,
    ForwardSDE,
    GaussianMixtureModel,
    KarrasGrid,
    PCSampler,
)
from diffusionkit.random import NoisePath
from diffusionkit.sampling.dpm_solver import DPMSolver2M, DPMSolver2MSDE, DPMSolver2S

MIXTURE = {"means": [[-1.0], [0.8]], "stds": [0.2, 0.4], "weights": [0.3, 0.7]}
Z = torch.tensor([-2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0], dtype=torch.float64).unsqueeze(1)
MEAN, STD = 0.7, 0.4


def mixture(sde):
    return GaussianMixtureModel(sde, **MIXTURE)


class Script(NoisePath):
    """Noise that is written down: a function of the number of the step."""

    def __init__(self, rows, noise):
        self.generators, self.noise, self.steps = [torch.Generator()] * rows, noise, 0

    def __len__(self):
        return len(self.generators)

    def __getitem__(self, index):
        return self.generators[index]

    def increment(self, x, sde, t, s):
        self.steps += 1
        return self.noise(self.steps).view_as(x)


def ones(rows):
    return Script(rows, lambda step: torch.ones(rows, dtype=torch.float64))


# --- 2S --------------------------------------------------------------------------------------


def test_2s_of_a_released_code():
    """k-diffusion's, in 12 steps of EDM's grid."""
    sampler = PCSampler(
        mixture(EDMSDE()), DPMSolver2S(), grid=KarrasGrid(), steps=12, denoise=False
    )
    expected = [-1.266582096426643, -0.9660685695313777, -0.05124136749463482]
    assert sampler(80 * Z).flatten()[:3].tolist() == pytest.approx(expected, abs=1e-12)
    assert sampler.nfe == 24


@pytest.mark.parametrize("r", [0.3, 0.5, 1.0])
def test_2s_by_hand(r):
    """Levels 2, 2^(1 - 2r), 1/2 in EDM's time, in plain numbers."""
    model, x = mixture(EDMSDE()), 0.6

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
def test_2s_order(sde, r):
    """On a stretch of the flow of a Gaussian, which scales with its deviation."""
    if type(sde).__name__ == "DDPMChain":
        pytest.skip("its log-SNR has a corner at every step of its own")
    errors = []
    for steps in (64, 128):
        times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1, dtype=torch.float64))
        alpha, sigma = sde.marginal(times)
        std = torch.sqrt((alpha * STD) ** 2 + sigma**2)
        start = (alpha[0] * MEAN + 1.5 * std[0]).view(1, 1)
        model = GaussianMixtureModel(sde, [[MEAN]], [STD])
        x = PCSampler(model, DPMSolver2S(r), grid=times, denoise=False)(start)
        errors.append(abs(float(x - alpha[-1] * MEAN - 1.5 * std[-1])))
    assert errors[1] < 1e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


def test_2s_at_times_of_each_sample(sde):
    """Rows that end without noise take one stage beside others that take two."""
    model = mixture(sde)
    t = torch.tensor([0.9, 0.3, 0.5], dtype=torch.float64) * sde.T
    s = torch.tensor([0.4, 0.0, 0.45], dtype=torch.float64) * sde.T
    x = torch.tensor([[0.4], [-0.9], [1.2]], dtype=torch.float64)
    for predictor in (DPMSolver2S(), DPMSolver2S(r=1.0)):
        together = predictor.step(model, x, t, s).x
        for i in range(3):
            times = torch.stack([t[i], s[i]])
            alone = PCSampler(model, predictor, grid=times, denoise=False)(x[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_2s_takes_one_evaluation_to_no_noise():
    model = mixture(EDMSDE())
    sampler = PCSampler(model, DPMSolver2S(), grid=KarrasGrid(to_zero=True), steps=6)
    *_, before, _, last = sampler.iterate((80 * Z).float())
    assert sampler.nfe == 11
    x0 = model.predict(before.x, torch.full((8,), before.t)).x0
    torch.testing.assert_close(last.x, x0, rtol=1e-5, atol=1e-6)
    assert last.x.dtype == torch.float32


class FromNothing(ForwardSDE):
    """A process that ends with no data at all, at a log-SNR of minus infinity."""

    def marginal(self, t):
        return 1 - t, t


def test_2s_takes_ddims_step_from_a_start_without_data():
    grid = torch.tensor([1.0, 0.9], dtype=torch.float64)
    two, one = (
        PCSampler(mixture(FromNothing()), p, grid=grid, denoise=False)
        for p in (DPMSolver2S(), DDIM())
    )
    torch.testing.assert_close(two(Z), one(Z), rtol=1e-12, atol=1e-13)
    assert two.nfe == 1


# --- 2M-SDE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_2m_sde_by_hand(solver, eta):
    """Two steps with noise 1, in plain numbers, with the signs of the released code."""
    sde, x = VPSDE(), 0.3
    model, path = mixture(sde), ones(2)
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


def test_the_first_step_is_the_ancestral_samplers(sde):
    times = torch.tensor([0.6, 0.35], dtype=torch.float64) * sde.T
    x = torch.tensor([[0.4], [-0.9]], dtype=torch.float64)
    found, ancestral = (
        p.step(mixture(sde), x, times[0].expand(2), times[1].expand(2), generator=ones(2))
        for p in (DPMSolver2MSDE(), Ancestral())
    )
    torch.testing.assert_close(found.mean, ancestral.mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.x, ancestral.x, rtol=1e-7, atol=1e-10)


def test_without_noise_it_is_2m():
    grid = KarrasGrid(to_zero=True)
    found, plain = (
        PCSampler(mixture(EDMSDE()), p, grid=grid, steps=9)(80 * Z)
        for p in (DPMSolver2MSDE(eta=0.0), DPMSolver2M())
    )
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("eta", "solver"), [(1.0, "midpoint"), (1.0, "heun"), (0.5, "midpoint")])
def test_weak_order_is_two(eta, solver):
    """The law of a Gaussian after a run: the rows are its mean and what each noise adds."""
    sde, errors = VPSDE(), []
    model = GaussianMixtureModel(sde, [[MEAN]], [STD])
    for steps in (64, 128):
        times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1, dtype=torch.float64))
        alpha, sigma = sde.marginal(times)
        std = torch.sqrt((alpha * STD) ** 2 + sigma**2)
        start = (alpha[0] * MEAN).expand(steps + 2, 1).clone()
        start[1] += std[0]
        sampler = PCSampler(model, DPMSolver2MSDE(eta, solver), grid=times, denoise=False)
        noise = torch.eye(steps + 2, dtype=torch.float64)[1:]
        x = sampler(start, generator=Script(steps + 2, noise.__getitem__))
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
        (lambda: DPMSolver2MSDE(solver="euler"), ValueError, 'solver: expected "midpoint" or "h'),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_times():
    model, t = mixture(EDMSDE()), torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"expected s < t, got s = \[0.5, 3.0\]"):
        DPMSolver2S().step(model, torch.ones(2, 1), t, torch.tensor([0.5, 3.0]))
    DPMSolver2S().prepare(EDMSDE(), [t, t / 2])  # times without a known process are left alone
