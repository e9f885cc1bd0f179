import itertools
import logging
import sys
import weakref

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    DDIM,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    Corrector,
    EpsModel,
    EulerMaruyama,
    GaussianMixtureModel,
    KarrasGrid,
    Langevin,
    LogSNRGrid,
    PCSampler,
    Prediction,
    Predictor,
    ReverseDiffusion,
    ScoreModel,
    Step,
    UniformGrid,
)

PREDICTORS = {
    "euler-maruyama": EulerMaruyama(),
    "reverse-diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "ancestral-forward": Ancestral(variance="forward"),
    "ddim": DDIM(),
}
# In the plane the norm of one score says little, so the batch's mean is taken.
CORRECTORS = {"none": None, "langevin": Langevin(snr=0.1, norm="batch")}


def assert_is_the_mixture(x, weight=0.7, n=3000):
    """Four standard errors of n samples, plus 1.5% for the solvers' own bias."""
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(weight, abs=4 * (0.21 / n) ** 0.5 + 0.007)
    for rows, mean, std in ((right, [1.0, 0.5], 0.3), (~right, [-1.0, 0.0], 0.2)):
        part = x[rows].double()
        error = 4 * std / len(part) ** 0.5 + 0.015
        torch.testing.assert_close(part.mean(0), torch.tensor(mean).double(), rtol=0, atol=error)
        for column in part.T:
            assert float(column.std()) == pytest.approx(std, rel=4 / (2 * len(part)) ** 0.5 + 0.015)


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_samples_the_mixture(mixture, predictor, corrector):
    sampler = PCSampler(
        mixture, PREDICTORS[predictor], CORRECTORS[corrector], steps=150, grid=LogSNRGrid()
    )
    assert_is_the_mixture(sampler((3000, 2), generator=seeded()))


@pytest.mark.parametrize("corrector_first", [True, False])
def test_either_order_samples_the_mixture(corrector_first):
    model = GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    sampler = PCSampler(
        model,
        ReverseDiffusion(),
        CORRECTORS["langevin"],
        steps=300,
        corrector_first=corrector_first,
    )
    assert_is_the_mixture(sampler((3000, 2), generator=seeded(1)))


@pytest.mark.parametrize("corrector", [AnnealedLangevin(0.2, 5), Langevin(0.2, 5, "batch")])
def test_a_corrector_alone_is_annealed_langevin_dynamics(corrector):
    """It finds the modes; its steps shrink with sigma, so it stops short of their exact widths."""
    sde = VESDE(sigma_min=0.01, sigma_max=20.0)
    model = GaussianMixtureModel(sde, [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    x = PCSampler(model, None, corrector, steps=200)((1000, 2), generator=seeded())
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=0.1)
    for rows, mean, std in ((right, [1.0, 0.5], 0.3), (~right, [-1.0, 0.0], 0.2)):
        torch.testing.assert_close(x[rows].mean(0), torch.tensor(mean), rtol=0, atol=0.1)
        assert float(x[rows].std(0).mean()) == pytest.approx(std, rel=0.3)


def test_langevin_with_norms_of_each_sample_in_many_dimensions():
    means = torch.stack([torch.full((3, 8, 8), -0.5), torch.full((3, 8, 8), 0.5)])
    model = GaussianMixtureModel(VPSDE(), means, [0.3, 0.3], [0.3, 0.7])
    sampler = PCSampler(model, Ancestral(), Langevin(snr=0.16), steps=150, grid=LogSNRGrid())
    x = sampler((400, 3, 8, 8), generator=seeded())
    right = x.mean((1, 2, 3)) > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=0.09)  # 4 standard errors
    # 54,000 numbers of standard deviation .3; the corrector's bias is snr^2 / 2, the solver's 1%.
    assert float(x[right].std()) == pytest.approx(0.3, rel=0.04)
    assert float(x[right].mean()) == pytest.approx(0.5, abs=0.01)


def test_langevin_step_by_hand():
    """epsilon = 2 (snr ||z|| / ||s||)^2, x + epsilon s + sqrt(2 epsilon) z, sample by sample."""
    x = torch.tensor([[3.0, 4.0], [0.3, -0.4]], dtype=torch.float64)
    model = EpsModel(
        lambda x, noise_label: x, VESDE(sigma_min=0.1, sigma_max=10.0)
    )  # score -x / sigma
    t = torch.full((2,), 0.5, dtype=torch.float64)  # sigma = 1
    z = torch.randn((2, 2), generator=seeded(), dtype=torch.float64)
    size = z.square().sum(1).sqrt() / torch.tensor([5.0, 0.5])
    eps = (2 * 0.01 * size**2).unsqueeze(1)
    step = Langevin(snr=0.1).step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.mean, x - eps * x, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.x, x - eps * x + (2 * eps) ** 0.5 * z, rtol=1e-12, atol=0)
    eps = 2 * (0.1 * z.square().sum(1).sqrt().mean() / 2.75) ** 2
    step = Langevin(snr=0.1, norm="batch").step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.x, x - eps * x + (2 * eps) ** 0.5 * z, rtol=1e-12, atol=0)


