"""Guidance by linear measurements, against exact posteriors."""

import math

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, GaussianOracle, randn64, random_states

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    DPMSolver2M,
    EpsModel,
    GaussianMixtureModel,
    Langevin,
    LogSNRGrid,
    PCSampler,
    ReverseDiffusion,
    X0Model,
)
from diffusionkit.control._minimal_residual import minimal_residual
from diffusionkit.control.guidance import ClassifierGuidance, GradientGuidance
from diffusionkit.control.linear_gaussian import LinearGaussianGuidance
from diffusionkit.testing import check_score_model

DIMS = 4
MEAN = torch.tensor([0.3, -0.5, 0.8, 0.0], dtype=DOUBLE)
A = torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 1.0, 2.0, 0.3]], dtype=DOUBLE)
Y = torch.tensor([0.6, 1.1], dtype=DOUBLE)


def covariance():
    root = randn64(DIMS, DIMS, seed=5)
    return 0.15 * root @ root.T + 0.02 * torch.eye(DIMS, dtype=DOUBLE)


def measure(x0):
    return x0 @ A.T.to(x0.dtype)


def guided_and_posterior(sde, noise_std, **options):
    model = GaussianOracle(sde, MEAN, covariance())
    options = {"tolerance": 1e-12} | options
    guided = LinearGaussianGuidance(model, measure, Y.unsqueeze(0), noise_std, **options)
    return guided, model.posterior(A, Y, noise_std)


@pytest.mark.parametrize("noise_std", [0.0, 0.1, 2.0])
def test_prediction_is_exact_for_gaussian_data(sde, noise_std) -> None:
    guided, posterior = guided_and_posterior(sde, noise_std)
    x, t = random_states(sde, 15, DIMS)
    prediction, wanted = guided.predict(x, t), posterior.predict(x, t)
    torch.testing.assert_close(prediction.eps, wanted.eps, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prediction.x0, wanted.x0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("noise_std", [0.05, 1.0])
def test_deterministic_samples_are_of_the_posterior(sde, noise_std) -> None:
    """The sampler is affine, so its mean and covariance are known exactly."""
    guided, posterior = guided_and_posterior(sde, noise_std)
    ends = torch.cat([torch.zeros(1, DIMS), torch.eye(DIMS)]).double() * sde.prior_std
    x = PCSampler(guided, DPMSolver2M(), steps=80, grid=LogSNRGrid())(ends)
    columns = x[1:] - x[0]
    # The flow starts from N(0, prior_std^2) and not from the posterior at T: with VE and EDM a
    # fraction of about 1 / 20 of the data is left there.
    torch.testing.assert_close(x[0], posterior.mean, rtol=0, atol=0.04)
    torch.testing.assert_close(columns.T @ columns, posterior.cov, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("predictor", "corrector"),
    [(Ancestral(), None), (ReverseDiffusion(), Langevin(snr=0.1, norm="batch"))],
    ids=["ancestral", "pc"],
)
def test_stochastic_samples_are_of_the_posterior(predictor, corrector) -> None:
    guided, posterior = guided_and_posterior(VPSDE(), 0.3)
    n = 4000
    sampler = PCSampler(guided, predictor, corrector, steps=100, grid=LogSNRGrid())
    x = sampler((n, DIMS), generator=seeded(), dtype=DOUBLE)
    torch.testing.assert_close(x.mean(0), posterior.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), posterior.cov, rtol=0, atol=0.05)


def test_guidance_of_a_guided_model(sde) -> None:
    """A component of a mixture is Gaussian, and its posterior known."""
    means, stds = torch.tensor([[-1.0, 0.5], [0.8, 0.2]], dtype=DOUBLE), (0.3, 0.5)
    mixture = GaussianMixtureModel(sde, means, stds)
    parts = [GaussianMixtureModel(sde, means[k : k + 1], stds[k : k + 1]) for k in (0, 1)]
    of_class = ClassifierGuidance(
        mixture, lambda x, t: torch.stack([part.log_prob(x, t) for part in parts], 1)
    )
    add, seen = torch.tensor([[1.0, 1.0]], dtype=DOUBLE), torch.tensor([0.4], dtype=DOUBLE)
    guided = LinearGaussianGuidance(
        of_class, lambda x0: x0 @ add.T, seen.unsqueeze(0), 0.2, tolerance=1e-12
    )
    x, t = random_states(sde, 8)
    with torch.no_grad():
        prediction = guided(x, t, class_labels=torch.arange(8) % 2)
    for k in (0, 1):
        cov = stds[k] ** 2 * torch.eye(2, dtype=DOUBLE)
        posterior = GaussianOracle(sde, means[k], cov).posterior(add, seen, 0.2)
        torch.testing.assert_close(
            prediction[k::2], posterior(x[k::2], t[k::2]), rtol=1e-7, atol=1e-7
        )


