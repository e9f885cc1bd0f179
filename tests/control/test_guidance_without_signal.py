"""Guidance from alpha = 0, where the guided data are those of the posterior, whatever the state."""

import pytest
import torch
from support import seeded
from support.gaussian_oracle import Classes, GaussianOracle, randn64

from diffusionkit import (
    DDIM,
    AdaptiveProjection,
    Autoguidance,
    ClassifierGuidance,
    DDPMChain,
    FlowMatchingSDE,
    GradientGuidance,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    PCSampler,
    PseudoinverseGuidance,
    X0Model,
)

SDES = {"flow": FlowMatchingSDE(), "chain": DDPMChain.linear(1000).zero_terminal_snr()}
LARGEST = 1 / 160  # the limit is taken where alpha / sigma is this
MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
A, Y = torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)


@pytest.fixture(params=SDES)
def sde(request):
    return SDES[request.param]


def noise(n=6):
    return randn64(n, 2, seed=3)


@pytest.mark.parametrize("t", [torch.ones(6), torch.tensor([1.0, 0.5, 1.0, 0.2, 0.9, 1.0])])
def test_the_true_classifier_gives_the_mean_of_the_class(sde, t):
    """At alpha = 0 to the accuracy of the limit, elsewhere exactly; the noise is the state."""
    classes, t = Classes(sde), t.double()
    guided = ClassifierGuidance(classes.model, classes.classifier)
    x, labels = noise(), torch.arange(6) % 2
    found = guided.predict(x, t, class_labels=labels)
    for k in range(6):
        right = classes.of_class[labels[k]].predict(x[k : k + 1], t[k : k + 1])
        off = (found.x0[k] - right.x0[0]).abs().max()
        assert float(off.detach()) < (3 * LARGEST if t[k] == 1 else 1e-9)
    torch.testing.assert_close(found.eps[t == 1], x[t == 1], rtol=0, atol=1e-12)


def test_linear_measurements(sde):
    model = GaussianOracle(sde, MEAN, COV)
    guided = LinearGaussianGuidance(model, lambda x0: x0 @ A.T, Y.unsqueeze(0), 0.3)
    found = guided.predict(noise(), torch.ones(6, dtype=torch.float64))
    right = model.posterior(A, Y, 0.3).mean.expand(6, 2)
    torch.testing.assert_close(found.x0, right, rtol=0, atol=3 * LARGEST)
    torch.testing.assert_close(found.eps, noise())


def test_one_variance_and_linearized_measurements(sde):
    """PiGDM with the data's own variance; and y = x^2, linear about the mean of the data."""
    std = 0.6
    model = GaussianOracle(sde, MEAN, std**2 * torch.eye(2, dtype=torch.float64))
    t = torch.ones(6, dtype=torch.float64)
    guided = PseudoinverseGuidance(model, lambda x0: x0 @ A.T, Y.unsqueeze(0), 0.3, std)
    right = model.posterior(A, Y, 0.3).mean.expand(6, 2)
    torch.testing.assert_close(guided.predict(noise(), t).x0, right, rtol=0, atol=3 * LARGEST)
    square = LinearizedGaussianGuidance(model, torch.square, torch.ones(1, 2).double(), 0.3)
    gain = std**2 * 2 * MEAN / (0.3**2 + (2 * MEAN * std) ** 2)
    right = (MEAN + gain * (1 - MEAN**2)).expand(6, 2)
    torch.testing.assert_close(square.predict(noise(), t).x0, right, rtol=0, atol=5 * LARGEST)


def test_guidance_by_a_difference(sde):
    """No gradient is taken: exact at alpha = 0, projected or not."""
    model, weaker = (GaussianOracle(sde, mean, COV) for mean in (MEAN, MEAN - 0.2))
    x, t = noise(), torch.ones(6, dtype=torch.float64)
    for projection in (None, AdaptiveProjection(1.0)):
        found = Autoguidance(model, weaker, 3.0, projection=projection).predict(x, t)
        torch.testing.assert_close(found.x0, (MEAN + 0.4).expand(6, 2))
        torch.testing.assert_close(found.eps, x)


def test_gradients_of_a_likelihood(sde):
    """The gradient at the mean of the data, times their covariance."""
    model = GaussianOracle(sde, MEAN, COV)
    guided = GradientGuidance(model, lambda x0: -0.5 * (x0 @ A.T - Y).square().sum(1), 1.5)
    found = guided.predict(noise(), torch.ones(6, dtype=torch.float64))
    right = MEAN + 1.5 * COV @ (A.T @ (Y - A @ MEAN))
    torch.testing.assert_close(found.x0, right.expand(6, 2), rtol=0, atol=3 * LARGEST)


def test_samples_from_pure_noise(sde):
    """DDIM's are those of the exact model of the posterior."""
    model = GaussianOracle(sde, MEAN, COV)
    guided = LinearGaussianGuidance(model, lambda x0: x0 @ A.T, Y.unsqueeze(0), 0.3)
    found, right = (
        PCSampler(m, DDIM(), steps=40)((8, 2), generator=seeded(), dtype=torch.float64)
        for m in (guided, model.posterior(A, Y, 0.3))
    )
    torch.testing.assert_close(found, right, rtol=0, atol=1e-3)


def test_times_of_samplers_equal_plain_tensors(sde):
    """A sampler's first time, a float inside, and the same in a tensor."""
    model = X0Model(lambda x, noise_label: torch.tanh(x), sde)
    guided = GradientGuidance(model, lambda x0: -x0.square().sum(1))
    x, seen = noise().float(), []

    class First(DDIM):
        def step(self, model, x, t, s, state=None, /, **options):
            seen.append((model.predict(x, t), model.predict(x, t.clone())))
            return super().step(model, x, t, s, state, **options)

    PCSampler(guided, First(), steps=2)(x)
    for found, plain in seen:
        torch.testing.assert_close(found.x0, plain.x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.eps, plain.eps, rtol=1e-5, atol=1e-5)
