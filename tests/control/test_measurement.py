"""Measurements: noise for each element, one variance of the data (PiGDM), nonlinear operators."""

import math

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, GaussianOracle, randn64, random_states

from diffusionkit import (
    EDMSDE,
    VPSDE,
    Ancestral,
    GaussianMixtureModel,
    GradientGuidance,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    LogSNRGrid,
    PCSampler,
    Prediction,
    PseudoinverseGuidance,
    ScoreModel,
)
from diffusionkit.testing import check_score_model

DIMS = 4
MEAN = torch.tensor([0.3, -0.5, 0.8, 0.0], dtype=DOUBLE)
A = torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 1.0, 2.0, 0.3]], dtype=DOUBLE)
Y = torch.tensor([0.6, 1.1], dtype=DOUBLE)
NOISE = torch.tensor([0.1, 2.0], dtype=DOUBLE)
EXACTLY = {"tolerance": 1e-12}


def correlated(sde):
    root = randn64(DIMS, DIMS, seed=5)
    return GaussianOracle(sde, MEAN, 0.15 * root @ root.T + 0.02 * torch.eye(DIMS, dtype=DOUBLE))


def measure(x0):
    return x0 @ A.T.to(x0.dtype)


def close(found, wanted, tolerance=1e-8) -> None:
    torch.testing.assert_close(found.eps, wanted.eps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.x0, wanted.x0, rtol=tolerance, atol=tolerance)


def test_noise_of_each_element(sde) -> None:
    model, (x, t) = correlated(sde), random_states(sde, 6, DIMS)
    wanted = model.posterior(A, Y, NOISE)
    for noise in (NOISE, NOISE.unsqueeze(0)):
        guided = LinearGaussianGuidance(model, measure, Y.unsqueeze(0), noise, **EXACTLY)
        close(guided.predict(x, t), wanted.predict(x, t))


def test_noise_of_each_sample() -> None:
    """As of detectors, some of which are not there: their noise is as good as infinite."""
    sde = VPSDE()
    model, (x, t) = correlated(sde), random_states(sde, 3, DIMS)
    noise = torch.tensor([[0.1, 0.2], [0.1, 1e6], [0.0, 0.3]], dtype=DOUBLE)
    guided = LinearGaussianGuidance(model, measure, Y.expand(3, 2), noise, **EXACTLY)
    found = guided.predict(x, t).x0
    for k in range(3):
        wanted = model.posterior(A, Y, noise[k]).predict(x[k : k + 1], t[k : k + 1]).x0
        torch.testing.assert_close(found[k : k + 1], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.4, NOISE], ids=["none", "one", "each"])
def test_pseudoinverse_guidance_is_exact_for_equal_variances(sde, noise) -> None:
    std = 0.7
    model = GaussianOracle(sde, MEAN, std**2 * torch.eye(DIMS, dtype=DOUBLE))
    x, t = random_states(sde, 8, DIMS)
    guided = PseudoinverseGuidance(model, measure, Y.unsqueeze(0), noise, std, **EXACTLY)
    close(guided.predict(x, t), model.posterior(A, Y, noise).predict(x, t))


@pytest.mark.parametrize("noise", [0.0, NOISE], ids=["none", "each"])
def test_pseudoinverse_guidance_is_exact_for_variances_of_channels(sde, noise) -> None:
    stds = torch.tensor([0.7, 0.2, 1.5, 0.05], dtype=DOUBLE)
    model = GaussianOracle(sde, MEAN, stds.square().diag())
    x, t = random_states(sde, 8, DIMS)
    for given in (stds, stds.tolist()):
        guided = PseudoinverseGuidance(model, measure, Y.unsqueeze(0), noise, given, **EXACTLY)
        close(guided.predict(x, t), model.posterior(A, Y, noise).predict(x, t))
    guided = PseudoinverseGuidance(model, measure, Y.unsqueeze(0), noise, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"x: expected 2 channels, as sigma_data has, got .* 4\)"):
        guided.predict(x, t)


@pytest.mark.parametrize("noise", [0.0, torch.tensor([0.0, 0.3])], ids=["none", "some"])
def test_without_noise_at_the_end_there_is_nothing_to_guide(noise) -> None:
    """At sigma = 0 the state is the data, whatever was measured."""
    model, x, t = correlated(VPSDE()), randn64(2, DIMS), torch.zeros(2, dtype=DOUBLE)
    for kind in (LinearGaussianGuidance, LinearizedGaussianGuidance):
        guided = kind(model, measure, Y.unsqueeze(0), noise)
        torch.testing.assert_close(guided.predict(x, t).x0.detach(), x)