def test_bias_on_mixtures(sde) -> None:
    """The weights are those of the docstring's table; the posterior's is .85."""
    means = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=DOUBLE)
    model = GaussianMixtureModel(sde, means, [0.3, 0.3])
    guides = {
        0.72: LinearGaussianGuidance(model, lambda x0: x0[:, :1], torch.tensor([[0.3]]), 0.5),
        0.98: GradientGuidance(model, lambda x0: -2 * (x0[:, 0] - 0.3) ** 2),
    }
    for share, guided in guides.items():
        sampler = PCSampler(guided, DDIM(), steps=80, grid=LogSNRGrid())
        x = sampler((1500, 2), generator=seeded(), dtype=DOUBLE)
        found = torch.cdist(x, means).argmin(1).double().mean()
        assert float(found) == pytest.approx(share, abs=0.03)


def test_one_measurement_for_each_sample() -> None:
    sde = VESDE(sigma_max=10.0)
    model = GaussianOracle(sde, MEAN, covariance())
    y = randn64(5, 2, seed=3)
    x, t = random_states(sde, 5, DIMS)
    together = LinearGaussianGuidance(model, measure, y, 0.2, tolerance=1e-12)(x, t)
    for k in range(5):
        wanted = model.posterior(A, y[k], 0.2)(x[k : k + 1], t[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], wanted, rtol=1e-8, atol=1e-8)


def test_measurements_of_any_shape() -> None:
    """Images (B, C, H, W), pooled; the mixture has one component, a Gaussian."""
    sde, tau = VPSDE(), 0.5
    model = GaussianMixtureModel(sde, torch.zeros(1, 2, 4, 4), [0.7])
    pool = torch.nn.functional.avg_pool2d
    y = randn64(1, 2, 2, 2, seed=4)
    guided = LinearGaussianGuidance(model, lambda x0: pool(x0, 2), y, tau)
    t = torch.ones(3, dtype=DOUBLE)
    prediction = guided.predict(torch.zeros(3, 2, 4, 4, dtype=DOUBLE), t).x0
    up = torch.nn.functional.interpolate(y, scale_factor=2)
    wanted = 0.49 / (0.49 + 4 * tau**2) * up  # the posterior of four pixels and their mean
    torch.testing.assert_close(prediction, wanted.expand(3, -1, -1, -1), rtol=1e-3, atol=1e-6)


def test_float32_keeps_its_digits(sde) -> None:
    """At all times, so for all sigma and alpha."""
    guided, posterior = guided_and_posterior(sde, 0.1, tolerance=1e-6)
    x, t = random_states(sde, 15, DIMS)
    prediction, wanted = guided.predict(x.float(), t), posterior.predict(x, t)
    torch.testing.assert_close(prediction.eps.double(), wanted.eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prediction.x0.double(), wanted.x0, rtol=1e-3, atol=1e-3)


def test_iterations_and_tolerance_limit_the_accuracy() -> None:
    """With two measurements, two iterations are exact and one is not."""
    sde = VPSDE()
    x, t = random_states(sde, 6, DIMS)
    exact = guided_and_posterior(sde, 0.1)[1](x, t)
    for options, ok in (({"iterations": 2}, True), ({"iterations": 1}, False),
                        ({"tolerance": 0.9}, False)):  # fmt: skip
        score = guided_and_posterior(sde, 0.1, **options)[0](x, t)
        assert torch.allclose(score, exact, rtol=1e-6, atol=1e-6) is ok


def test_predictions_agree_in_every_gradient_mode() -> None:
    guided, _ = guided_and_posterior(VPSDE(), 0.2)
    x, t = random_states(VPSDE(), 4, DIMS)
    wanted = guided(x, t)
    with torch.no_grad():
        plain = guided(x, t)
    with torch.inference_mode():
        inferred = guided(x.clone(), t.clone())
    for prediction in (plain, inferred):
        assert not prediction.requires_grad
        torch.testing.assert_close(prediction, wanted.detach(), rtol=1e-12, atol=0)
    function = lambda x: guided(x, t)  # noqa: E731
    torch.autograd.gradcheck(function, x.clone().requires_grad_())


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), DDPMChain.cosine(100)], ids=repr)
def test_guided_models_pass_the_model_checks(sde) -> None:
    guided, _ = guided_and_posterior(sde, 0.2)
    assert check_score_model(guided, (4, DIMS), exact=True).ok


def test_guided_models_keep_variance_and_conditions() -> None:
    both = lambda x, noise_label, shift: torch.cat([x * shift, 0.3 * x], 1)  # noqa: E731
    inner = EpsModel(both, VPSDE(), variance="learned_range", data_range=(0.0, 1.0))
    guided = LinearGaussianGuidance(inner, measure, Y.unsqueeze(0), 0.2)
    assert (guided.variance, guided.data_range) == ("learned_range", (0.0, 1.0))
    x, t = random_states(VPSDE(), 3, DIMS)
    with torch.no_grad():
        prediction = guided.predict(x, t, shift=0.5)
    assert torch.equal(prediction.log_var_fraction, (0.3 * x + 1) / 2)
    assert not prediction.log_var_fraction.requires_grad


