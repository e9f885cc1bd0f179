"""Adaptive projected guidance: the projection, and momentum along a trajectory."""

import math
from itertools import pairwise

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, ClassModel, randn64, random_states

from diffusionkit import (
    DDIM,
    VPSDE,
    AdaptiveProjection,
    Autoguidance,
    ClassifierFreeGuidance,
    Clip,
    Corrector,
    DDPMChain,
    DenoisedModel,
    DPMSolver2M,
    GaussianMixtureModel,
    GuidanceMomentum,
    Heun,
    PCSampler,
    Prediction,
    ScoreModel,
    Step,
    TimeTravel,
    VModel,
)

LABELS = torch.tensor([0, 1, 1, 0])


def test_values_by_hand() -> None:
    direction = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    x0 = torch.tensor([[2.0, 0.0], [0.0, -7.0]])
    for options, wanted in (
        ({}, [[0.0, 4.0], [0.3, 0.0]]),
        ({"parallel": 0.5}, [[1.5, 4.0], [0.3, 0.2]]),
        ({"max_norm": 2.5}, [[0.0, 2.0], [0.3, 0.0]]),
        ({"parallel": 1.0, "max_norm": 2.5}, [[1.5, 2.0], [0.3, 0.4]]),
    ):
        torch.testing.assert_close(
            AdaptiveProjection(**options)(direction, x0), torch.tensor(wanted)
        )


def test_the_projection_of_images() -> None:
    """Orthogonal to each sample's data, never longer than the bound; zero data change nothing."""
    d, x0 = randn64(5, 3, 4, 4), randn64(5, 3, 4, 4, seed=1)
    x0[4] = 0.0
    found = AdaptiveProjection(max_norm=4.0)(d, x0)
    assert found.shape == d.shape
    assert float((found * x0).sum((1, 2, 3)).abs().max()) < 1e-12
    norms = found.flatten(1).norm(dim=1)
    assert bool((norms <= 4.0 + 1e-12).all())
    torch.testing.assert_close(found[4], d[4] * 4 / d[4].norm())
    torch.testing.assert_close(AdaptiveProjection(parallel=1.0)(d, x0), d)
    alone = AdaptiveProjection(max_norm=4.0)(d[1:2], x0[1:2])
    assert torch.equal(alone, found[1:2])
    assert torch.equal(AdaptiveProjection(max_norm=4.0)(0 * d, x0), torch.zeros_like(d))


def guided(sde, scale=4.0, **options):
    return ClassifierFreeGuidance(ClassModel(sde), scale, **options)


@pytest.mark.parametrize("rescale", [None, 0.7])
def test_projected_predictions(sde, rescale) -> None:
    """x0 + (scale - 1) P(d), for both kinds of differences, with consistent noise."""
    (x, t), model = random_states(sde, 4), ClassModel(sde)
    weaker = GaussianMixtureModel(sde, [[0.0, 0.1]], [1.5])
    good = model.predict(x, t, class_labels=LABELS).x0
    project = AdaptiveProjection(0.3, 0.05)
    options = {"projection": project, "rescale": rescale}
    for wrapped, bad in (
        (guided(sde, **options), model.predict(x, t).x0),
        (Autoguidance(model, weaker, 4.0, conditions=(), **options), weaker.predict(x, t).x0),
    ):
        prediction = wrapped.predict(x, t, class_labels=LABELS)
        d = good - bad
        d = d * (0.05 / d.norm(dim=1, keepdim=True)).clamp(max=1.0)
        unit = good / good.norm(dim=1, keepdim=True)
        d = d - 0.7 * (d * unit).sum(1, keepdim=True) * unit
        x0 = good + 3 * d
        if rescale:
            stds = [y.std(1, correction=0, keepdim=True) for y in (good, x0)]
            x0 = x0 * (0.7 * stds[0] / stds[1] + 0.3)
        torch.testing.assert_close(prediction.x0, x0, rtol=1e-9, atol=1e-9)
        alpha, sigma = (c.unsqueeze(1) for c in sde.marginal(t))
        eps = (x - alpha * x0) / sigma
        torch.testing.assert_close(prediction.eps, eps, rtol=1e-6, atol=1e-6)


