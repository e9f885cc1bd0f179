"""The coefficients of multistep solvers, on models whose prediction depends on time only."""

import itertools

import pytest
import torch
from support import seeded

from diffusionkit import VPSDE, ForwardSDE, LogSNRGrid, PCSampler, Prediction, ScoreModel
from diffusionkit.sampling.adams import DEIS, LMS
from diffusionkit.sampling.dpm_solver import DPMSolver2M, DPMSolver2S, DPMSolver3M
from diffusionkit.sampling.unipc import UniPC


class Known(ScoreModel):
    """A model that predicts data or noise as a function of time, whatever the state."""

    def __init__(self, sde, prediction, of_data):
        super().__init__()
        self.sde, self.prediction, self.of_data = sde, prediction, of_data

    def predict(self, x, t, **cond):
        alpha, sigma = self.sde.marginal(t)
        make = Prediction.from_x0 if self.of_data else Prediction.from_eps
        return make(x, self.prediction(t).unsqueeze(1).expand_as(x), alpha, sigma)


class RootTime(ForwardSDE):
    T, t_min = 4.0, 1e-3

    def marginal(self, t):
        return torch.ones_like(t), torch.sqrt(t)


def half_log_snr(t):
    return 0.5 * VPSDE().log_snr(t)


def ratio(t):
    return torch.exp(-half_log_snr(t))


# Polynomials in l, rho or time, and their antiderivatives: with respect to exp(l) dl for data, to
# d rho for noise.
POLYNOMIALS = {
    "3m": (DPMSolver3M(), VPSDE(), lambda t: 1 - 2 * half_log_snr(t) + half_log_snr(t) ** 2,
           lambda t: (5 - 4 * half_log_snr(t) + half_log_snr(t) ** 2) / ratio(t)),
    "unipc": (UniPC(3), VPSDE(), lambda t: 3 - half_log_snr(t) ** 2,
              lambda t: (1 + 2 * half_log_snr(t) - half_log_snr(t) ** 2) / ratio(t)),
    "deis 3": (DEIS(3), VPSDE(), lambda t: half_log_snr(t) ** 2,
               lambda t: (half_log_snr(t) ** 2 + 2 * half_log_snr(t) + 2) * ratio(t)),
    "deis 4": (DEIS(4), VPSDE(), lambda t: 1 - half_log_snr(t) ** 3,
               lambda t: ratio(t) * (
                   -5 - 6 * half_log_snr(t) - 3 * half_log_snr(t) ** 2 - half_log_snr(t) ** 3)),
    "time": (DEIS(4, "time"), RootTime(), lambda t: 1 + t - t**3,
             lambda t: t**0.5 + t**1.5 / 3 - t**3.5 / 7),
    "lms": (LMS(4), VPSDE(), lambda t: ratio(t) ** 3 - 2 * ratio(t),
            lambda t: ratio(t) ** 4 / 4 - ratio(t) ** 2),
}  # fmt: skip


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_are_integrated_exactly(name):
    """With a full memory, at different times for each sample."""
    predictor, sde, prediction, integral = POLYNOMIALS[name]
    times = torch.tensor(
        [[0.9, 0.8], [0.7, 0.75], [0.65, 0.5], [0.4, 0.45], [0.3, 0.1], [0.29, 0.09]]
    ).double()
    model, state = Known(sde, prediction, predictor.of_data), None
    for t, s in itertools.pairwise(times):
        # A new state in each step: only the memory may matter.
        x = torch.randn(2, 1, generator=seeded(), dtype=torch.float64)
        step = predictor.step(model, x, t, s, state)
        state = step.state
    change = (integral(s) - integral(t)).unsqueeze(1)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (a.unsqueeze(1), b.unsqueeze(1)) for a, b in (sde.marginal(t), sde.marginal(s))
    )
    scale_t, scale_s = (sigma_t, sigma_s) if predictor.of_data else (alpha_t, alpha_s)
    torch.testing.assert_close(step.x, scale_s * (x / scale_t + change), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", [DPMSolver2S(), DPMSolver2M(), UniPC(3), DEIS(4, "time")])
def test_samplers_compute_all_coefficients_before_the_first_step(solver):
    class Counted(VPSDE):
        calls = 0

        def marginal(self, t):
            Counted.calls += 1
            return super().marginal(t)

    class Shrunk(ScoreModel):
        sde = Counted()

        def predict(self, x, t, **cond):
            return Prediction.from_x0(x, 0.5 * x, 1.0, 1.0)

    sampler = PCSampler(Shrunk(), solver, grid=LogSNRGrid(), steps=7, denoise=False)
    states = sampler.iterate(torch.ones(2, 1))
    next(states)
    before = Counted.calls
    assert len(list(states)) == 7
    assert Counted.calls == before


def test_unipc_keeps_changes_of_the_state_between_steps():
    """Such as those of a constraint or corrector."""
    sde, times = VPSDE(), torch.tensor([0.9, 0.6, 0.4, 0.3], dtype=torch.float64)
    model, state = Known(sde, torch.cos, True), None
    x = torch.tensor([[0.3]], dtype=torch.float64)
    for t, s in itertools.pairwise(times[:3]):
        step = UniPC().step(model, x, t[None], s[None], state)
        x, state = step.x, step.state
    moved = [UniPC().step(model, y, times[2:3], times[3:], state).x for y in (x, x + 0.1)]
    sigma = sde.marginal(times)[1]
    assert float(moved[1] - moved[0]) == pytest.approx(0.1 * float(sigma[3] / sigma[2]), rel=1e-9)
