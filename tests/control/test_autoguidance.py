"""Autoguidance against closed forms on exact models."""

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, ClassModel, random_states

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Autoguidance,
    ClassifierFreeGuidance,
    DDPMChain,
    EpsModel,
    GaussianMixtureModel,
    LogSNRGrid,
    PCSampler,
    ScheduleTransformedModel,
    ScoreModel,
    X0Model,
)
from diffusionkit.testing import check_score_model

LABELS = torch.tensor([0, 1, 1, 0, 0, 1])


class Recorded(ScoreModel):
    """A model that records the conditions of its calls."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde, self.calls = model, model.sde, []

    def predict(self, x, t, **cond):
        self.calls.append(sorted(cond))
        return self.model.predict(x, t, **cond)


def pair(sde):
    """A model, and one of the same data that is wider in every mode and has lost one."""
    model = GaussianMixtureModel(sde, [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    return model, GaussianMixtureModel(sde, [[0.4, 0.3]], [1.2])


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.3, 1.0, 2.5])
def test_predictions_are_extrapolated(sde, scale) -> None:
    (model, weaker), (x, t) = pair(sde), random_states(sde, 6)
    prediction = Autoguidance(model, weaker, scale).predict(x, t)
    good, bad = model.predict(x, t), weaker.predict(x, t)
    for name in ("x0", "eps", "score"):
        wanted = (1 - scale) * getattr(bad, name) + scale * getattr(good, name)
        torch.testing.assert_close(getattr(prediction, name), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.01, 20.0), EDMSDE()], ids=repr)
def test_samples_of_guided_gaussians(sde) -> None:
    """Of data N(0, c^2), and N(0, C^2) for the weaker model, the flow has a closed form.

    The score -x (w / (a^2 c^2 + s^2) - (w - 1) / (a^2 C^2 + s^2)) takes y = x / a along
    dy / du = y (w / (c^2 + u) - (w - 1) / (C^2 + u)) / 2, u = (s / a)^2, so that y is
    proportional to sqrt((c^2 + u)^w / (C^2 + u)^(w - 1)).
    """
    c, wide, w = 0.5, 0.8, 2.0
    models = [GaussianMixtureModel(sde, torch.zeros(1, 1), [std]) for std in (c, wide)]
    x = torch.tensor([[-1.0], [0.3]], dtype=DOUBLE)
    sampler = PCSampler(
        Autoguidance(*models, w), DDIM(), grid=LogSNRGrid(), steps=1000, denoise=False
    )
    ends = [sampler.times[k] for k in (0, -1)]
    got = sampler(x * sde.prior_std)
    (a, s), (a_end, s_end) = (sde.marginal(t.double().reshape(1)) for t in ends)

    def size(u):
        return ((c**2 + u) ** w / (wide**2 + u) ** (w - 1)).sqrt()

    wanted = x * sde.prior_std / a * a_end * size((s_end / a_end) ** 2) / size((s / a) ** 2)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=0)


def test_guidance_in_an_interval_of_noise_levels(sde) -> None:
    (model, weaker), (x, t) = pair(sde), random_states(sde, 6)
    alpha, sigma = sde.marginal(t)
    ratio = (sigma / alpha).tolist()
    low, high = ratio[1] * (1 + 1e-9), ratio[3] * (1 + 1e-9)
    inside = Autoguidance(model, weaker, 3.0, (low, high))(x, t)
    everywhere = Autoguidance(model, weaker, 3.0)(x, t)
    within = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.bool).unsqueeze(1)
    wanted = torch.where(within, everywhere, model(x, t))
    torch.testing.assert_close(inside, wanted, rtol=1e-11, atol=1e-11)


def test_number_of_evaluations() -> None:
    model, weaker = pair(VPSDE())
    times = LogSNRGrid()(model.sde, 5)
    alpha, sigma = model.sde.marginal(times)
    ratio = (sigma / alpha).tolist()
    interval = (0.5 * (ratio[3] + ratio[4]), ratio[1] * 1.0001)  # the times 1, 2 and 3 of 0 to 5
    for options, wanted in (((2.0,), 12), ((1.0,), 6), ((0.0,), 12), ((2.0, interval), 9)):
        sampler = PCSampler(Autoguidance(model, weaker, *options), DDIM(), steps=5, grid=times)
        sampler((2, 2))
        assert sampler.nfe == wanted


def test_it_composes_with_classifier_free_guidance(sde) -> None:
    """As the model of it, and around it; both with conditions for either."""
    x, t = random_states(sde, 6)
    model, weaker = ClassModel(sde), GaussianMixtureModel(sde, [[0.0, 0.1]], [1.5])
    cond, without, weak = (
        model.predict(x, t, class_labels=LABELS).x0,
        model.predict(x, t).x0,
        weaker.predict(x, t).x0,
    )
    inner = Autoguidance(model, weaker, 2.0, conditions=())
    found = ClassifierFreeGuidance(inner, 3.0).predict(x, t, class_labels=LABELS).x0
    parts = [weak + 2.0 * (part - weak) for part in (without, cond)]
    torch.testing.assert_close(found, parts[0] + 3.0 * (parts[1] - parts[0]))

    free = ClassifierFreeGuidance(model, 3.0)
    found = Autoguidance(free, weaker, 2.0, conditions=()).predict(x, t, class_labels=LABELS).x0
    guided = without + 3.0 * (cond - without)
    torch.testing.assert_close(found, weak + 2.0 * (guided - weak))


@pytest.mark.parametrize(
    ("conditions", "wanted"),
    [(None, ["class_labels", "shift"]), ((), []), (["shift"], ["shift"]), (("other",), [])],
)
def test_conditions_of_the_weaker_model(conditions, wanted) -> None:
    network = lambda x, noise_label, **cond: x  # noqa: E731
    model, weaker = (Recorded(X0Model(network, VPSDE())) for _ in range(2))
    guided = Autoguidance(model, weaker, 2.0, conditions=conditions)
    guided.predict(torch.zeros(6, 2), torch.full((6,), 0.5), class_labels=LABELS, shift=1.0)
    assert model.calls == [["class_labels", "shift"]]
    assert weaker.calls == [wanted]


def test_the_learned_variance_is_that_of_the_model() -> None:
    both = lambda x, noise_label: torch.cat([x, 0.3 * x], 1)  # noqa: E731
    model = EpsModel(both, VPSDE(), variance="learned_range", data_range=(0.0, 1.0))
    guided = Autoguidance(model, EpsModel(lambda x, noise_label: x, VPSDE()), 0.0)
    assert (guided.variance, guided.data_range) == ("learned_range", (0.0, 1.0))
    x, t = random_states(VPSDE(), 3)
    assert torch.equal(guided.predict(x, t).log_var_fraction, (0.3 * x + 1) / 2)


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), DDPMChain.cosine(100)], ids=repr)
def test_guided_models_pass_the_model_checks(sde) -> None:
    assert check_score_model(Autoguidance(*pair(sde), 2.0), (4, 2), exact=True).ok


def test_a_process_of_equal_values_is_the_same_process() -> None:
    model, _ = pair(VPSDE())
    _, weaker = pair(VPSDE())
    x, t = random_states(model.sde, 3)
    guided = Autoguidance(model, weaker, 2.0)
    wide = pair(EDMSDE(sigma_max=160.0))[1]
    other = Autoguidance(model, ScheduleTransformedModel(wide, model.sde), 2.0)
    torch.testing.assert_close(guided(x, t), other(x, t), rtol=1e-6, atol=1e-6)


def test_a_weaker_model_must_fit() -> None:
    model, _ = pair(VPSDE())
    advice = r"; pass ScheduleTransformedModel\(weaker, model.sde\)"
    for sde, found in ((VPSDE(beta_max=20.1), "process of the model, VPSDE"), (EDMSDE(), "T = 1")):
        with pytest.raises(ValueError, match=f"weaker: expected .*{found}.*{advice}"):
            Autoguidance(model, pair(sde)[1], 2.0)
    network = lambda x, noise_label: x  # noqa: E731
    ranges = [EpsModel(network, VPSDE(), data_range=pair) for pair in ((-1.0, 1.0), (0.0, 1.0))]
    with pytest.raises(ValueError, match=r"weaker: .* data_range, \(-1.0, 1.0\), got \(0.0, 1.0\)"):
        Autoguidance(*ranges, 2.0)
    Autoguidance(ranges[0], EpsModel(network, VPSDE()), 2.0)
    for bad in ("class_labels", 3, [3]):
        with pytest.raises(TypeError, match="conditions: expected a tuple or list of names"):
            Autoguidance(model, model, 2.0, conditions=bad)
    with pytest.raises(TypeError, match="weaker: expected"):
        Autoguidance(model, torch.nn.Linear(2, 2), 2.0)


def test_a_weaker_model_corrects_errors_of_its_own_kind() -> None:
    """A model whose modes are too wide, guided by one that is worse, has narrower ones.

    Of one Gaussian the standard deviation is c^w / C^(w - 1), here .26.
    """
    sde = VPSDE()
    means = [[-1.0], [1.0]]
    good, bad = (GaussianMixtureModel(sde, means, [std] * 2) for std in (0.3, 0.4))
    for model, wanted in ((good, 0.30), (Autoguidance(good, bad, 1.5), 0.26)):
        x = PCSampler(model, DDIM(), steps=60, grid=LogSNRGrid())(
            (2000, 1), generator=seeded(), dtype=DOUBLE
        )
        assert float((x.abs() - 1).square().mean().sqrt()) == pytest.approx(wanted, abs=0.02)
