"""Runs of the predictor-corrector sampler: evaluations, states, modes and dtypes."""

import itertools
import weakref

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    DDIM,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    Corrector,
    EpsModel,
    EulerMaruyama,
    GaussianMixtureModel,
    KarrasGrid,
    Langevin,
    PCSampler,
    Prediction,
    ReverseDiffusion,
    ScoreModel,
    Step,
    UniformGrid,
)

LANGEVIN = Langevin(snr=0.1, norm="batch")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls = 0
        self.modes = set()

    def forward(self, x, noise_label, **cond):
        self.calls += 1
        self.modes.add(self.training)
        return torch.zeros_like(x) + self.weight + cond.get("shift", 0.0)


@pytest.mark.parametrize(
    ("predictor", "corrector", "options", "nfe"),
    [
        (ReverseDiffusion(), None, {}, 11),
        (ReverseDiffusion(), None, {"denoise": False}, 10),
        (ReverseDiffusion(), Langevin(steps=3), {}, 41),
        (ReverseDiffusion(), Langevin(), {"corrector_first": False}, 21),
        (None, Langevin(steps=2), {}, 21),
        # To t = 0 of VP the last step denoises, and nothing is corrected at 0.
        (DDIM(), None, {"grid": UniformGrid(t_end=0.0)}, 10),
        (DDIM(), Langevin(), {"grid": UniformGrid(t_end=0.0), "corrector_first": False}, 19),
        (DDIM(), None, {"grid": KarrasGrid(to_zero=True)}, 10),
    ],
)
def test_evaluations_are_counted(predictor, corrector, options, nfe):
    network = Counting()
    sampler = PCSampler(EpsModel(network, VPSDE()), predictor, corrector, steps=10, **options)
    x = sampler((2, 3))
    assert sampler.nfe == network.calls == nfe
    assert torch.isfinite(x).all()


def test_a_model_that_calls_others_counts_as_their_evaluations(mixture):
    class Twice(ScoreModel):
        def __init__(self):
            super().__init__()
            self.sde, self.inner = mixture.sde, mixture

        def predict(self, x, t, **cond):
            self.inner.predict(x, t)
            return self.inner.predict(x, t)

    sampler = PCSampler(Twice(), DDIM(), steps=5)
    sampler((2, 2))
    assert sampler.nfe == 12

    class Nested(Corrector):
        def step(self, model, x, t, *, generator=None, **cond):
            inner = PCSampler(mixture, DDIM(), steps=3)
            return Step(inner(x), x)

    sampler = PCSampler(mixture, None, Nested(), steps=2, denoise=False)
    sampler((2, 2))
    assert sampler.nfe == 8


def test_the_result_is_denoised(mixture):
    """The result is the model's x0 at the last time."""
    grid = UniformGrid(t_end=0.2 * mixture.sde.T)
    noisy, clean = (
        PCSampler(mixture, Ancestral(), steps=50, grid=grid, denoise=denoise)(
            (5, 2), generator=seeded()
        )
        for denoise in (False, True)
    )
    t = torch.full((5,), 0.2 * mixture.sde.T)
    torch.testing.assert_close(clean, mixture.predict(noisy, t).x0, rtol=1e-4, atol=1e-4)


def test_a_grid_that_ends_at_zero_returns_the_last_mean():
    model = GaussianMixtureModel(VPSDE(), [[1.0]], [0.5])
    sampler = PCSampler(model, ReverseDiffusion(), steps=20, grid=UniformGrid(t_end=0.0))
    states = list(sampler.iterate((3, 1), generator=seeded()))
    assert torch.equal(states[-1].x, states[-2].mean)
    assert not torch.equal(states[-2].x, states[-2].mean)


def test_iterate_yields_every_state(mixture):
    sampler = PCSampler(mixture, ReverseDiffusion(), LANGEVIN, steps=10)
    states = list(sampler.iterate((3, 2), generator=seeded()))
    assert [s.step for s in states] == [*range(11), 10]
    assert [s.nfe for s in states] == [*range(0, 21, 2), 21]
    assert [s.t for s in states[:-1]] == sampler.times.tolist()
    assert torch.equal(states[-1].x, sampler((3, 2), generator=seeded()))
    start = mixture.sde.prior_sample((3, 2), generator=seeded())
    assert torch.equal(states[0].x, start)


