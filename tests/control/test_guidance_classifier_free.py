"""Classifier-free guidance against exact conditional models."""

import math

import pytest
import torch
from support import seeded
from support.gaussian_oracle import Classes, ClassModel, random_states

from diffusionkit import (
    DDIM,
    VPSDE,
    Ancestral,
    DDPMChain,
    EpsModel,
    Langevin,
    LogSNRGrid,
    PCSampler,
    ReverseDiffusion,
    ScoreModel,
    VModel,
    X0Model,
)
from diffusionkit.control.classifier_free import ClassifierFreeGuidance
from diffusionkit.control.guidance import ClassifierGuidance
from diffusionkit.testing import check_score_model

LABELS = torch.tensor([0, 1, 1, 0, 0, 1])


class Recorded(ScoreModel):
    """A model that records the conditions of its calls."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde, self.calls = model, model.sde, []

    def predict(self, x, t, **cond):
        self.calls.append(cond)
        return self.model.predict(x, t, **cond)


@pytest.mark.parametrize("null", [None, {"class_labels": 2}, {"class_labels": torch.full((6,), 2)}])
def test_predictions_are_extrapolated(sde, null) -> None:
    model, x_t = ClassModel(sde), random_states(sde, 6)
    with_, without = model.predict(*x_t, class_labels=LABELS), model.predict(*x_t)
    for scale in (-0.5, 0.0, 0.3, 1.0, 4.0):
        guided = ClassifierFreeGuidance(model, scale, null=null)
        prediction = guided.predict(*x_t, class_labels=LABELS)
        for name in ("x0", "eps", "score"):
            c, u = getattr(with_, name), getattr(without, name)
            wanted = u + scale * (c - u)
            torch.testing.assert_close(getattr(prediction, name), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_it_equals_guidance_with_the_true_classifier(sde, scale) -> None:
    """Both are the score of p(x) p(y | x)^scale."""
    classes, (x, t) = Classes(sde), random_states(sde, 6)
    free = ClassifierFreeGuidance(ClassModel(sde), scale)(x, t, class_labels=LABELS)
    guided = ClassifierGuidance(classes.model, classes.classifier, scale)
    by_classifier = guided(x, t, class_labels=LABELS)
    torch.testing.assert_close(free, by_classifier, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_number_of_evaluations(scale) -> None:
    model = Recorded(ClassModel(VPSDE()))
    sampler = PCSampler(ClassifierFreeGuidance(model, scale), DDIM(), steps=3)
    sampler((6, 2), class_labels=LABELS)
    assert sum(bool(cond) for cond in model.calls) == (4 if scale > 0.0 else 0)
    assert sum(not cond for cond in model.calls) == (4 if scale != 1.0 else 0)
    assert sampler.nfe == 3 * len(model.calls)  # this model counts as its parts


def test_guidance_in_an_interval_of_noise_levels(sde) -> None:
    """Each sample has its own noise level; the interval contains its upper end only."""
    model, (x, t) = ClassModel(sde), random_states(sde, 6)
    alpha, sigma = sde.marginal(t)
    ratio = (sigma / alpha).tolist()
    low, high = ratio[1] * (1 + 1e-9), ratio[3] * (1 + 1e-9)
    everywhere = ClassifierFreeGuidance(model, 3.0)(x, t, class_labels=LABELS)
    inside = ClassifierFreeGuidance(model, 3.0, (low, high))(x, t, class_labels=LABELS)
    conditional = model(x, t, class_labels=LABELS)
    within = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.bool)
    wanted = torch.where(within.unsqueeze(1), everywhere, conditional)
    torch.testing.assert_close(inside, wanted, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(everywhere[~within], conditional[~within])
    for interval in ((0.0, math.inf), (0, 2 * max(ratio))):
        always = ClassifierFreeGuidance(model, 3.0, interval)(x, t, class_labels=LABELS)
        torch.testing.assert_close(always, everywhere)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_one_evaluation_outside_the_interval(sde, scale) -> None:
    """At a sampler's times, and where all samples of a batch are outside."""
    model = Recorded(ClassModel(sde))
    times = LogSNRGrid()(sde, 5)
    alpha, sigma = sde.marginal(times)
    ratio = (sigma / alpha).tolist()
    guided = ClassifierFreeGuidance(model, scale, (0.5 * (ratio[3] + ratio[4]), ratio[1] * 1.0001))
    sampler = PCSampler(guided, DDIM(), steps=5, grid=times)
    sampler((6, 2), class_labels=LABELS)
    # Guided at the times 1, 2 and 3 of 0 to 5.
    assert len(model.calls) == (9 if scale == 2.0 else 6)
    assert sampler.nfe == 3 * len(model.calls)  # this model counts as its parts
    assert sum(not cond for cond in model.calls) == 3
    model.calls.clear()
    guided.predict(torch.zeros(6, 2), times[-1].expand(6), class_labels=LABELS)
    assert len(model.calls) == 1
    assert "class_labels" in model.calls[0]


