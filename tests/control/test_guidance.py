"""Guidance by classifiers and by gradients, against exact scores."""

import math

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, Classes, GaussianOracle, randn64, random_states

from diffusionkit import (
    DDIM,
    EDMSDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    EpsModel,
    GaussianMixtureModel,
    Langevin,
    LogSNRGrid,
    PCSampler,
    ProbabilityFlow,
    ReverseDiffusion,
    X0Model,
)
from diffusionkit.control.classifier import NoiseClassifier
from diffusionkit.control.classifier_free import ClassifierFreeGuidance
from diffusionkit.control.guidance import ClassifierGuidance, GradientGuidance
from diffusionkit.control.linear_gaussian import LinearGaussianGuidance
from diffusionkit.testing import check_score_model


@pytest.fixture
def plain():
    return GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_true_classifier_gives_the_score_of_the_class(sde, scale) -> None:
    classes = Classes(sde)
    x, t = random_states(sde, 12)
    labels = torch.arange(12) % 2
    guided = ClassifierGuidance(classes.model, classes.classifier, scale)
    base, wanted = classes.model(x, t), classes.score(x, t, labels)
    prediction = guided.predict(x, t, class_labels=labels)
    tilted = base + scale * (wanted - base)
    torch.testing.assert_close(prediction.score, tilted, rtol=1e-9, atol=1e-9)
    alpha, sigma = (c.unsqueeze(1) for c in sde.marginal(t))
    torch.testing.assert_close(prediction.eps, -sigma * tilted, rtol=1e-10, atol=1e-10)
    x0 = (x + sigma**2 * tilted) / alpha
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-10, atol=1e-8)


def test_float32_keeps_its_digits(sde) -> None:
    """At the smallest sigma and at the smallest alpha."""
    classes = Classes(sde)
    guided = ClassifierGuidance(classes.model, lambda x, t: torch.cat([x, -x], 1), 2.0)
    t = torch.tensor([max(sde.t_min, sde.t_stop), sde.T], dtype=torch.float64)
    alpha, sigma = (c.unsqueeze(1) for c in sde.marginal(t))
    x = (alpha * torch.tensor([0.7, -0.4]) + 0.3 * sigma).float()
    labels = torch.tensor([0, 0])
    prediction, exact = (guided.predict(state, t, class_labels=labels) for state in (x, x.double()))
    torch.testing.assert_close(prediction.x0.double(), exact.x0, rtol=3e-6, atol=0)
    torch.testing.assert_close(prediction.eps.double(), exact.eps, rtol=3e-6, atol=0)


@pytest.mark.parametrize(
    ("predictor", "corrector", "steps"),
    [
        (DDIM(), None, 80),
        (Ancestral(), None, 100),
        (ReverseDiffusion(), Langevin(snr=0.1, norm="batch"), 80),
    ],
    ids=["ddim", "ancestral", "pc"],
)
def test_samples_are_of_the_class(sde, predictor, corrector, steps) -> None:
    """Means, spread and the weights within a class, within four standard errors and a bias."""
    classes = Classes(sde)
    guided = ClassifierGuidance(classes.model, classes.classifier)
    n = 500
    labels = torch.arange(2 * n) // n
    sampler = PCSampler(guided, predictor, corrector, steps=steps, grid=LogSNRGrid())
    z = randn64(n, 2, seed=1)
    z = torch.stack([z, -z], 1).view(2 * n, 2)  # a mean of zero in either class
    x = sampler(z * sde.prior_std, generator=seeded(), class_labels=labels)
    assert sampler.nfe == (steps + 1 if corrector is None else 2 * steps + 1)
    nearest = torch.cdist(x, classes.means).argmin(1)
    assert (nearest[:n] < 2).double().mean() > 0.995
    share = (nearest[:n] == 0).double().mean()
    assert float(share) == pytest.approx(2 / 7, abs=0.08)
    torch.testing.assert_close(x[n:].mean(0), classes.means[2], rtol=0, atol=0.08)
    assert float(x[n:].std(0).mean()) == pytest.approx(0.4, rel=0.1)
    for k in (0, 1):
        part = x[:n][nearest[:n] == k]
        torch.testing.assert_close(part.mean(0), classes.means[k], rtol=0, atol=0.09)