@pytest.mark.parametrize(
    ("predictor", "corrector"),
    [(None, LANGEVIN), *itertools.product((DDIM(), Ancestral()), (None, LANGEVIN))],
    ids=str,
)
def test_states_hold_the_last_predicted_data(mixture, predictor, corrector):
    class Watched(ScoreModel):
        def __init__(self):
            super().__init__()
            self.sde, self.prediction = mixture.sde, []

        def predict(self, x, t, **cond):
            self.prediction.append(mixture.predict(x, t).x0)
            return mixture.predict(x, t)

    model = Watched()
    states = PCSampler(model, predictor, corrector, steps=4).iterate((3, 2), generator=seeded())
    assert next(states).x0 is None
    for state in states:
        assert torch.equal(state.x0, model.prediction[-1])


def test_a_run_keeps_one_prediction_at_a_time():
    kept = []

    class Counted(ScoreModel):
        def __init__(self):
            super().__init__()
            self.sde = VPSDE()

        def predict(self, x, t, **cond):
            assert sum(one() is not None for one in kept) <= 1
            prediction = Prediction.from_x0(x, 0 * x, *self.sde.perturbation_kernel(x, t))
            kept.append(weakref.ref(prediction.x0))
            return prediction

    PCSampler(Counted(), DDIM(), steps=4)((3, 2))
    assert len(kept) == 5


def test_sampling_runs_in_evaluation_mode_without_gradients():
    network = nn.Sequential(nn.Dropout(), nn.Identity())
    watched = Counting()
    network.append(watched)
    watched.eval()
    model = EpsModel(lambda x, noise_label: network[2](network[0](x), noise_label), VPSDE())
    model.net = network  # a part of the model, so that its mode is switched
    model.train()
    watched.eval()
    sampler = PCSampler(model, EulerMaruyama(), steps=3)
    x = sampler((2, 3))
    assert not x.requires_grad
    assert watched.modes == {False}
    assert network[0].training
    assert not watched.training
    for state in sampler.iterate((2, 3)):
        assert torch.is_grad_enabled()
        assert not state.x.requires_grad


def test_iterate_restores_the_users_modes_between_states():
    model = EpsModel(nn.Module(), VPSDE())
    model.network = Counting()
    model.train()
    runs = [PCSampler(model, DDIM(), steps=n).iterate((2, 3)) for n in (2, 4)]
    for run in (*runs, *runs, *runs):
        next(run)
        assert model.training
        assert torch.is_grad_enabled()
    assert model.network.modes == {False}


def test_conditions_reach_the_model():
    model = EpsModel(Counting(), VPSDE())
    sampler = PCSampler(model, DDIM(), Langevin(), steps=4)
    plain, shifted = (sampler((2, 3), generator=seeded(), **c) for c in ({}, {"shift": 1.0}))
    assert not torch.allclose(plain, shifted)


def test_a_given_state_is_used_and_not_modified(mixture):
    x = mixture.sde.prior_sample((4, 2), generator=seeded())
    kept = x.clone()
    sampler = PCSampler(mixture, DDIM(), steps=5)
    torch.testing.assert_close(sampler(x), sampler((4, 2), generator=seeded()))
    assert torch.equal(x, kept)


def test_a_state_is_drawn_only_if_the_grid_begins_at_the_prior(mixture):
    grid = torch.tensor([0.3, 0.1]) * mixture.sde.T
    sampler = PCSampler(mixture, DDIM(), grid=grid)
    with pytest.raises(ValueError, match="grid: expected to begin with the prior's noise"):
        sampler((2, 2))
    assert sampler(torch.ones(2, 2)).shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_float64_for_such_models_or_the_requested_one(dtype):
    model = EpsModel(Counting().to(dtype), VPSDE())
    sampler = PCSampler(model, ReverseDiffusion(), Langevin(), steps=3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert sampler((2, 3)).dtype == wide
    for wanted in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert sampler((2, 3), dtype=wanted).dtype == wanted
        assert sampler(torch.zeros(2, 3, dtype=wanted)).dtype == wanted


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 5), (3, 1, 4, 6), (2, 1, 2, 3, 4)])
def test_states_of_any_rank(shape):
    model = EpsModel(lambda x, noise_label: torch.tanh(x), VPSDE())
    for corrector in (Langevin(), AnnealedLangevin()):
        x = PCSampler(model, ReverseDiffusion(), corrector, steps=5)(shape, generator=seeded())
        assert x.shape == shape
        assert torch.isfinite(x).all()