def test_annealed_langevin_step_by_hand():
    """epsilon = 2 (snr sigma)^2."""
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    model = EpsModel(lambda x, noise_label: 0.1 * x, VESDE(sigma_min=0.5, sigma_max=8.0))
    t = torch.full((1,), 0.5, dtype=torch.float64)  # sigma = 2, score -.05 x
    z = torch.randn((1, 2), generator=seeded(), dtype=torch.float64)
    step = AnnealedLangevin(snr=0.1).step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.mean, x * (1 - 0.08 * 0.05), rtol=1e-12, atol=0)
    torch.testing.assert_close(step.x - step.mean, 0.4 * z, rtol=1e-9, atol=0)


def test_langevin_stays_where_the_score_is_zero():
    model = EpsModel(lambda x, noise_label: torch.zeros_like(x), VPSDE())
    x = torch.ones(2, 3)
    step = Langevin().step(model, x, torch.full((2,), 0.5), generator=seeded())
    assert torch.equal(step.x, x)


def image_oracle(sde):
    means = torch.randn(3, 3, 4, 4, generator=seeded())
    return GaussianMixtureModel(sde, means, [0.2, 0.3, 0.1])


@pytest.mark.parametrize("predictor", [*PREDICTORS.values(), DDIM(eta=0.5)], ids=str)
@pytest.mark.parametrize("corrector", [None, Langevin(), AnnealedLangevin()], ids=str)
def test_a_sample_with_its_own_generator_does_not_depend_on_its_batch(sde, predictor, corrector):
    sampler = PCSampler(image_oracle(sde), predictor, corrector, steps=6, grid=LogSNRGrid())

    def draw(rows):
        generators = [seeded(i) for i in rows]
        return sampler((len(generators), 3, 4, 4), generator=generators)

    whole = draw(range(7))
    halves = torch.cat([draw(range(4)), draw(range(4, 7))])
    assert torch.equal(whole, halves)
    for i in (0, 3, 6):
        assert torch.equal(whole[i : i + 1], draw([i]))