@pytest.mark.parametrize("steps", [10, 40])
def test_ancestral_steps_reach_the_mean_of_the_class(sde, steps) -> None:
    """1.0 in any number of steps, with a standard error of .008.

    Classes N(-1, .5^2) and N(1, .5^2). A published sampler shifts the mean of an ancestral step by
    the posterior's variance times the gradient, and reaches .507 in 10 steps.
    """
    parts = [GaussianMixtureModel(sde, [[mean]], [0.5]) for mean in (-1.0, 1.0)]
    model = GaussianMixtureModel(sde, [[-1.0], [1.0]], [0.5, 0.5])
    guided = ClassifierGuidance(
        model, lambda x, t: torch.stack([part.log_prob(x, t) for part in parts], 1)
    )
    sampler = PCSampler(guided, Ancestral(), steps=steps, grid=LogSNRGrid())
    labels = torch.ones(4000, dtype=torch.int64)
    x = sampler((4000, 1), generator=seeded(), dtype=DOUBLE, class_labels=labels)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("kind", ["classifier", "gradient"])
def test_predictions_agree_in_every_gradient_mode(mixture, kind) -> None:
    x, t = random_states(mixture.sde, 4)
    labels = torch.tensor([0, 1, 0, 1])
    guided, cond = {
        "classifier": (
            ClassifierGuidance(mixture, lambda x, t: x**3 * t[:, None]),
            {"class_labels": labels},
        ),
        "gradient": (GradientGuidance(mixture, lambda x0: -(x0**4).sum(1)), {}),
    }[kind]
    wanted = guided.predict(x, t, **cond)
    with torch.no_grad():
        plain = guided.predict(x, t, **cond)
    with torch.inference_mode():
        inner = {name: value.clone() for name, value in cond.items()}
        inferred = guided.predict(x.clone(), t.clone(), **inner)
        sampled = PCSampler(guided, DDIM(), steps=5)(x * 1.0, **inner)
    for prediction in (plain, inferred):
        assert not prediction.x0.requires_grad
        assert not prediction.eps.requires_grad
        assert torch.equal(prediction.x0, wanted.x0)
        assert torch.equal(prediction.eps, wanted.eps)
    assert torch.equal(sampled, PCSampler(guided, DDIM(), steps=5)(x * 1.0, **cond))


def test_tabulated_times_are_kept_in_inference_mode() -> None:
    """A float32 time alone would not give the same bits."""
    guided = GradientGuidance(
        EpsModel(lambda x, noise_label: torch.tanh(x), VPSDE()), lambda x0: -(x0**2).sum(1)
    )
    runs = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            runs.append(PCSampler(guided, DDIM(), steps=7)((3, 2), generator=seeded()))
    assert torch.equal(*runs)


def test_guided_scores_are_differentiable() -> None:
    """By the state, as likelihoods need, through the classifier's gradient."""
    sde = VPSDE()
    classes = Classes(sde)
    x, t = random_states(sde, 3)
    labels = torch.tensor([0, 0, 1])
    for guided, cond in (
        (
            ClassifierGuidance(classes.model, classes.classifier, 1.5),
            {"class_labels": labels},
        ),
        (GradientGuidance(classes.model, lambda x0: -(x0**2).sum(1)), {}),
    ):
        function = lambda x, guided=guided, cond=cond: guided(x, t, **cond)  # noqa: E731
        torch.autograd.gradcheck(function, x.clone().requires_grad_())
    assert not x.requires_grad


