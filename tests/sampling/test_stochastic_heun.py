"""Stochastic Heun: a step computed by hand, and its weak and strong orders."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import CubicSpline
from support import full, seeded
from support.gaussian_runs import MEAN, STD, error_after
from support.noise import GivenNoise

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    GaussianMixtureModel,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    UniformGrid,
    X0Model,
)
from diffusionkit.interfaces import Prediction, ScoreModel
from diffusionkit.sampling.brownian import BrownianPath
from diffusionkit.sampling.stochastic_heun import StochasticHeun


def grid_to(sde, log_snr):
    return LogSNRGrid(t_end=float(sde.time_at_log_snr(full(log_snr, 1))))


# --- one step --------------------------------------------------------------------------------


class Ramp(ScoreModel):
    """A model that predicts data linear in the log-SNR, whatever the state."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde

    def predict(self, x, t, **cond):
        alpha, sigma = self.sde.marginal(t)
        x0 = (0.3 + 0.2 * self.sde.log_snr(t)).unsqueeze(1).expand(x.shape)
        return Prediction.from_x0(x, x0, alpha, sigma)


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.2), (0.5, 0.499), (0.02, 0.001)])
def test_data_linear_in_log_snr_are_integrated_exactly(sde, t, s):
    """By quadrature: y_s = u_s / u_t y_t + u_s int x0 / u^2 du."""
    t, s = full(t * sde.T, 1), full(s * sde.T, 1)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((float(c) for c in sde.marginal(v)) for v in (t, s))
    u_t, u_s = (sigma_t / alpha_t) ** 2, (sigma_s / alpha_s) ** 2
    gained = quad(lambda l: (0.3 - 0.2 * l) * math.exp(-l), math.log(u_s), math.log(u_t),
                  epsabs=0, epsrel=1e-12)[0]  # fmt: skip
    expected = alpha_s * (u_s / u_t * 0.8 / alpha_t + u_s * gained)
    x, z = full(0.8, 1).view(1, 1), full(2.0, 1)
    step = StochasticHeun().step(Ramp(sde), x, t, s, generator=GivenNoise(z))
    assert float(step.mean) == pytest.approx(expected, rel=1e-8, abs=1e-10)
    # The noise of y_s / u_s has variance int du / u^2 = 1 / u_s - 1 / u_t.
    std = alpha_s * u_s * math.sqrt(1 / u_s - 1 / u_t)
    assert float(step.x - step.mean) == pytest.approx(2 * std, rel=1e-8)


def test_a_step_computed_by_hand():
    """EDM from 3 to 1: h = 2 log 3, x' = x / 9 + 8 / 9 x0 + sqrt(8) / 3 z, with x0 = x / 2."""
    model = X0Model(lambda x, noise_label: 0.5 * x, EDMSDE())
    x, z = torch.tensor([[1.8]], dtype=torch.float64), torch.tensor([[0.6]], dtype=torch.float64)
    step = StochasticHeun().step(model, x, full(3.0, 1), full(1.0, 1), generator=GivenNoise(z))
    first = 0.2 + 0.8 + math.sqrt(8) / 3 * 0.6
    correction = (1 - 8 / 9 / (2 * math.log(3))) * (0.5 * first - 0.9)
    assert float(step.x) == pytest.approx(first + correction, rel=1e-12)
    assert float(step.mean) == pytest.approx(1.0 + correction, rel=1e-12)


# --- orders ----------------------------------------------------------------------------------


def test_weak_order_is_two_on_gaussian_data(sde):
    if isinstance(sde, DDPMChain):
        pytest.skip("its drift is discontinuous at every step of the chain")
    grid = grid_to(sde, 6.0)
    coarse, fine = (error_after(sde, StochasticHeun(), grid(sde, n)) for n in (128, 256))
    assert fine < 1e-3
    assert math.log2(coarse / fine) == pytest.approx(2.0, abs=0.25)


def mixture(sde):
    return GaussianMixtureModel(sde, [[-0.8], [0.9]], [0.5, 0.6], [0.3, 0.7])


