"""Control variates of the bound: unbiased, and how much noise they remove."""

import math

import pytest
import torch
from support import seeded
from torch import Tensor

from diffusionkit import NELBO, VESDE, VPSDE, GaussianMixtureModel, SubVPSDE
from diffusionkit.likelihood._control_variates import LEAST, SquaredErrors

PROCESSES = [VPSDE(), SubVPSDE(), VESDE(sigma_min=0.01, sigma_max=50.0)]


def sequence(draws: int, shape: tuple[int, ...], slope: float, intercept: Tensor) -> SquaredErrors:
    """Errors that are linear in the noise."""
    errors, generator = SquaredErrors(draws), seeded()
    for _ in range(draws):
        eps = torch.randn(shape, generator=generator, dtype=torch.float64)
        errors.add(slope * eps + intercept, eps)
    return errors


def single_draws(model: GaussianMixtureModel, x: Tensor, strata: int) -> Tensor:
    """The standard deviation over x (B, *D) of the path from independent draws in strata."""
    one = NELBO(model, samples=1)
    terms = [one(x, generator=seeded(i)).path for i in range(8)]
    return torch.stack(terms).std() / math.sqrt(strata)


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (2, 3, 4)])
def test_errors_linear_in_the_noise_leave_none(shape) -> None:
    """The mean of ||a eps + b||^2 is a^2 d + ||b||^2: each draw returns it to rounding."""
    b = torch.linspace(-1.0, 2.0, math.prod(shape), dtype=torch.float64).view(shape)
    values = sequence(16, shape, 0.7, b).values()
    d = math.prod(shape[1:])
    expected = 0.49 * d + b.reshape(len(b), -1).square().sum(1)
    torch.testing.assert_close(values, expected.expand(16, -1), rtol=1e-10, atol=1e-10)


def test_few_draws_are_left_as_they_are() -> None:
    errors = sequence(LEAST - 1, (3, 4), 0.7, torch.zeros(3, 4))
    torch.testing.assert_close(errors.values(), torch.stack(errors._squares))


@pytest.mark.parametrize("sde", PROCESSES)
@pytest.mark.parametrize("samples", [10, 50])
def test_the_bound_stays_unbiased(sde, samples) -> None:
    """Of 4,000 estimates at one point of a mixture, against the mean of plain single draws."""
    means = [[-1.0, 0.5], [1.0, 0.0]]
    model = GaussianMixtureModel(sde, means, [0.2, 0.4])
    x = torch.tensor([[0.9, 0.1]], dtype=torch.float64).expand(4000, 2)
    found = NELBO(model, samples=samples)(x, generator=seeded()).nats
    many = x[:1].expand(200_000, 2)
    plain = NELBO(model)(many, generator=seeded(1)).nats
    error = math.sqrt(float(found.var()) / len(x) + float(plain.var()) / len(many))
    assert abs(float(found.mean() - plain.mean())) < 3.5 * error


@pytest.mark.parametrize("sde", PROCESSES)
def test_gaussian_data_leave_a_twentieth_of_the_error(sde) -> None:
    model = GaussianMixtureModel(sde, torch.zeros(1, 8), [0.5])
    x = torch.full((100, 8), 0.4, dtype=torch.float64)
    terms = NELBO(model, samples=100)(x, generator=seeded())
    assert float(terms.path.std()) < 0.05 * float(single_draws(model, x, 100))
    truth = -model.log_prob(x[:1], torch.zeros(1, dtype=torch.float64))
    error = float(terms.nats.std()) / 10
    assert float(terms.nats.mean()) == pytest.approx(float(truth), abs=4 * error)


@pytest.mark.parametrize("sde", PROCESSES)
def test_a_mixture_leaves_less_than_a_third(sde) -> None:
    means = torch.randn(8, 16, generator=seeded(2), dtype=torch.float64)
    model = GaussianMixtureModel(sde, means, [0.2] * 8)
    x = (means[0] + 0.2 * torch.randn(16, generator=seeded(3), dtype=torch.float64)).expand(100, 16)
    terms = NELBO(model, samples=100)(x, generator=seeded())
    assert float(terms.path.std()) < 0.33 * float(single_draws(model, x, 100))
    stated = float(terms.stderr.square().mean().sqrt())
    assert 0.85 < stated / float(terms.nats.std()) < 1.2


def test_gradients_are_those_of_the_plain_bound_on_average() -> None:
    x = torch.full((2000, 2), 0.4, dtype=torch.float64)
    gradients = []
    for samples in (1, 20):
        leaf = x.clone().requires_grad_()
        model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [0.5])
        NELBO(model, samples=samples)(leaf, generator=seeded()).nats.sum().backward()
        gradients.append(leaf.grad)
    one, many = gradients
    # -d log N(.4; 0, .25) / dx = 1.6
    for gradient in gradients:
        error = float(gradient.std()) / math.sqrt(gradient.numel())
        assert abs(float(gradient.mean()) - 1.6) < 4 * error + 1e-3
    assert float(many.std()) < float(one.std()) / 4


def test_a_mask_leaves_the_bound_of_the_kept_elements() -> None:
    """Independent elements: the masked bound of five is the bound of the three that are kept."""
    x = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).expand(2000, 5)
    mask = torch.tensor([[1, 0, 1, 1, 0]]).bool()
    whole = GaussianMixtureModel(VPSDE(), torch.zeros(1, 5), [0.5])
    nats = NELBO(whole, samples=20)(x, mask=mask, generator=seeded()).nats
    part = GaussianMixtureModel(VPSDE(), torch.zeros(1, 3), [0.5])
    truth = -part.log_prob(x[:1, mask[0]], torch.zeros(1, dtype=torch.float64))
    error = float(nats.std()) / math.sqrt(len(x))
    assert error < 0.05
    assert abs(float(nats.mean() - truth)) < 4 * error
