import pytest
import torch
from support import f64, seeded
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from diffusionkit import VESDE, VPSDE, EmpiricalModel, ForwardSDE, GaussianMixtureModel

POINTS = torch.tensor(
    [[-1.5, -0.5], [0.25, 1.0], [1.0, -1.25], [2.0, 0.75], [-0.75, 1.5]], dtype=torch.float64
)


class Fixed(ForwardSDE):
    """A process with the same alpha and sigma at all times."""

    def __init__(self, alpha, sigma):
        self.values = alpha, sigma

    def marginal(self, t):
        return tuple(torch.full_like(t, value) for value in self.values)


# Independent 60-digit values for five points of equal weight.
@pytest.mark.parametrize(
    ("alpha", "sigma", "x", "x0", "score", "log_p"),
    [
        (1.0, 0.5, [0.0, 0.0], [0.17087527838290356, 0.8401719877892242],
         [0.6835011135316142, 3.360687951156897], -4.057352618144226),
        (1.0, 0.5, [-2.0, 2.0], [-0.7498601856139807, 1.4997287075549628],
         [5.000559257544078, -2.001085169780149], -5.685732372665875),
        (1.0, 1.0, [1.2, -0.4], [1.0650208198700146, -0.22989014376849715],
         [-0.13497918012998536, 0.17010985623150288], -3.1491233574588224),
        (0.9, 0.43588989435406733, [0.0, 0.0], [0.1834233942838182, 0.8649901625774936],
         [0.8688476571338757, 4.097321822735496], -3.945113578786549),
        (0.9, 0.43588989435406733, [-2.0, 2.0], [-0.7499824203074823, 1.4999579460429302],
         [6.973767482754031, -3.421251834533489], -7.518449575782867),
        (0.6, 0.8, [1.2, -0.4], [1.1910169242440878, -0.13596766316211842],
         [-0.7584216335211676, 0.497530315785514], -2.587873071062836),
    ],
)  # fmt: skip
def test_finite_data_sets_match_60_digit_values(alpha, sigma, x, x0, score, log_p):
    sde, t = Fixed(alpha, sigma), torch.tensor([0.5], dtype=torch.float64)
    x, x0, score = (torch.tensor([v], dtype=torch.float64) for v in (x, x0, score))
    mixture = GaussianMixtureModel(sde, POINTS, torch.zeros(5))
    for model in (EmpiricalModel(sde, POINTS), EmpiricalModel(sde, POINTS, block=2), mixture):
        prediction = model.predict(x, t)
        torch.testing.assert_close(prediction.x0, x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prediction.score, score, rtol=1e-11, atol=1e-11)
    assert float(mixture.log_prob(x, t)) == pytest.approx(log_p, abs=1e-12)


def test_mixture_score_is_the_gradient_of_its_density(mixture):
    sde = mixture.sde
    t = sde.time_at_log_snr(torch.tensor([6.0, 2.0, 0.0, -2.0], dtype=torch.float64))
    x = sde.perturb(mixture.sample(4, dtype=torch.float64), t).x
    alpha, sigma = (c.unsqueeze(1) for c in sde.marginal(t))
    std = ((alpha * mixture.stds) ** 2 + sigma**2).sqrt()
    parts = Independent(
        Normal(alpha.unsqueeze(2) * mixture.means, std.unsqueeze(2).expand(-1, -1, 2)), 1
    )
    density = MixtureSameFamily(Categorical(mixture.weights.expand(4, -1)), parts)
    x.requires_grad_()
    expected = density.log_prob(x)
    torch.testing.assert_close(mixture.log_prob(x, t), expected, rtol=1e-11, atol=1e-11)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(mixture(x, t), gradient, rtol=1e-9, atol=1e-9)


def test_mixture_x0_is_the_posterior_mean():
    """Tweedie's formula, (x + sigma^2 score) / alpha, where it is well-conditioned."""
    model = GaussianMixtureModel(VPSDE(), [[-1.0], [2.0]], [0.3, 0.1])
    x, t = torch.tensor([[0.1], [-0.4]], dtype=torch.float64), torch.tensor([0.2, 0.4]).double()
    alpha, sigma = (c.unsqueeze(1) for c in VPSDE().marginal(t))
    expected = (x + sigma**2 * model(x, t)) / alpha
    torch.testing.assert_close(model.predict(x, t).x0, expected, rtol=1e-10, atol=1e-10)


def test_mixture_samples_have_the_right_moments():
    model = GaussianMixtureModel(VPSDE(), [[-2.0, 0.0], [2.0, 1.0]], [0.5, 0.1], [0.25, 0.75])
    x = model.sample(40000, generator=seeded(), dtype=torch.float64)
    right = x[:, 0] > 0.5
    # Standard errors: weight .2%, means .5% and .06%, standard deviations .35% of themselves.
    assert float(right.double().mean()) == pytest.approx(0.75, abs=0.008)
    torch.testing.assert_close(x[right].mean(0), f64(2.0, 1.0), rtol=0, atol=3e-3)
    assert float((x[~right][:, 1]).std()) == pytest.approx(0.5, rel=0.03)
    assert float((x[right][:, 1]).std()) == pytest.approx(0.1, rel=0.03)


def test_mixtures_of_images():
    means = torch.randn(3, 1, 4, 4, generator=seeded())
    model = GaussianMixtureModel(VESDE(), means, [0.1, 0.1, 0.1])
    x = model.sample(5)
    assert x.shape == (5, 1, 4, 4)
    assert x.dtype == torch.float32
    assert model(x, torch.full((5,), 0.5)).shape == x.shape


def test_empirical_model_follows_the_nearest_point_at_small_noise():
    model = EmpiricalModel(VESDE(sigma_min=1e-3), POINTS)
    prediction = model.predict(POINTS[[3, 0]] + 1e-3, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(prediction.x0, POINTS[[3, 0]], rtol=0, atol=1e-12)


def test_oracles_are_differentiable(mixture):
    x = mixture.sample(3).requires_grad_()
    t = torch.full((3,), 0.3 * mixture.sde.T)
    for model in (mixture, EmpiricalModel(mixture.sde, mixture.sample(7))):
        (gradient,) = torch.autograd.grad(model(x, t).sum(), x)
        assert gradient.abs().sum() > 0