def test_systems_are_solved_independently() -> None:
    """General, diagonal, negative definite and zero systems do not affect one another."""
    root = randn64(4, 6, 6)
    matrices = root @ root.mT + 0.1 * torch.eye(6, dtype=DOUBLE)
    matrices[1] = 3 * torch.eye(6, dtype=DOUBLE)
    matrices[2] = -matrices[2]
    b = randn64(4, 6, seed=1)
    b[3] = 0.0
    calls = []

    def product(v):
        calls.append(v)
        return torch.einsum("bij,bj->bi", matrices[: len(v)], v)

    v, _ = minimal_residual(product, b, iterations=40, tolerance=1e-11)
    assert 6 <= len(calls) <= 8
    torch.testing.assert_close(v[:3], torch.linalg.solve(matrices[:3], b[:3]), rtol=1e-8, atol=1e-9)
    assert torch.equal(v[3], torch.zeros(6, dtype=DOUBLE))
    alone, _ = minimal_residual(product, b[:1], iterations=40, tolerance=1e-11)
    torch.testing.assert_close(alone, v[:1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
def test_tolerance_applies_to_the_residual(tolerance) -> None:
    """It is met, by no more than one iteration too many."""
    diagonal = torch.linspace(1.0, 30.0, 60, dtype=DOUBLE)
    b = torch.ones(1, 60, dtype=DOUBLE)
    v, _ = minimal_residual(lambda v: diagonal * v, b, iterations=60, tolerance=tolerance)
    share = float((b - diagonal * v).norm() / b.norm())
    assert 0.3 * tolerance < share <= tolerance


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": None}, TypeError, "model: expected a ScoreModel"),
        ({"operator": A}, TypeError, "operator: expected a callable, got Tensor"),
        ({"y": [1.0]}, TypeError, r"y: expected a tensor"),
        ({"y": torch.tensor([[math.nan, 0.0]])}, ValueError, "y: expected finite values"),
        ({"y": torch.tensor([[1, 0]])}, TypeError, "y: expected a floating-point tensor"),
        ({"noise_std": -0.1}, ValueError, "noise_std: expected a finite number >= 0, got -0.1"),
        ({"noise_std": math.nan}, ValueError, "noise_std: .* got nan"),
        ({"noise_std": True}, TypeError, "noise_std: expected a number, got bool"),
        ({"iterations": 0}, ValueError, "iterations: expected an integer >= 1"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a finite number > 0"),
    ],
)
def test_invalid_options(change, error, match) -> None:
    parts = {"operator": measure, "y": Y.unsqueeze(0), "noise_std": 0.1}
    parts["model"] = GaussianOracle(VPSDE(), MEAN, covariance())
    with pytest.raises(error, match=match):
        LinearGaussianGuidance(**parts | change)


@pytest.mark.parametrize(
    ("operator", "y", "match"),
    [
        (lambda x0: x0[:, :3], torch.zeros(1, 2), r"operator: .* of y, \(5, 2\), got \(5, 3"),
        (lambda x0: x0[:1, :2], torch.zeros(5, 2), r"operator: .* got \(1, 2\)"),
        (lambda x0: None, torch.zeros(5, 2), "operator: .* got NoneType"),
        (measure, torch.zeros(3, 2), "y: expected one measurement, or .* 5 samples, got 3"),
        (lambda x0: x0[:, :2].detach(), torch.zeros(1, 2), "operator: expected a differentiable"),
    ],
)
def test_invalid_operators(operator, y, match) -> None:
    model = GaussianOracle(VPSDE(), MEAN, covariance())
    x, t = random_states(VPSDE(), 5, DIMS)
    with pytest.raises(ValueError, match=match):
        LinearGaussianGuidance(model, operator, y, 0.1).predict(x, t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("operator", "what"),
    [
        (lambda x0: x0[:, :2] ** 2, r"A \(u \+ v\) = A u \+ A v"),
        (lambda x0: x0[:, :2].clamp(-0.5, 0.5), r"A \(u \+ v\)"),
        (lambda x0: x0[:, :2] + 1, "A 0 = 0"),
        (lambda x0: x0[:, :2] * math.nan, "A 0 = 0"),
    ],
    ids=["square", "clamp", "affine", "nan"],
)
def test_operators_must_be_linear(dtype, operator, what) -> None:
    model = X0Model(lambda x, noise_label: x, VPSDE())
    x, t = torch.randn(6, DIMS, dtype=dtype), torch.linspace(0.1, 0.9, 6)
    with pytest.raises(ValueError, match=f"operator: expected a linear function, with {what}"):
        LinearGaussianGuidance(model, operator, torch.ones(1, 2), 0.3).predict(x, t)
    LinearGaussianGuidance(model, measure, torch.ones(1, 2), 0.3).predict(x, t)


def test_linearity_is_checked_once() -> None:
    calls = []

    def counted(x0):
        calls.append(x0)
        return measure(x0)

    model = X0Model(lambda x, noise_label: x, VPSDE())
    guided = LinearGaussianGuidance(model, counted, Y.unsqueeze(0), 0.3, iterations=1)
    state = torch.get_rng_state()
    x, t = random_states(VPSDE(), 3, DIMS)
    counts = []
    for _ in range(3):
        calls.clear()
        guided.predict(x, t)
        counts.append(len(calls))
    assert counts == [6, 2, 2]
    assert torch.equal(torch.get_rng_state(), state)
