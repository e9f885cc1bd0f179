"""The predictor-corrector sampler: its distribution, its randomness and its parts."""

import itertools
import logging
import sys

import pytest
import torch
from support import seeded

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
# In two dimensions the norm of a single score fluctuates too much; the batch mean does not.
LANGEVIN = Langevin(snr=0.1, norm="batch")


def assert_is_the_mixture(x, weight=0.7, n=3000):
    """Allow four standard errors of n samples, and 1.5% for the solvers' bias."""
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(weight, abs=4 * (0.21 / n) ** 0.5 + 0.007)
    for rows, mean, std in ((right, [1.0, 0.5], 0.3), (~right, [-1.0, 0.0], 0.2)):
        part = x[rows].double()
        error = 4 * std / len(part) ** 0.5 + 0.015
        torch.testing.assert_close(part.mean(0), torch.tensor(mean).double(), rtol=0, atol=error)
        for column in part.T:
            assert float(column.std()) == pytest.approx(std, rel=4 / (2 * len(part)) ** 0.5 + 0.015)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_samples_the_mixture(mixture, predictor):
    sampler = PCSampler(mixture, PREDICTORS[predictor], steps=150, grid=LogSNRGrid())
    assert_is_the_mixture(sampler((1500, 2), generator=seeded()), n=1500)


@pytest.mark.parametrize(
    "predictor",
    [
        pytest.param(name, marks=[] if name in ("reverse-diffusion", "ddim") else pytest.mark.slow)
        for name in PREDICTORS
    ],
)
def test_samples_the_mixture_with_a_corrector(mixture, predictor):
    sampler = PCSampler(mixture, PREDICTORS[predictor], LANGEVIN, steps=150, grid=LogSNRGrid())
    assert_is_the_mixture(sampler((1500, 2), generator=seeded()), n=1500)


@pytest.mark.parametrize("corrector_first", [True, False])
def test_either_order_samples_the_mixture(corrector_first):
    model = GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    sampler = PCSampler(
        model,
        ReverseDiffusion(),
        LANGEVIN,
        steps=300,
        corrector_first=corrector_first,
    )
    assert_is_the_mixture(sampler((3000, 2), generator=seeded(1)))


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


def test_large_samples_do_not_depend_on_their_batch():
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


def test_a_seed_determines_the_result():
    sampler = PCSampler(image_oracle(VPSDE()), ReverseDiffusion(), Langevin(), steps=10)
    one, two, other = (sampler((2, 3, 4, 4), generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    one = sampler((2, 3, 4, 4))
    torch.manual_seed(3)
    assert torch.equal(one, sampler((2, 3, 4, 4)))


def test_a_predictor_gets_its_memory_back(mixture):
    class Remembering(Predictor):
        def step(self, model, x, t, s, state=None, *, generator=None, **cond):
            return Step(x, x, [*(state or []), (float(t[0]), float(s[0]))])

    class Idle(Corrector):
        def step(self, model, x, t, *, generator=None, **cond):
            return Step(x, x)

    seen = []

    class Watching(Remembering):
        def step(self, *args, **kwargs):
            step = super().step(*args, **kwargs)
            seen[:] = step.state
            return step

    sampler = PCSampler(mixture, Watching(), Idle(), steps=3)
    sampler((1, 2))
    times = sampler.times.tolist()
    assert seen == list(itertools.pairwise(torch.tensor(times).tolist()))


def test_progress_wraps_the_steps(mixture, monkeypatch, caplog):
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
    """A corrector may use other methods of the model, here its density."""

    class Climbing(Corrector):
        def step(self, model, x, t, *, generator=None, **cond):
            assert model is mixture
            assert torch.isfinite(model.log_prob(x, t)).all()
            return Step(x, x)

    PCSampler(mixture, DDIM(), Climbing(), steps=2)((2, 2))


def test_the_grid_follows_the_process():
    """Such as a schedule that is trained after the sampler is created."""
    model = GaussianMixtureModel(VPSDE(), [[0.0]], [1.0])
    sampler = PCSampler(model, DDIM(), steps=20)
    model.sde = VESDE()
    assert sampler.times.tolist() == UniformGrid()(VESDE(), 20).tolist()
    assert float(sampler((500, 1), generator=seeded()).std()) == pytest.approx(1.0, rel=0.2)


def test_a_model_may_create_its_process_on_access():
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
def test_invalid_results_of_a_part_raise(mixture, wrong, message):
    class Wrong(Predictor):
        def step(self, model, x, t, s, state=None, *, generator=None, **cond):
            return wrong(x)

    with pytest.raises((TypeError, ValueError), match=message):
        PCSampler(mixture, Wrong(), steps=2)((3, 2))


def test_a_part_written_with_plain_arithmetic_keeps_the_dtype():
    """Times have the state's dtype, so a textbook step is not promoted to float64."""

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