def test_pseudoinverse_guidance_of_other_data(sde) -> None:
    """The published formula, with dense matrices."""
    model, (x, t) = correlated(sde), random_states(sde, 5, DIMS)
    guided = PseudoinverseGuidance(model, measure, Y.unsqueeze(0), 0.3, **EXACTLY)
    prior, found = model.predict(x, t), guided.predict(x, t)
    alpha, sigma = sde.marginal(t)
    for k in range(5):

        def x0(z, k=k):
            return model.predict(z.unsqueeze(0), t[k : k + 1]).x0[0]

        jacobian = torch.autograd.functional.jacobian(x0, x[k])
        r2 = (sigma[k] / alpha[k]) ** 2 / (1 + (sigma[k] / alpha[k]) ** 2)
        total = 0.3**2 * torch.eye(2, dtype=DOUBLE) + r2 * A @ A.T
        grad = jacobian.T @ A.T @ torch.linalg.solve(total, Y - A @ prior.x0[k])
        wanted = prior.eps[k] - sigma[k] * grad
        torch.testing.assert_close(found.eps[k], wanted, rtol=1e-7, atol=1e-7)


class Counted(ScoreModel):
    """A model that counts the backward passes through it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde, self.passes = model, model.sde, 0

    def predict(self, x, t, **cond):
        x = x.view_as(x)
        x.register_hook(self.count)
        return self.model.predict(x, t, **cond)

    def count(self, grad):
        self.passes += 1


@pytest.mark.parametrize(
    ("kind", "passes"),
    [(PseudoinverseGuidance, 1), (LinearGaussianGuidance, 3), (LinearizedGaussianGuidance, 3)],
)
def test_number_of_backward_passes(kind, passes) -> None:
    model = Counted(correlated(VPSDE()))
    guided = kind(model, measure, Y.unsqueeze(0), 0.3, **EXACTLY)
    guided.predict(*random_states(VPSDE(), 4, DIMS))
    assert model.passes == passes


def test_a_linear_operator_is_its_own_linearization(sde) -> None:
    model, (x, t) = correlated(sde), random_states(sde, 6, DIMS)
    parts = model, measure, Y.unsqueeze(0), NOISE
    linear = LinearGaussianGuidance(*parts, **EXACTLY).predict(x, t)
    close(LinearizedGaussianGuidance(*parts, **EXACTLY).predict(x, t), linear)
    affine = model, lambda x0: measure(x0) + 3.0, Y.unsqueeze(0) + 3.0, NOISE
    close(LinearizedGaussianGuidance(*affine, **EXACTLY).predict(x, t), linear)


def test_linearized_guidance_by_hand(sde) -> None:
    """Data N(0, c^2) and y = x^2 + noise: one number each."""
    c, noise, y = 0.5, 0.2, torch.tensor([[0.4]], dtype=DOUBLE)
    model = GaussianMixtureModel(sde, [[0.0]], [c])
    x, t = random_states(sde, 6, 1)
    found = LinearizedGaussianGuidance(model, torch.square, y, noise, **EXACTLY).predict(x, t)
    alpha, sigma = (part.unsqueeze(1) for part in sde.marginal(t))
    total = alpha**2 * c**2 + sigma**2
    x0 = alpha * c**2 / total * x
    slope, variance = 2 * x0, c**2 * sigma**2 / total
    grad = alpha * c**2 / total * slope * (y - x0**2) / (noise**2 + slope**2 * variance)
    wanted = Prediction.from_eps(x, sigma / total * x - sigma * grad, *sde.marginal(t))
    close(found, wanted, 1e-6)


def test_nonlinear_posterior_by_quadrature() -> None:
    """A saturated detector, y = tanh(2 x0) + noise, within the docstring's numbers."""
    center, spread, noise, y = 0.5, 0.5, 0.5, 0.9
    line = torch.linspace(-3.0, 4.0, 20001, dtype=DOUBLE)
    logs = -0.5 * ((line - center) / spread) ** 2
    p = torch.softmax(logs - 0.5 * ((y - torch.tanh(2 * line)) / noise) ** 2, 0)
    mean = p @ line
    std = (p @ (line - mean) ** 2).sqrt()
    model = GaussianMixtureModel(VPSDE(), [[center]], [spread])
    guided = LinearizedGaussianGuidance(
        model, lambda x0: torch.tanh(2 * x0), torch.tensor([[y]]), noise
    )
    sampler = PCSampler(guided, Ancestral(), steps=100, grid=LogSNRGrid())
    x = sampler((3000, 1), generator=seeded(), dtype=DOUBLE)
    assert abs(float((x.mean() - mean) / std)) < 0.15
    assert float(x.std() / std) == pytest.approx(1.0, abs=0.12)


def test_images_and_fields() -> None:
    """Of shape (B, C, H, W): the modulus of a Fourier transform, and its residual goes down."""
    sde = EDMSDE()
    model = GaussianMixtureModel(sde, torch.zeros(1, 1, 4, 4), [0.5])
    truth = 0.5 * randn64(1, 1, 4, 4, seed=2)

    def modulus(x0):
        return torch.fft.rfft2(x0).abs()

    guided = LinearizedGaussianGuidance(model, modulus, modulus(truth), 0.1)
    start = truth + 2.0 * randn64(3, 1, 4, 4, seed=3)
    t = torch.full((3,), 2.0, dtype=DOUBLE)
    before, after = (m.predict(start, t).x0.detach() for m in (model, guided))
    errors = [(modulus(x0) - modulus(truth)).square().mean() for x0 in (before, after)]
    assert errors[1] < 0.5 * errors[0]