def test_flow_of_a_guided_model_is_invertible() -> None:
    classes = Classes(VPSDE())
    guided = ClassifierGuidance(classes.model, classes.classifier)
    x = torch.tensor([[-0.5, -0.9], [0.7, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    flow = ProbabilityFlow(guided)
    back = flow.decode(flow.encode(x, class_labels=labels), class_labels=labels)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-2)


def test_training_through_guidance_reaches_the_parameters() -> None:
    net = torch.nn.Linear(2, 2).double()
    classifier = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()).double()
    guided = ClassifierGuidance(
        X0Model(lambda x, noise_label: net(x), VPSDE()), lambda x, t: classifier(x)
    )
    x, t = random_states(VPSDE(), 2)
    guided(x, t, class_labels=torch.tensor([0, 2])).square().sum().backward()
    assert net.weight.grad.abs().sum() > 0
    assert classifier[0].weight.grad.abs().sum() > 0


def test_samplers_put_classifiers_in_evaluation_mode() -> None:
    modes = []

    class Watched(torch.nn.Linear):
        def forward(self, x, t):
            modes.append(self.training)
            return super().forward(x)

    classifier = Watched(2, 2)
    model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [1.0])
    guided = ClassifierGuidance(model, classifier)
    PCSampler(guided, DDIM(), steps=3)((4, 2), class_labels=torch.tensor([0, 1, 1, 0]))
    assert modes == [False] * 4
    assert classifier.training
    assert classifier.weight.grad is None


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), DDPMChain.cosine(100)], ids=repr)
def test_guided_models_pass_the_model_checks(sde) -> None:
    classes = Classes(sde)
    labels = torch.tensor([0, 1, 1, 0])
    guided = ClassifierGuidance(classes.model, classes.classifier)
    assert check_score_model(guided, (4, 2), exact=True, class_labels=labels).ok
    gradient = GradientGuidance(classes.model, lambda x0: -(x0**2).sum(1), 0.5)
    assert check_score_model(gradient, (4, 2), exact=True).ok


def test_guided_models_keep_variance_and_data_range(mixture) -> None:
    def both(x, noise_label, shift=0.0):
        x = torch.tanh(x)  # so that the samples are finite
        return torch.cat([x + shift, 0.3 * x], 1)

    x, t = random_states(mixture.sde, 2)
    inner = X0Model(both, mixture.sde, variance="learned_range", data_range=(0.0, 1.0))
    for guided, cond in (
        (ClassifierGuidance(inner, lambda x, t: x), {"class_labels": torch.tensor([0, 1])}),
        (GradientGuidance(inner, lambda x0: -(x0**2).sum(1)), {}),
        (ClassifierFreeGuidance(inner, 2.0), {"shift": 1.0}),
    ):
        assert (guided.variance, guided.data_range) == ("learned_range", (0.0, 1.0))
        with torch.no_grad():
            prediction = guided.predict(x, t, **cond)
        assert torch.equal(prediction.log_var_fraction, (0.3 * torch.tanh(x) + 1) / 2)
        assert not prediction.log_var_fraction.requires_grad
        assert prediction.log_var is None
        PCSampler(guided, Ancestral(variance="model"), steps=3)((2, 2), **cond)


def test_a_conditional_model_gets_the_class_labels_too() -> None:
    def network(x, noise_label, class_labels):
        return 0 * x + class_labels.to(x).unsqueeze(1)

    model = EpsModel(network, VPSDE())
    x, t, labels = torch.zeros(2, 1), torch.full((2,), 0.5), torch.tensor([0, 1])
    guided = ClassifierGuidance(model, lambda x, t: torch.cat([x, -x], 1), 0.0, conditional=True)
    assert guided.predict(x, t, class_labels=labels).eps.flatten().tolist() == [0.0, 1.0]


def test_conditions_reach_the_model_and_class_labels_do_not(mixture) -> None:
    def network(x, label, shift):
        return x + shift

    x, t = random_states(mixture.sde, 2)
    model = X0Model(network, mixture.sde)
    guided = ClassifierGuidance(model, lambda x, t: 0 * x)
    assert torch.equal(guided.predict(x, t, class_labels=torch.tensor([0, 1]), shift=1.0).x0, x + 1)
    gradient = GradientGuidance(model, lambda x0: 0 * x0.sum(1))
    assert torch.equal(gradient.predict(x, t, shift=2.0).x0, x + 2)