def test_large_samples_do_not_depend_on_their_batch_either():
    """Above 32768 numbers torch may split the sum over threads."""
    model = EpsModel(lambda x, noise_label: torch.tanh(x), VPSDE())
    sampler = PCSampler(model, ReverseDiffusion(), Langevin(), steps=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = sampler((3, 4, 128, 128), generator=[seeded(i) for i in range(3)])
        alone = sampler((1, 4, 128, 128), generator=[seeded(2)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[2:], alone)


def test_one_seed_gives_one_result():
    sampler = PCSampler(image_oracle(VPSDE()), ReverseDiffusion(), Langevin(), steps=10)
    one, two, other = (sampler((2, 3, 4, 4), generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    one = sampler((2, 3, 4, 4))
    torch.manual_seed(3)
    assert torch.equal(one, sampler((2, 3, 4, 4)))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls = 0
        self.modes = set()

    def forward(self, x, label, **cond):
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
        # To t = 0 of VP: the last step is the denoising, and there is nothing to correct at 0.
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


def test_the_result_is_denoised(mixture):
    """At t_stop the state holds noise sigma; what comes back is the model's x0 of it."""
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
    sampler = PCSampler(mixture, ReverseDiffusion(), CORRECTORS["langevin"], steps=10)
    states = list(sampler.iterate((3, 2), generator=seeded()))
    assert [s.step for s in states] == [*range(11), 10]
    assert [s.nfe for s in states] == [*range(0, 21, 2), 21]
    assert [s.t for s in states[:-1]] == sampler.times.tolist()
    assert torch.equal(states[-1].x, sampler((3, 2), generator=seeded()))
    start = mixture.sde.prior_sample((3, 2), generator=seeded())
    assert torch.equal(states[0].x, start)


@pytest.mark.parametrize("predictor", [None, DDIM(), Ancestral()], ids=str)
@pytest.mark.parametrize("corrector", [None, CORRECTORS["langevin"]], ids=["p", "pc"])
def test_states_have_the_last_predicted_data(mixture, predictor, corrector):
    if predictor is None and corrector is None:
        pytest.skip("nothing moves")

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


def test_no_gradients_and_evaluation_mode():
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


def test_conditions_reach_the_model():
    model = EpsModel(Counting(), VPSDE())
    sampler = PCSampler(model, DDIM(), Langevin(), steps=4)
    plain, shifted = (sampler((2, 3), generator=seeded(), **c) for c in ({}, {"shift": 1.0}))
    assert not torch.allclose(plain, shifted)


def test_starts_from_a_given_state_and_leaves_it_alone(mixture):
    x = mixture.sde.prior_sample((4, 2), generator=seeded())
    kept = x.clone()
    sampler = PCSampler(mixture, DDIM(), steps=5)
    torch.testing.assert_close(sampler(x), sampler((4, 2), generator=seeded()))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_follows_the_model_or_the_request(dtype):
    model = EpsModel(Counting().to(dtype), VPSDE())
    sampler = PCSampler(model, ReverseDiffusion(), Langevin(), steps=3)
    assert sampler((2, 3)).dtype == dtype
    assert sampler((2, 3), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 5), (3, 1, 4, 6), (2, 1, 2, 3, 4)])
def test_states_of_any_rank(shape):
    model = EpsModel(lambda x, noise_label: torch.tanh(x), VPSDE())
    for corrector in (Langevin(), AnnealedLangevin()):
        x = PCSampler(model, ReverseDiffusion(), corrector, steps=5)(shape, generator=seeded())
        assert x.shape == shape
        assert torch.isfinite(x).all()


def test_predictor_memory_is_handed_on(mixture):
    class Remembering(Predictor):
        def step(self, model, x, t, s, state=None, *, generator=None, **cond):
            return Step(x, x, [*(state or []), (float(t[0]), float(s[0]))])

    class Nothing(Corrector):
        def step(self, model, x, t, *, generator=None, **cond):
            return Step(x, x)

    seen = []

    class Watching(Remembering):
        def step(self, *args, **kwargs):
            step = super().step(*args, **kwargs)
            seen[:] = step.state
            return step

    sampler = PCSampler(mixture, Watching(), Nothing(), steps=3)
    sampler((1, 2))
    times = sampler.times.tolist()
    assert seen == list(itertools.pairwise(torch.tensor(times).tolist()))


def test_progress(mixture, monkeypatch, caplog):
    shown = []

    def wrapper(items):
        for item in items:
            shown.append(item)
            yield item

    PCSampler(mixture, DDIM(), steps=4, progress=wrapper)((1, 2))
    assert len(shown) == 4
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with caplog.at_level(logging.WARNING):
        PCSampler(mixture, DDIM(), steps=4, progress=True)((1, 2))
    assert "pip install tqdm" in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("correct", 1.0), ("predict", 1.0), ("correct", 0.6), ("predict", 0.6)]),
        (
            {"corrector_first": False},
            [("predict", 1.0), ("correct", 0.6), ("predict", 0.6), ("correct", 0.2)],
        ),
    ],
)
def test_each_part_is_called_at_its_time(mixture, options, expected):
    calls = []

    class Predicting(Predictor):
        def step(self, model, x, t, s, state=None, *, generator=None, **cond):
            calls.append(("predict", float(t[0])))
            return Step(x, x)

    class Correcting(Corrector):
        def step(self, model, x, t, *, generator=None, **cond):
            calls.append(("correct", float(t[0])))
            return Step(x, x)

    grid = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    PCSampler(mixture, Predicting(), Correcting(), grid=grid, **options)(torch.ones(1, 2).double())
    assert calls == expected


def test_parts_get_the_users_own_model(mixture):
    """A corrector may use more of its model than predict: here its density."""

    class Climbing(Corrector):
        def step(self, model, x, t, *, generator=None, **cond):
            assert model is mixture
            assert torch.isfinite(model.log_prob(x, t)).all()
            return Step(x, x)

    PCSampler(mixture, DDIM(), Climbing(), steps=2)((2, 2))


def test_a_model_that_calls_others_counts_as_what_it_calls(mixture):
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


def test_the_grid_follows_the_process():
    """A schedule that has been trained since the sampler was made has another grid."""
    model = GaussianMixtureModel(VPSDE(), [[0.0]], [1.0])
    sampler = PCSampler(model, DDIM(), steps=20)
    model.sde = VESDE()
    assert sampler.times.tolist() == UniformGrid()(VESDE(), 20).tolist()
    assert float(sampler((500, 1), generator=seeded()).std()) == pytest.approx(1.0, rel=0.2)