@pytest.mark.parametrize(("scale", "rescale"), [(6.0, 0.0), (6.0, 0.7), (6.0, 1.0), (1.0, 0.7)])
def test_data_are_rescaled(sde, scale, rescale) -> None:
    model, (x, t) = ClassModel(sde), random_states(sde, 6)
    plain = ClassifierFreeGuidance(model, scale).predict(x, t, class_labels=LABELS)
    guided = ClassifierFreeGuidance(model, scale, None, rescale)
    prediction = guided.predict(x, t, class_labels=LABELS)
    conditional = model.predict(x, t, class_labels=LABELS)
    for k in range(6):
        wanted, now = conditional.x0[k].std(), plain.x0[k].std()
        x0 = rescale * plain.x0[k] * wanted / now + (1 - rescale) * plain.x0[k]
        torch.testing.assert_close(prediction.x0[k], x0, rtol=1e-10, atol=1e-10)
    alpha, sigma = (c.unsqueeze(1) for c in sde.marginal(t))
    eps = (x - alpha * prediction.x0) / sigma
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-6, atol=1e-6)


def test_constant_data_are_not_rescaled() -> None:
    model = X0Model(lambda x, noise_label, level: 0 * x + level.view(-1, 1, 1), VPSDE())
    guided = ClassifierFreeGuidance(model, 2.0, rescale=1.0, null={"level": 0.0})
    x, t = torch.randn(2, 3, 4), torch.tensor([0.2, 0.7])
    prediction = guided.predict(x, t, level=torch.tensor([1.0, -1.0])).x0
    assert torch.equal(prediction, torch.tensor([2.0, -2.0]).view(2, 1, 1).expand(2, 3, 4))


@pytest.mark.parametrize(
    ("predictor", "corrector"),
    [(DDIM(), None), (Ancestral(), None), (ReverseDiffusion(), Langevin(norm="batch"))],
    ids=["ddim", "ancestral", "pc"],
)
def test_samples_are_of_the_class(predictor, corrector) -> None:
    """Scale 1 is the model of the class; a larger one moves samples away from the other class."""
    sde = VPSDE()
    classes = Classes(sde)
    class_labels = torch.ones(1500, dtype=torch.int64)
    confidence = []
    for scale in (1.0, 3.0):
        guided = ClassifierFreeGuidance(ClassModel(sde), scale, null={"class_labels": 2})
        sampler = PCSampler(guided, predictor, corrector, steps=80, grid=LogSNRGrid())
        x = sampler((1500, 2), generator=seeded(), class_labels=class_labels).double()
        t = torch.full((1500,), sde.t_min, dtype=torch.float64)
        confidence.append(torch.softmax(classes.classifier(x, t), 1)[:, 1].mean())
        if scale == 1.0:
            torch.testing.assert_close(x.mean(0), classes.means[2], rtol=0, atol=0.05)
    assert confidence[1] > 0.5 * (1 + confidence[0])


def test_null_conditions_replace_those_they_name() -> None:
    model = Recorded(X0Model(lambda x, noise_label, **cond: x, VPSDE()))
    x, t = torch.zeros(2, 3), torch.tensor([0.1, 0.9])
    cond = {
        "class_labels": torch.tensor([1, 2]),
        "text": torch.ones(2, 4),
        "size": 7,
        "name": "cat",
    }
    null = {"class_labels": 10, "text": torch.arange(4), "name": ""}
    ClassifierFreeGuidance(model, 2.0, null=null).predict(x, t, **cond)
    without, with_ = model.calls
    assert with_ is not without
    assert all(with_[name] is cond[name] for name in cond)
    assert torch.equal(without["class_labels"], torch.tensor([10, 10]))
    assert without["class_labels"].dtype == torch.int64
    assert torch.equal(without["text"], torch.arange(4.0).expand(2, 4))
    assert (without["size"], without["name"]) == (7, "")
    assert ClassifierFreeGuidance(model, 2.0).predict(x, t, **cond) is not None
    assert model.calls[2] == {}


@pytest.mark.parametrize("options", [{}, {"rescale": 0.5}], ids=["plain", "rescaled"])
def test_learned_variances_are_conditional(options) -> None:
    def network(x, label, shift=0.0):
        return torch.cat([x, 0.3 * x + shift], 1)

    for kind, name in (("learned", "log_var"), ("learned_range", "log_var_fraction")):
        model = EpsModel(network, VPSDE(), variance=kind)
        x, t = random_states(VPSDE(), 3)
        prediction = ClassifierFreeGuidance(model, 2.0, **options).predict(x, t, shift=0.4)
        wanted = 0.3 * x + 0.4 if kind == "learned" else (0.3 * x + 1.4) / 2
        torch.testing.assert_close(getattr(prediction, name), wanted)