def test_nothing_changes_with_the_identity(sde) -> None:
    (x, t) = random_states(sde, 4)
    plain = guided(sde).predict(x, t, class_labels=LABELS)
    for projection in (AdaptiveProjection(1.0), lambda d, x0: d):
        same = guided(sde, projection=projection).predict(x, t, class_labels=LABELS)
        torch.testing.assert_close(same.x0, plain.x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(same.eps, plain.eps, rtol=1e-7, atol=1e-7)


def test_alpha_may_be_zero() -> None:
    sde = DDPMChain.linear(100).zero_terminal_snr()
    network = lambda x, noise_label, shift: 0.5 * x + shift[:, None]  # noqa: E731
    model = ClassifierFreeGuidance(
        VModel(network, sde), 3.0, null={"shift": 0.0}, projection=AdaptiveProjection()
    )
    x = torch.randn(2, 3, generator=seeded())
    prediction = model.predict(x, torch.ones(2), shift=torch.ones(2))
    assert bool(torch.isfinite(prediction.x0).all())
    torch.testing.assert_close(prediction.eps, x)


def published(model, x, times, labels, *, scale, factor, eta, bound):
    """The paper's algorithm 1, in a loop of DDIM steps."""
    average = 0.0
    for t, s in pairwise(times):
        t, s = t.expand(len(x)), s.expand(len(x))
        good = model.predict(x, t, class_labels=labels).x0
        average = good - model.predict(x, t).x0 + factor * average
        d = average * (bound / average.norm(dim=1, keepdim=True)).clamp(max=1.0)
        along = (d * good).sum(1, keepdim=True) / good.square().sum(1, keepdim=True) * good
        x0 = good + (scale - 1) * (d - along + eta * along)
        (alpha, sigma), (alpha_s, sigma_s) = (model.sde.marginal(r) for r in (t, s))
        eps = (x - alpha[:, None] * x0) / sigma[:, None]
        x = alpha_s[:, None] * x0 + sigma_s[:, None] * eps
    return x


@pytest.mark.parametrize("factor", [-0.75, 0.0, 0.4])
def test_momentum_of_the_published_algorithm(sde, factor) -> None:
    times = sde.time_at_log_snr(torch.linspace(-3.0, 5.0, 9, dtype=DOUBLE))
    model, start = ClassModel(sde), 2 * randn64(4, 2, seed=3)
    projection = AdaptiveProjection(0.2, 0.3)
    sampler = PCSampler(
        guided(sde, projection=projection), GuidanceMomentum(DDIM(), factor), grid=times,
        denoise=False,
    )  # fmt: skip
    wanted = published(model, start, times, LABELS, scale=4.0, factor=factor, eta=0.2, bound=0.3)
    for _ in range(2):  # a run leaves nothing behind
        found = sampler(start, class_labels=LABELS)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    alone = sampler(start[2:3], class_labels=LABELS[2:3])
    torch.testing.assert_close(alone, found[2:3], rtol=1e-12, atol=1e-12)


class Frozen(ScoreModel):
    """A model with a direction that is added to the difference of two predictions."""

    def __init__(self, sde, extra):
        super().__init__()
        self.model, self.sde, self.extra = ClassModel(sde), sde, extra

    def predict(self, x, t, class_labels):
        good, bad = self.model.predict(x, t, class_labels=class_labels), self.model.predict(x, t)
        x0 = good.x0 + 3 * (good.x0 - bad.x0 + self.extra)
        return Prediction.from_x0(x, x0, good.alpha, good.sigma)


def test_both_evaluations_of_a_step_use_the_same_average() -> None:
    sde = VPSDE()
    x, before = randn64(4, 2), 0.1 * randn64(4, 2, seed=1)
    t, s = (torch.full((4,), value, dtype=DOUBLE) for value in (0.6, 0.4))
    model = guided(sde)
    step = GuidanceMomentum(Heun(), -0.5).step(
        model, x, t, s, (None, {model: before}), class_labels=LABELS
    )
    wanted = Heun().step(Frozen(sde, -0.5 * before), x, t, s, class_labels=LABELS)
    torch.testing.assert_close(step.x, wanted.x)
    parts = ClassModel(sde)
    first = parts.predict(x, t, class_labels=LABELS).x0 - parts.predict(x, t).x0
    torch.testing.assert_close(step.state[1][model], first - 0.5 * before)


def test_memory_of_the_predictor_is_kept() -> None:
    """A multistep predictor without momentum is itself, through any wrapper of the model."""
    model = DenoisedModel(guided(VPSDE()), Clip(-5.0, 5.0))
    runs = [
        PCSampler(model, predictor, steps=8)((4, 2), generator=seeded(), class_labels=LABELS)
        for predictor in (DPMSolver2M(), GuidanceMomentum(DPMSolver2M(), 0.0))
    ]
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    found = PCSampler(model, GuidanceMomentum(DPMSolver2M(), -0.5), steps=8)(
        (4, 2), generator=seeded(), class_labels=LABELS
    )
    assert float((found - runs[0]).abs().max()) > 0.01


class Watching(Corrector):
    """A corrector that changes nothing, and keeps the predictions it got."""

    def __init__(self):
        self.seen = []

    def step(self, model, x, t, /, *, generator=None, **cond):
        self.seen.append((x, t, model.predict(x, t, **cond).x0))
        return Step(x, x)


def test_correctors_have_no_momentum() -> None:
    corrector, model = Watching(), guided(VPSDE())
    sampler = PCSampler(model, GuidanceMomentum(DDIM(), -0.5), corrector, steps=5)
    x = sampler((4, 2), generator=seeded(), class_labels=LABELS)
    for state, t, x0 in corrector.seen:
        assert torch.equal(x0, model.predict(state, t, class_labels=LABELS).x0)
    without = PCSampler(model, GuidanceMomentum(DDIM(), -0.5), steps=5)
    assert torch.equal(x, without((4, 2), generator=seeded(), class_labels=LABELS))


def test_no_average_outside_the_interval() -> None:
    """It stays as it is: a step later, the last direction inside is still remembered."""
    sde = VPSDE()
    model = guided(sde, interval=(0.5, 2.0))
    predictor = GuidanceMomentum(DDIM(), -0.5)
    times = sde.time_at_log_snr(-2 * torch.tensor([3.0, 1.0, 0.7, 0.2], dtype=DOUBLE).log())
    x, state, averages = randn64(4, 2), None, []
    for t, s in pairwise(times):
        step = predictor.step(model, x, t.expand(4), s.expand(4), state, class_labels=LABELS)
        x, state = step.x, step.state
        averages.append(state[1].get(model))
    assert averages[0] is None
    parts = ClassModel(sde)
    assert averages[1] is not None
    outside = predictor.step(model, x, times[3].expand(4), times[3].expand(4) / 2, state,
                             class_labels=LABELS)  # fmt: skip
    assert torch.equal(outside.state[1][model], averages[2])
    good = parts.predict(x, times[3].expand(4), class_labels=LABELS).x0
    torch.testing.assert_close(outside.prediction.x0 if outside.prediction else good, good)


def test_each_of_nested_models_has_its_own_average() -> None:
    sde = VPSDE()
    weaker = GaussianMixtureModel(sde, [[0.0, 0.1]], [1.5])
    inner = guided(sde)
    outer = Autoguidance(inner, weaker, 2.0, conditions=())
    t, s = (torch.full((4,), value, dtype=DOUBLE) for value in (0.6, 0.4))
    step = GuidanceMomentum(DDIM()).step(outer, randn64(4, 2), t, s, class_labels=LABELS)
    assert set(step.state[1]) == {inner, outer}


def test_time_travel_starts_anew() -> None:
    sampler = PCSampler(
        guided(VPSDE()), GuidanceMomentum(DDIM()), steps=6, time_travel=TimeTravel(3, 2)
    )
    x = sampler((4, 2), generator=seeded(), class_labels=LABELS)
    assert bool(torch.isfinite(x).all())


def test_no_graph_is_kept_between_steps() -> None:
    model, x = guided(VPSDE()), randn64(4, 2)
    t, s = (torch.full((4,), value, dtype=DOUBLE) for value in (0.6, 0.4))
    with torch.no_grad():
        x.requires_grad_()
        step = GuidanceMomentum(DDIM()).step(model, x, t, s, class_labels=LABELS)
    assert not step.state[1][model].requires_grad
    step = GuidanceMomentum(DDIM()).step(model, x, t, s, class_labels=LABELS)
    assert step.state[1][model].requires_grad


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"parallel": math.inf}, ValueError, "parallel: expected a finite number, got inf"),
        ({"max_norm": 0.0}, ValueError, r"max_norm: expected a number > 0, got 0\.0"),
        ({"max_norm": math.nan}, ValueError, "max_norm: expected a number > 0, got nan"),
        ({"max_norm": "2"}, TypeError, "max_norm: expected a number, got str"),
    ],
)
def test_invalid_projections(options, error, match) -> None:
    with pytest.raises(error, match=match):
        AdaptiveProjection(**options)