def test_a_model_whose_process_is_made_anew_each_time():
    class Elusive(ScoreModel):
        @property
        def sde(self):
            return VESDE(sigma_max=10.0)

        def predict(self, x, t, **cond):
            alpha, sigma = self.sde.marginal(t)
            return Prediction.from_x0(x, torch.zeros_like(x), alpha, sigma)

    sampler = PCSampler(Elusive(), ReverseDiffusion(), steps=20, grid=UniformGrid(t_end=0.5))
    assert torch.equal(sampler((3, 2)), torch.zeros(3, 2))
    assert sampler.nfe == 21


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: Step(x[:1], x), r"Wrong.step: expected a state of shape \(3, 2\)"),
        (lambda x: Step(x.double(), x), "expected a state of .*float32.* got .*float64"),
        (lambda x: x, "Wrong.step: expected a Step, got Tensor"),
    ],
)
def test_what_a_part_returns_is_checked(mixture, wrong, message):
    class Wrong(Predictor):
        def step(self, model, x, t, s, state=None, *, generator=None, **cond):
            return wrong(x)

    with pytest.raises((TypeError, ValueError), match=message):
        PCSampler(mixture, Wrong(), steps=2)((3, 2))


def test_a_part_written_with_plain_arithmetic_keeps_the_dtype():
    """Times come in the state's dtype, so a textbook step does not turn it into float64."""

    class Textbook(Predictor):
        def step(self, model, x, t, s, state=None, *, generator=None, **cond):
            dt, g = (t - s).view(-1, 1), model.sde.diffusion(t).view(-1, 1)
            mean = x - (model.sde.drift(x, t) - g**2 * model(x, t)) * dt
            return Step(mean + g * dt.sqrt() * torch.randn(x.shape, generator=generator), mean)

    model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [0.5])
    sampler, own = (PCSampler(model, p, steps=300) for p in (EulerMaruyama(), Textbook()))
    x, y = (s((50, 2), generator=seeded()) for s in (sampler, own))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)


def test_a_start_is_drawn_only_where_the_prior_is(mixture):
    grid = torch.tensor([0.3, 0.1]) * mixture.sde.T
    sampler = PCSampler(mixture, DDIM(), grid=grid)
    with pytest.raises(ValueError, match="grid: expected to begin near T"):
        sampler((2, 2))
    assert sampler(torch.ones(2, 2)).shape == (2, 2)


def test_modes_between_the_states_of_iterate_are_the_users():
    model = EpsModel(nn.Module(), VPSDE())
    model.network = Counting()
    model.train()
    runs = [PCSampler(model, DDIM(), steps=n).iterate((2, 3)) for n in (2, 4)]
    for run in (*runs, *runs, *runs):
        next(run)
        assert model.training
        assert torch.is_grad_enabled()
    assert model.network.modes == {False}


def test_langevin_in_half_precision():
    """Its squared step is subnormal in float16 at small noise, so it is taken in float32."""
    x = torch.randn(4, 64, generator=seeded())
    t = torch.zeros(4)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        network = EpsModel(lambda x, noise_label: torch.ones_like(x), VESDE(sigma_min=1e-3))
        # 2^10 (x - mean) keeps the digits of the difference in this dtype.
        start = torch.zeros_like(x, dtype=dtype)
        half = Langevin().step(network, start, t, generator=[seeded(i) for i in range(4)])
        noise = torch.stack([torch.randn(64, generator=seeded(i), dtype=dtype) for i in range(4)])
        ratio = noise.double().norm(dim=1, keepdim=True) / (8 / 1e-3)
        drift = -2 * (0.16 * ratio) ** 2 / 1e-3
        expected = drift.expand(-1, 64)
        error = (half.mean.double() - expected).abs().max() / expected.abs().max()
        assert float(error) < tolerance


@pytest.mark.parametrize("corrector", [Langevin(), Langevin(norm="batch"), AnnealedLangevin()])
def test_the_sampler_takes_the_steps_the_corrector_takes(mixture, corrector):
    """In a run the noise level is a float, by hand it is a tensor (B,)."""
    grid = LogSNRGrid()(mixture.sde, 4)
    x = mixture.sde.prior_sample((5, 2), generator=seeded()).double()
    sampler = PCSampler(mixture, DDIM(), corrector, grid=grid, denoise=False)
    fast = sampler(x, generator=seeded(1))
    generator = seeded(1)
    for t, s in itertools.pairwise(grid):
        x = corrector.step(mixture, x, t.repeat(5), generator=generator).x
        x = DDIM().step(mixture, x, t.repeat(5), s.repeat(5), generator=generator).x
    torch.testing.assert_close(fast, x, rtol=1e-9, atol=1e-9)