def mixture_error(sde, predictor, steps):
    """Return |E f(x_N) - E f(x)| from p_T, f = cos(2 x) + x^2, without random numbers.

    Backward in the steps: u(x) = E_z u'(F(x, z)), by Gauss-Hermite quadrature and splines.
    """
    model, grid = mixture(sde), grid_to(sde, 5.0)
    times = grid(sde, steps)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()

    def lattice(t):
        alpha, sigma = (float(c) for c in sde.marginal(t.view(1)))
        return torch.linspace(-9, 9, 300, dtype=torch.float64) * math.hypot(alpha, sigma)

    def value(x):
        return torch.cos(2 * x) + x.square()

    for k in range(steps, 0, -1):
        at = lattice(times[k - 1])
        n = len(at) * len(nodes)
        x, z = (v.reshape(n, 1) for v in torch.broadcast_tensors(at.unsqueeze(1), nodes))
        t, s = (times[i].expand(n) for i in (k - 1, k))
        end = predictor.step(model, x, t, s, generator=GivenNoise(z)).x
        u = value(end).view(len(at), -1) @ weights
        spline = CubicSpline(at.numpy(), u.numpy())
        value = lambda x, spline=spline: torch.from_numpy(spline(x.numpy()))  # noqa: E731

    def mean(f, t):
        """Return E f under the exact distribution at a time, by quadrature."""
        alpha, sigma = (float(c) for c in sde.marginal(t.view(1)))
        total = 0.0
        for m, std, w in zip((-0.8, 0.9), (0.5, 0.6), (0.3, 0.7), strict=True):
            total += w * float(f(alpha * m + math.hypot(alpha * std, sigma) * nodes) @ weights)
        return total

    return abs(mean(value, times[0]) - mean(lambda x: torch.cos(2 * x) + x.square(), times[-1]))


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=20.0)], ids=["vp", "ve"])
def test_weak_order_is_two_on_a_mixture(sde):
    coarse, fine = (mixture_error(sde, StochasticHeun(), n) for n in (24, 48))
    assert math.log2(coarse / fine) == pytest.approx(2.0, abs=0.25)
    assert fine < 0.2 * mixture_error(sde, Ancestral(), 48)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=20.0)], ids=["vp", "ve"])
def test_strong_order_is_one(sde):
    model = GaussianMixtureModel(sde, [[-0.6, 0.0], [0.8, 0.4]], [0.5, 0.7], [0.3, 0.7])
    grid, path = grid_to(sde, 4.0), BrownianPath(range(150))
    start = sde.prior_sample((150, 2), generator=seeded()).double()
    runs = [
        PCSampler(model, StochasticHeun(), steps=n, grid=grid, denoise=False)(start, generator=path)
        for n in (24, 48, 96)
    ]
    coarse, fine = (float((a - b).square().sum(1).mean().sqrt()) for a, b in pairwise(runs))
    assert fine < 0.1
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.25)


# --- in a sampler ----------------------------------------------------------------------------


def test_a_samplers_steps_equal_single_steps(sde):
    times = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64) * sde.T
    noiseless = float(sde.marginal(full(0.0, 1))[1]) == 0
    x = sde.prior_sample((4, 1), generator=seeded()).double()
    sampler = PCSampler(mixture(sde), StochasticHeun(), grid=times, denoise=False)
    fast = sampler(x, generator=seeded(1))
    assert sampler.nfe == (5 if noiseless else 6)
    generator = seeded(1)
    for t, s in pairwise(times):
        x = StochasticHeun().step(sampler.model, x, t.expand(4), s.expand(4), generator=generator).x
    torch.testing.assert_close(fast, x, rtol=1e-9, atol=1e-9)


def test_the_step_to_zero_is_the_predicted_data():
    """Also in a batch where another sample ends with noise."""
    model = mixture(VPSDE())
    x = torch.tensor([[0.3], [-0.4]], dtype=torch.float64)
    t, s = full(0.4, 2), torch.tensor([0.0, 0.2], dtype=torch.float64)
    evaluated, predict = [], model.predict

    def watch(x, t):
        evaluated.extend(t.tolist())
        return predict(x, t)

    model.predict = watch
    step = StochasticHeun().step(model, x, t, s, generator=BrownianPath([0, 1]))
    assert evaluated == [0.4, 0.4, 0.4, 0.2]  # never at 0, where a model may be undefined
    assert float(step.x[0]) == pytest.approx(float(model.predict(x, t).x0[0]), rel=1e-9)
    assert float(step.mean[0]) == float(step.x[0])
    alone = StochasticHeun().step(model, x[1:], t[1:], s[1:], generator=BrownianPath([1]))
    torch.testing.assert_close(step.x[1:], alone.x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("grid", [UniformGrid(to_zero=True), KarrasGrid(to_zero=True)])
def test_it_runs_in_float32_and_on_other_grids(grid):
    model = GaussianMixtureModel(EDMSDE(), [[MEAN]], [STD])
    sampler = PCSampler(model, StochasticHeun(), steps=40, grid=grid)
    x = sampler((4000, 1), generator=seeded(), dtype=torch.float32)
    assert (x.dtype, sampler.nfe) == (torch.float32, 79)
    if isinstance(grid, KarrasGrid):
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
        assert float(x.std()) == pytest.approx(STD, rel=0.06)


def test_invalid_times_raise():
    model, x = mixture(VPSDE()), torch.ones(2, 1)
    t, s = torch.tensor([[0.5, 0.6], [0.4, 0.7]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected s < t, got s = \[0.4, 0.7\]"):
        StochasticHeun().step(model, x, t, s)
    StochasticHeun().prepare(VPSDE(), [t, t / 2])  # does nothing for times that are not a grid's