def dawson_from(low, x):
    """Return the integral of exp(u^2 - x^2) from low to x, Dawson's function for low = 0."""
    u = torch.linspace(low, x, 10001, dtype=torch.float64)
    return torch.trapezoid(torch.exp(u**2 - x**2), u)


def test_bias_of_gradient_guidance(sde) -> None:
    """Means and variances are those in the docstring, not those of the posterior."""
    y, n = 1.3, 2000
    model = GaussianOracle(sde, [0.0], [[1.0]])
    r = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)

    def sampled(predictor, start, steps, copies):
        precision = r.repeat_interleave(copies) ** 2
        guided = GradientGuidance(model, lambda x0: -0.5 * precision * (y - x0[:, 0]) ** 2)
        sampler = PCSampler(guided, predictor, steps=steps, grid=LogSNRGrid())
        return sampler(start, generator=seeded()).view(3, copies)

    def close(got, wanted, tolerance):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=0)

    # The flow is affine, so it maps 0 to the mean.
    ends = torch.tensor([[0.0], [sde.prior_std]], dtype=torch.float64).repeat(3, 1)
    mean, above = sampled(DDIM(), ends, 500, 2).unbind(1)
    alpha, sigma = sde.marginal(torch.tensor([sde.T], dtype=torch.float64))
    first = float(alpha / (alpha**2 + sigma**2).sqrt())  # 0, if T were infinite
    dawson = torch.stack([dawson_from(first * k, k) for k in (r / math.sqrt(2)).tolist()])
    close(mean, y * math.sqrt(2) * r * dawson, 0.02)
    close(above - mean, torch.exp(-(r**2) / 2), 0.03)

    noise = randn64(3 * n, 1, seed=1)
    x = sampled(Ancestral(), noise * sde.prior_std, 300, n)
    close(x.mean(1), y * -torch.expm1(-(r**2)), 0.08)
    close(x.var(1), -torch.expm1(-2 * r**2) / (2 * r**2), 0.08)


def test_scale_of_gradient_guidance(mixture) -> None:
    x, t = random_states(mixture.sde, 5)
    log_likelihood = lambda x0: -(x0**4).sum(1)  # noqa: E731
    base = mixture(x, t)
    one, three = (GradientGuidance(mixture, log_likelihood, s)(x, t) for s in (1.0, 3.0))
    torch.testing.assert_close(three - base, 3 * (one - base))
    at = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(log_likelihood(mixture.predict(at, t).x0).sum(), at)
    torch.testing.assert_close((one - base).detach(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: ClassifierGuidance(lambda x, t: x, lambda x, t: x), TypeError, "model: expe"),
        (lambda m: ClassifierGuidance(m, None), TypeError, "classifier: expected a callable"),
        (lambda m: ClassifierGuidance(m, m, math.nan), ValueError, "scale: expected a finite"),
        (lambda m: ClassifierGuidance(m, m, math.inf), ValueError, "scale: .* got inf"),
        (lambda m: ClassifierGuidance(m, m, True), TypeError, "scale: expected a number, got bool"),
        (lambda m: GradientGuidance(None, m), TypeError, "model: expected a ScoreModel"),
        (lambda m: GradientGuidance(m, 3), TypeError, "log_likelihood: expected a callable"),
        (lambda m: GradientGuidance(m, m, -math.inf), ValueError, "scale: .* got -inf"),
    ],
)
def test_invalid_options(plain, make, error, match) -> None:
    with pytest.raises(error, match=match):
        make(plain)


GOOD = torch.tensor([0, 1, 0])


