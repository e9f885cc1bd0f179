"""The analytic first step: free, of closed form, remembered, and worth an evaluation."""

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    VPSDE,
    AnalyticFirstStep,
    Ancestral,
    FlowMatchingSDE,
    GaussianMixtureModel,
    Heun,
    PCSampler,
    Prediction,
    ScoreModel,
    UniPC,
    VelocityAdams,
    fit_grid,
)

DOUBLE = torch.float64
TIMES = torch.tensor([80.0, 12.0, 3.0, 1.2, 0.4, 0.1, 0.0], dtype=DOUBLE)


def two_modes(sde=None):
    means = [[-1.0, 0.0], [1.0, 0.5]]
    return GaussianMixtureModel(sde or EDMSDE(), means, [0.2, 0.3], [0.3, 0.7])


class ConstantAtPrior(ScoreModel):
    """A model that itself predicts a constant at T."""

    def __init__(self, model, x0):
        super().__init__()
        self.sde, self.model, self.x0 = model.sde, model, x0

    def predict(self, x, t, /, **cond):
        if float(t[0]) < self.sde.T:
            return self.model.predict(x, t, **cond)
        alpha, sigma = self.sde.perturbation_kernel(x, t)
        return Prediction.from_x0(x, self.x0.expand_as(x), alpha, sigma)


def run(model, predictor, times, x):
    sampler = PCSampler(model, predictor, grid=times, denoise=False)
    return sampler(x, generator=seeded(1)), sampler.nfe


@pytest.mark.parametrize("x0", [0.25, torch.tensor([0.5, -1.0], dtype=DOUBLE)], ids=["c", "mean"])
@pytest.mark.parametrize("sde", [EDMSDE(), VPSDE(), FlowMatchingSDE()], ids=str)
def test_the_first_step_has_the_closed_form(sde, x0):
    """x_s = sigma_s / sigma_T x_T + (alpha_s - alpha_T sigma_s / sigma_T) c."""
    model, x = two_modes(sde), torch.randn(5, 2, generator=seeded(), dtype=DOUBLE)
    times = torch.tensor([1.0, 0.8, 0.3], dtype=DOUBLE) * sde.T
    states = PCSampler(model, AnalyticFirstStep(DDIM(), x0), grid=times).iterate(x)
    next(states)
    state = next(states)
    (a, a_s), (b, b_s) = (value[:2].tolist() for value in sde.marginal(times))
    torch.testing.assert_close(state.x, b_s / b * x + (a_s - a * b_s / b) * x0)
    assert state.nfe == 0


@pytest.mark.parametrize(
    ("predictor", "nfe"),
    [(DDIM(), 5), (DEIS(), 5), (UniPC(), 5), (VelocityAdams(), 5), (Heun(), 10), (Ancestral(), 5)],
    ids=str,
)
def test_every_predictor_runs_as_with_a_model_that_is_constant_at_the_prior(predictor, nfe):
    model, x = two_modes(), 80 * torch.randn(5, 2, generator=seeded(), dtype=DOUBLE)
    c = torch.tensor([0.5, -1.0], dtype=DOUBLE)
    found, count = run(model, AnalyticFirstStep(predictor, c), TIMES, x)
    expected, all_of_them = run(ConstantAtPrior(model, c), predictor, TIMES, x)
    torch.testing.assert_close(found, expected)
    assert count == nfe == all_of_them - 1


def test_runs_that_begin_below_the_prior_evaluate_every_step():
    model, x0 = two_modes(), torch.zeros(3, 2, dtype=DOUBLE)
    free, whole = (
        PCSampler(model, part, grid=TIMES, denoise=False)
        for part in (AnalyticFirstStep(DEIS()), DEIS())
    )
    found, expected = (s.edit(x0, 12.0, generator=seeded(2)) for s in (free, whole))
    torch.testing.assert_close(found, expected)
    assert free.nfe == whole.nfe == 5


def test_a_step_outside_a_sampler_reads_the_times():
    model, x = two_modes(), 80 * torch.randn(2, 2, generator=seeded(), dtype=DOUBLE)
    part = AnalyticFirstStep(DDIM())
    t, s = torch.tensor([80.0, 80.0]), torch.tensor([8.0, 8.0])
    torch.testing.assert_close(part.step(model, x, t, s).x, x / 10)
    mixed = torch.tensor([80.0, 40.0])  # the model serves a batch of several times
    torch.testing.assert_close(part.step(model, x, mixed, s).x, DDIM().step(model, x, mixed, s).x)


@pytest.mark.parametrize("sde", [EDMSDE(), VPSDE()], ids=str)
def test_a_fitted_grid_gains_from_it_at_equal_evaluations(sde):
    model = two_modes(sde)
    x = sde.prior_sample((64, 2), generator=seeded(), dtype=DOUBLE)
    plain = fit_grid(model, DEIS(), x, steps=5, iterations=6)
    free = fit_grid(model, AnalyticFirstStep(DEIS()), x, steps=6, iterations=6)
    assert plain.nfe == free.nfe == 5
    assert free.error < 0.85 * plain.error


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: AnalyticFirstStep(None), TypeError, "predictor: expected a Predictor"),
        (lambda: AnalyticFirstStep(DDIM(), "0"), TypeError, "x0: expected a number"),
        (lambda: AnalyticFirstStep(DDIM(), float("nan")), ValueError, "x0: expected a finite"),
        (lambda: AnalyticFirstStep(DDIM(), torch.tensor([float("inf")])), ValueError,
         "x0: expected finite values"),
        (lambda: PCSampler(two_modes(), AnalyticFirstStep(DDIM(), torch.zeros(3)), steps=3)((2, 2)),
         ValueError, r"x0: expected a shape that expands to \(2,\), got \(3,\)"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(make, kind, match):
    with pytest.raises(kind, match=match):
        make()
