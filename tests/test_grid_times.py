"""Coefficients at a sampler's times: their owners, and agreement with plain tensors."""

import gc
from itertools import pairwise

import pytest
import torch
from support import f64, full, seeded

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    LMS,
    VPSDE,
    Ancestral,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver2SAncestral,
    DPMSolver3M,
    DPMSolver3MSDE,
    EDMModel,
    EpsModel,
    Euler,
    EulerMaruyama,
    GaussianMixtureModel,
    Heun,
    LogSNRGrid,
    NetworkModel,
    PCSampler,
    Predictor,
    RawScoreModel,
    ReverseDiffusion,
    SASolver,
    ScaledScoreModel,
    StochasticHeun,
    UniPC,
    VModel,
    X0Model,
)
from diffusionkit._grid_times import by_row, grid_point, grid_times, kernel, kernel_tensors
from diffusionkit.sampling import StepCoefficients

# Kinds of predictors, each with a setting that changes its coefficients.
SETTINGS = {
    "ddim": lambda u: DDIM(eta=u),
    "2m sde": lambda u: DPMSolver2MSDE(eta=u),
    "2s": lambda u: DPMSolver2S(r=0.1 + 0.9 * u),
    "heun": lambda u: Heun(alpha=0.5 + 0.5 * u),
    "ancestral": lambda u: Ancestral(variance="forward" if u > 0.5 else "posterior"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_coefficients_of_a_deleted_predictor_are_not_reused(kind):
    """Objects created and deleted within a step often have the same address."""
    model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    errors = []

    class Sweep(Predictor):
        def step(self, model, x, t, s, state=None, *, generator=None, **cond):
            for k in range(20):
                part = SETTINGS[kind](k / 20)
                part.prepare(model.sde, self.times)
                out = part.step(model, x, t, s).mean
                plain = SETTINGS[kind](k / 20).step(
                    model, x, t.double().clone(), s.double().clone()
                )
                errors.append(float((out - plain.mean).abs().max()))
                del part
                gc.collect(0)
            return DDIM().step(model, x, t, s)

        def prepare(self, sde, times):
            self.times = times

    PCSampler(model, Sweep(), steps=6, grid=LogSNRGrid(), denoise=False)(torch.ones(2, 1))
    assert len(errors) == 120
    assert max(errors) < 1e-5


@pytest.mark.parametrize(
    "predictor",
    [DDIM(), Ancestral(), Ancestral("forward"), EulerMaruyama(), ReverseDiffusion(), Euler(),
     Heun(), Heun(alpha=0.5), StochasticHeun(), DPMSolver2M(), DPMSolver2S(), DPMSolver3M(),
     UniPC(), DEIS(), LMS(), DPMSolver3MSDE(), DPMSolver2SAncestral(),
     SASolver(0.5, 3, 3, s_min=0.1)],
    ids=str,
)  # fmt: skip
def test_steps_at_a_samplers_times_equal_those_at_plain_tensors(predictor, mixture):
    generators = [[seeded(k) for k in range(3)] for _ in "ab"]
    sde = mixture.sde
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).view(3, 2)
    grid = grid_times(sde, LogSNRGrid(t_end=0.01 * sde.T)(sde, 6), x)
    predictor.prepare(sde, grid)
    one, two, memory_one, memory_two = x, x, None, None
    for t, s in pairwise(grid):
        step = predictor.step(mixture, one, t, s, memory_one, generator=generators[0])
        again = predictor.step(
            mixture, two, t.clone(), s.clone(), memory_two, generator=generators[1]
        )
        one, two, memory_one, memory_two = step.x, again.x, step.state, again.state
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kind", [EpsModel, X0Model, VModel, RawScoreModel, ScaledScoreModel, EDMModel]
)
@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE()], ids=["vp", "edm"])
def test_models_at_a_samplers_time_equal_those_at_plain_tensors(kind, sde):
    model = kind(lambda x, noise_label: torch.tanh(x) + 0.1, sde)
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    for t in grid_times(sde, torch.linspace(sde.T, 0.1 * sde.T, 5, dtype=torch.float64), x):
        found, plain = model.predict(x, t), model.predict(x, t.clone())
        torch.testing.assert_close(found.x0, plain.x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.eps, plain.eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constant", [1.0, torch.tensor(1.0), torch.ones(1)])
@pytest.mark.parametrize("wrap", [staticmethod, lambda f: lambda self, *args: f(*args)])
def test_parameterizations_of_any_form_sample_as_they_train(constant, wrap):
    class Own(NetworkModel):
        parameterization = wrap(lambda alpha, sigma: (constant, -sigma))

    model, x = Own(lambda x, noise_label: 0.5 * x, VPSDE()), torch.ones(2, 3)
    (t,) = grid_times(model.sde, torch.tensor([0.5], dtype=torch.float64), x)
    torch.testing.assert_close(model.predict(x, t).x0, model.predict(x, t.clone()).x0)


def test_two_models_of_one_process_keep_their_own_parameterizations():
    sde, x = EDMSDE(), torch.ones(2, 1)
    (t,) = grid_times(sde, f64(3.0), x)
    models = [EDMModel(lambda x, noise_label: x, sde, sigma_data=d) for d in (0.5, 2.0)]
    for _ in range(2):
        for model in models:
            torch.testing.assert_close(model.predict(x, t).x0, model.predict(x, t.clone()).x0)


def test_grid_times_belong_to_one_process():
    x = torch.ones(2, 1)
    (t,) = grid_times(VPSDE(), f64(0.5), x)
    other = VPSDE(beta_max=10.0)
    assert grid_point(t, other) is None
    alpha, _ = kernel(other, x, t)
    torch.testing.assert_close(alpha, other.marginal(full(0.5, 2))[0])


def test_users_get_tensors_where_the_library_gets_floats():
    sde, x = VPSDE(), torch.ones(3, 2)
    (t,) = grid_times(sde, f64(0.5), x)
    assert all(isinstance(value, float) for value in kernel(sde, x, t))
    for tensor, number in zip(sde.perturbation_kernel(x, t), kernel(sde, x, t), strict=True):
        assert tensor.shape == (3,)
        assert tensor.dtype == torch.float64
        assert tensor.tolist() == [number] * 3


@pytest.mark.parametrize("look_up", [kernel, kernel_tensors])
@pytest.mark.parametrize(
    ("x", "t", "error", "match"),
    [
        ([1.0], torch.ones(1), TypeError, "x: expected a tensor"),
        (torch.ones(2, 1), 0.5, TypeError, "t: expected a tensor"),
        (torch.ones(2, 1), torch.ones(3), ValueError, r"shape \(2,\), got \(3,\)"),
        (torch.ones(2, 1), torch.full((2,), 1.5), ValueError, r"within \[0, T\]"),
        (torch.ones(2, 1), torch.tensor([0.5, float("nan")]), ValueError, r"within \[0, T\]"),
    ],
)
def test_states_and_times_are_validated_where_the_schedule_is_looked_up(
    look_up, x, t, error, match
):
    with pytest.raises(error, match=match):
        look_up(VPSDE(), x, t)


def test_a_grid_time_of_another_batch_size_raises():
    (t,) = grid_times(VPSDE(), f64(0.5), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        kernel(VPSDE(), torch.ones(2, 1), t)


def test_by_row_splits_tables_into_rows_of_floats():
    table = (StepCoefficients(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])), [0.5, None])
    rows = by_row(table, None, 2, None)
    assert rows == [
        (StepCoefficients(1.0, 3.0), (0.5, None)),
        (StepCoefficients(2.0, 4.0), (0.5, None)),
    ]