@pytest.mark.parametrize(
    ("classifier", "labels", "error", "match"),
    [
        (lambda x, t: x, None, TypeError, r"class_labels: .* of shape \(3,\), got NoneType"),
        (lambda x, t: x, [0, 1, 0], TypeError, "class_labels: expected a tensor"),
        (lambda x, t: x, torch.tensor([0, 1]), ValueError, r"labels: .* \(3,\), got \(2,\)"),
        (lambda x, t: x, GOOD.view(3, 1), ValueError, r"class_labels: .* got \(3, 1\)"),
        (lambda x, t: x, GOOD.double(), TypeError, "labels: expected integers, got torch.float64"),
        (lambda x, t: x, GOOD.bool(), TypeError, "labels: expected integers, got torch.bool"),
        (lambda x, t: x, GOOD + 1, ValueError, r"class_labels: .* in \[0, 2\), .* got 1 to 2"),
        (lambda x, t: x, -GOOD, ValueError, r"class_labels: .* in \[0, 2\), .* got -1 to 0"),
        (lambda x, t: x[:, 0], GOOD, ValueError, r"logits of shape \(3, K\), got \(3,\)"),
        (lambda x, t: x[:2], GOOD, ValueError, r"logits of shape \(3, K\), got \(2, 2\)"),
        (lambda x, t: None, GOOD, ValueError, r"logits of shape \(3, K\), got NoneType"),
        (lambda x, t: x.detach(), GOOD, ValueError, "classifier: expected a differentiable"),
    ],
)  # fmt: skip
def test_invalid_class_labels_and_logits(plain, classifier, labels, error, match) -> None:
    x, t = random_states(plain.sde, 3)
    with pytest.raises(error, match=match):
        ClassifierGuidance(plain, classifier).predict(x, t, class_labels=labels)


@pytest.mark.parametrize(
    ("log_likelihood", "match"),
    [
        (lambda x0: x0, r"log_likelihood: expected one number .* \(3,\), got \(3, 2\)"),
        (lambda x0: x0.sum(), r"log_likelihood: .* got \(\)"),
        (lambda x0: 1.0, "log_likelihood: .* got float"),
        (lambda x0: x0.detach().sum(1), "log_likelihood: expected a differentiable function"),
        (lambda x0: torch.ones(3, requires_grad=True) * 2, "log_likelihood: expected a differen"),
    ],
)
def test_invalid_likelihoods(plain, log_likelihood, match) -> None:
    x, t = random_states(plain.sde, 3)
    with pytest.raises(ValueError, match=match):
        GradientGuidance(plain, log_likelihood).predict(x, t)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (DDPMChain.cosine(100), "expected the process of the model, VPSDE .* got DDPMChain with"),
        (VPSDE(beta_max=10.0), "expected the process of the model, VPSDE .* got VPSDE with"),
        (EDMSDE(), "classifier: expected a process with T = 1, got 80"),
    ],
    ids=["chain", "beta", "T"],
)
def test_classifier_of_another_process(plain, other, match) -> None:
    with pytest.raises(ValueError, match=match):
        ClassifierGuidance(plain, NoiseClassifier(lambda x, noise_label: x, other))
    ClassifierGuidance(plain, NoiseClassifier(lambda x, noise_label: x, VPSDE()))  # an equal one
    free = lambda x, t: x  # noqa: E731
    free.sde = "no process"
    ClassifierGuidance(plain, free)


def test_repr(plain) -> None:
    assert "    len,\n    scale=2.5,\n" in repr(ClassifierGuidance(plain, len, 2.5))
    assert "scale=0.5" in repr(GradientGuidance(plain, len, 0.5))
    free = ClassifierFreeGuidance(plain, 3.0, (0.1, 2.0), 0.7, null={"class_labels": 10})
    options = ("scale=3.0", "interval=(0.1, 2.0)", "rescale=0.7", "null={'class_labels': 10}")
    assert ",\n    ".join(options) in repr(free)
    linear = LinearGaussianGuidance(plain, len, torch.ones(1, 1), 0.25)
    options = ("y=[[1]]", "noise_std=0.25", "iterations=10", "tolerance=1e-06")
    assert ",\n    ".join(options) in repr(linear)