KINDS = [PseudoinverseGuidance, LinearGaussianGuidance, LinearizedGaussianGuidance]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_agree_in_every_gradient_mode(kind) -> None:
    guided = kind(correlated(VPSDE()), measure, Y.unsqueeze(0), NOISE, **EXACTLY)
    x, t = random_states(VPSDE(), 4, DIMS)
    wanted = guided(x, t)
    with torch.no_grad():
        plain = guided(x, t)
    with torch.inference_mode():
        inferred = guided(x.clone(), t.clone())
    for found in (plain, inferred):
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-10)
    torch.autograd.gradcheck(lambda x: guided(x, t), x.clone().requires_grad_())
    assert check_score_model(guided, (4, DIMS), exact=True).ok


@pytest.mark.parametrize("kind", [*KINDS, "DPS"])
def test_a_sample_does_not_depend_on_its_batch(kind) -> None:
    """With measurements of its own, which a norm over the batch would mix (as some DPS do)."""
    sde = VPSDE()
    model = GaussianMixtureModel(sde, [[0.0, 0.0]], [0.5])
    y = torch.tensor([[0.8, 0.0], [-40.0, 7.0], [0.1, 0.2]], dtype=DOUBLE)

    def samples(rows):
        some = y[rows]
        if kind == "DPS":
            norm = lambda x0: -5.0 * (some - x0).norm(dim=1)  # noqa: E731
            guided = GradientGuidance(model, norm)
        else:
            guided = kind(model, lambda x0: x0, some, 0.3)
        start = randn64(3, 2)[rows]
        sampler = PCSampler(guided, Ancestral(), steps=10, grid=LogSNRGrid())
        return sampler(start, generator=[seeded(k) for k in rows])

    together = samples([0, 1, 2])
    for k in range(3):
        torch.testing.assert_close(samples([k])[0], together[k], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("noise", "error", "match"),
    [
        (torch.tensor([0.1, -0.2]), ValueError, "noise_std: expected numbers >= 0, got -0.2"),
        (torch.tensor([0.1, math.nan]), ValueError, "noise_std: expected finite values"),
        (torch.ones(3), ValueError, r"noise_std: .* to that of y, \(1, 2\), got \(3,\)"),
        (torch.ones(3, 2), ValueError, r"noise_std: .* of y, \(1, 2\), got \(3, 2\)"),
        (torch.ones(1, 1, 2), ValueError, r"noise_std: .* got \(1, 1, 2\)"),
        (torch.tensor([1, 2]), TypeError, "noise_std: expected a floating-point tensor"),
        (-1.0, ValueError, "noise_std: expected a finite number >= 0, got -1.0"),
        ("0.1", TypeError, "noise_std: expected a number, got str"),
    ],
)
def test_invalid_noise(kind, noise, error, match) -> None:
    with pytest.raises(error, match=match):
        kind(correlated(VPSDE()), measure, Y.unsqueeze(0), noise)


def test_other_errors() -> None:
    model, (x, t) = correlated(VPSDE()), random_states(VPSDE(), 5, DIMS)
    with pytest.raises(ValueError, match="sigma_data: expected a finite number > 0"):
        PseudoinverseGuidance(model, measure, Y.unsqueeze(0), 0.1, 0.0)
    with pytest.raises(ValueError, match="operator: expected a linear function"):
        PseudoinverseGuidance(model, lambda x0: x0[:, :2] ** 2, torch.ones(1, 2), 0.1)(x, t)
    with pytest.raises(ValueError, match=r"operator: expected measurements .* got \(5, 3\)"):
        LinearizedGaussianGuidance(model, lambda x0: x0[:, :3], torch.ones(1, 2), 0.1)(x, t)
    with pytest.raises(ValueError, match="operator: expected a differentiable function"):
        LinearizedGaussianGuidance(
            model, lambda x0: x0[:, :2].detach().round(), torch.ones(1, 2), 0.1
        )(x, t)


@pytest.mark.parametrize("iterations", [2, 10])
def test_what_counts_as_not_measured_costs_no_digits(iterations) -> None:
    """In single precision: noise of .05 and of 1e5 in one system."""
    sde, std = VPSDE(), 0.5
    model = GaussianMixtureModel(sde, torch.zeros(1, 8), [std])
    noise = torch.where(torch.arange(8) < 4, 0.05, 1e5)
    y, x = (randn64(3, 8, seed=k).float() for k in (1, 2))
    for t in torch.tensor([[0.01], [0.3], [0.9]]):
        guided = LinearGaussianGuidance(model, lambda x0: x0, y, noise, iterations=iterations)
        found, before = (m.predict(x, t.expand(3)).x0.detach() for m in (guided, model))
        alpha, sigma = sde.marginal(t)
        variance = (std * sigma) ** 2 / ((alpha * std) ** 2 + sigma**2)
        wanted = before + variance / (noise**2 + variance) * (y - before)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