def test_other_errors() -> None:
    model = ClassModel(VPSDE())
    x, t = random_states(VPSDE(), 4)
    for bad in (lambda d, x0: d[:1], lambda d, x0: None):
        wrapped = ClassifierFreeGuidance(model, 2.0, projection=bad)
        with pytest.raises(ValueError, match=r"projection: expected a direction of shape \(4, 2\)"):
            wrapped.predict(x, t, class_labels=LABELS)
    with pytest.raises(TypeError, match="projection: expected a callable, got float"):
        ClassifierFreeGuidance(model, 2.0, projection=0.5)
    with pytest.raises(ValueError, match=r"factor: expected a number in \(-1, 1\), got 1.0"):
        GuidanceMomentum(DDIM(), 1.0)
    with pytest.raises(TypeError, match="predictor: expected"):
        GuidanceMomentum(model)
    with pytest.raises(ValueError, match="model: expected ClassifierFreeGuidance or Autoguidance"):
        PCSampler(model, GuidanceMomentum(DDIM()), steps=3)((4, 2))


def test_compiled_steps_keep_the_momentum() -> None:
    """Guidance in a graph has no memory: such a step runs outside of it."""
    model = guided(VPSDE(), projection=AdaptiveProjection(max_norm=0.05))
    predictor, x = GuidanceMomentum(DDIM(), -0.5), randn64(4, 2)
    times = [torch.full((4,), t, dtype=DOUBLE) for t in (0.9, 0.6, 0.3)]

    def steps(x, predictor):
        state = None
        for t, s in pairwise(times):
            step = predictor.step(model, x, t, s, state, class_labels=LABELS)
            x, state = step.x, step.state
        return x

    torch._dynamo.reset()
    with torch.no_grad():
        expected, plain = steps(x, predictor), steps(x, DDIM())
        found = torch.compile(steps, backend="eager")(x, predictor)
    torch.testing.assert_close(found, expected)
    assert float((found - plain).abs().max()) > 1e-4