def test_alpha_may_be_zero() -> None:
    """Unlike a gradient, a difference of two predictions determines x0 there."""
    sde = DDPMChain.linear(100).zero_terminal_snr()
    model = VModel(lambda x, noise_label, shift=0.0: 0 * x + shift, sde)
    for interval in (None, (1.0, math.inf)):
        guided = ClassifierFreeGuidance(model, 3.0, interval)
        for t in (torch.ones(2), torch.tensor([0.99, 1.0])):
            prediction = guided.predict(torch.zeros(2, 2), t, shift=1.0)
            assert torch.allclose(prediction.x0, torch.full((2, 2), -3.0), rtol=1e-2)
        x = PCSampler(guided, DDIM(), steps=3)((2, 2), shift=1.0)
        assert torch.isfinite(x).all()


def test_guided_models_pass_the_model_checks() -> None:
    sde = VPSDE()
    for options in ({}, {"interval": (0.1, 3.0)}):
        guided = ClassifierFreeGuidance(ClassModel(sde), 2.0, **options)
        assert check_score_model(guided, (6, 2), exact=True, class_labels=LABELS).ok
    guided = ClassifierFreeGuidance(ClassModel(sde), 2.0, rescale=0.5)
    assert check_score_model(guided, (6, 2), class_labels=LABELS).ok


def test_predictions_are_in_float32_at_least() -> None:
    model = X0Model(lambda x, noise_label, shift=0.0: x + shift, VPSDE())
    x, t = torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0.1, 0.9])
    for options in ({}, {"interval": (0.0, 1.0)}, {"rescale": 0.5}):
        prediction = ClassifierFreeGuidance(model, 2.0, **options).predict(x, t, shift=1.0)
        assert (prediction.x0.dtype, prediction.eps.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": -math.inf}, ValueError, "scale: expected a finite number"),
        ({"scale": True}, TypeError, "scale: expected a number, got bool"),
        ({"scale": "2"}, TypeError, "scale: expected a number, got str"),
        ({"interval": (1.0, 1.0)}, ValueError, "interval: expected 0 <= low < high, got 1.0"),
        ({"interval": (-0.1, 1.0)}, ValueError, "interval: expected 0 <= low < high, got -0.1"),
        ({"interval": (0.0, math.nan)}, ValueError, "interval: expected 0 <= low < high"),
        ({"interval": (None, 1.0)}, TypeError, "interval: expected a number, got NoneType"),
        ({"rescale": 1.1}, ValueError, r"rescale: expected a number in \[0, 1\], got 1.1"),
        ({"rescale": -0.1}, ValueError, "rescale: expected"),
        ({"rescale": math.nan}, ValueError, "rescale: expected"),
        ({"rescale": True}, TypeError, "rescale: expected a number, got bool"),
        ({"interval": 3.0}, TypeError, r"interval: expected a pair \(low, high\), got 3.0"),
        ({"interval": "ab"}, TypeError, "interval: expected a pair .* got 'ab'"),
        ({"interval": (1.0, 2.0, 3.0)}, ValueError, "interval: expected a pair .* 3.0"),
        ({"null": 10}, TypeError, "null: expected a mapping of names to values, got 10"),
        ({"null": "class_labels"}, TypeError, "null: expected a mapping .* got 'class_labels'"),
        ({"null": {3: 10}}, TypeError, "null: expected a mapping .* got {3: 10}"),
        ({"null": {}}, ValueError, "null: expected at least one name and value"),
        ({"model": lambda x, t: x}, TypeError, "model: expected a ScoreModel"),
    ],
)
def test_invalid_options(options, error, match) -> None:
    with pytest.raises(error, match=match):
        ClassifierFreeGuidance(**{"model": ClassModel(VPSDE()), "scale": 2.0} | options)


@pytest.mark.parametrize(
    ("null", "cond", "error", "match"),
    [
        (None, {}, ValueError, "expected a condition to guide by, got none"),
        ({"class_labels": 2}, {}, ValueError, r"expected a condition class_labels=..., got \[\]"),
        (None, {"class_labels": None}, ValueError, "expected a condition to guide by, got none"),
        ({"class_labels": 2}, {"class_labels": None, "y": LABELS}, ValueError,
         r"expected a condition class_labels=..., got \['y'\] that are not None"),
        ({"class_labels": 2}, {"y": LABELS}, ValueError, r"class_labels=..., got \['y'\]"),
        ({"class_labels": LABELS[:4]}, {"class_labels": LABELS}, ValueError,
         r"labels: expected a shape that fits the condition's, \(6,\), got \(4,\)"),
        ({"class_labels": 2.0}, {"class_labels": LABELS}, TypeError,
         "class_labels: expected torch.int64"),
    ],
)  # fmt: skip
def test_invalid_conditions(null, cond, error, match) -> None:
    """At every scale, also where the condition is not used."""
    x, t = random_states(VPSDE(), 6)
    for scale in (0.0, 1.0, 2.0):
        with pytest.raises(error, match=match):
            ClassifierFreeGuidance(ClassModel(VPSDE()), scale, null=null).predict(x, t, **cond)


def test_invalid_times() -> None:
    guided = ClassifierFreeGuidance(ClassModel(VPSDE()), 2.0, (0.1, 1.0))
    with pytest.raises(ValueError, match="t: expected one time for each sample"):
        guided.predict(torch.zeros(6, 2), torch.ones(5), class_labels=LABELS)
