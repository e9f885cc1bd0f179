import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit import Perturbed, Prediction, Step, expand
from diffusionkit._coefficients import add_noise, linear


def setup(dtype=torch.float64):
    g = seeded()
    x0, eps = (torch.randn(3, 2, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    alpha = torch.tensor([1.0, 0.6, 0.1], dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.8, 40.0], dtype=torch.float64)
    x = expand(alpha, x0) * x0 + expand(sigma, x0) * eps
    return x, x0, eps, alpha, sigma


def predictions(x, x0, eps, alpha, sigma):
    """Return the same prediction in every parameterization."""
    a, s = expand(alpha, x), expand(sigma, x)
    return {
        "pair": Prediction(x, x0, eps, alpha, sigma),
        "eps": Prediction.from_eps(x, eps, alpha, sigma),
        "x0": Prediction.from_x0(x, x0, alpha, sigma),
        "v": Prediction.from_v(x, a * eps - s * x0, alpha, sigma),
        "score": Prediction.from_score(x, -eps / s, alpha, sigma),
        "mixed": Prediction.from_output(x, 0.3 * x0 - 2.0 * eps, alpha, sigma, a=0.3, b=-2.0),
    }


KINDS = ["pair", "eps", "x0", "v", "score", "mixed"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameterization_gives_the_same_prediction(kind):
    x, x0, eps, alpha, sigma = setup()
    prediction = predictions(x, x0, eps, alpha, sigma)[kind]
    a, s = expand(alpha, x), expand(sigma, x)
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.score, -eps / s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.v, a * eps - s * x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.alpha, alpha)
    torch.testing.assert_close(prediction.sigma, sigma)


@pytest.mark.parametrize("kind", KINDS)
def test_combine_returns_the_linear_combination(kind):
    x, x0, eps, alpha, sigma = setup()
    prediction = predictions(x, x0, eps, alpha, sigma)[kind]
    c, d = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([3.0, 0.0, -0.7]).double()
    expected = expand(c, x) * x + expand(d, x) * x0
    torch.testing.assert_close(prediction.combine(x=c, x0=d), expected, rtol=1e-9, atol=1e-9)
    got, expected = prediction.combine(x=0.5, x0=2.0), 0.5 * x + 2 * x0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_error_is_the_difference_of_the_noises(kind):
    x, x0, eps, alpha, sigma = setup()
    # Another prediction of the same state, whose noise differs by 0.01.
    other = Prediction.from_eps(x, eps - 0.01, alpha, sigma)
    prediction = predictions(x, x0, eps, alpha, sigma)[kind]
    target = Prediction(x, other.x0, other.eps, alpha, sigma)
    got = prediction.noise_error(target)
    torch.testing.assert_close(got, torch.full_like(x, 0.01), rtol=1e-7, atol=1e-9)


@given(sigma=st.floats(1e-3, 1e3), kind=st.sampled_from(KINDS[1:5]))
def test_noise_error_keeps_float32_digits_at_every_noise_level(sigma, kind):
    """The difference of two noises computed from x0 loses log10(1 / sigma) digits."""
    x0, eps = torch.randn(2, 1, 500, generator=seeded())
    one, s = torch.ones(1), torch.tensor([sigma])
    x = x0 + sigma * eps
    value = {
        "eps": eps * 1.01,
        "x0": x0 * 1.01,
        "v": 1.01 * (eps - sigma * x0),
        "score": -1.01 * eps / sigma,
    }[kind]
    build = getattr(Prediction, f"from_{kind}")
    got = build(x, value, one, s).noise_error(Prediction(x, x0, eps, one, s))
    # In float64, from the same float32 inputs.
    x0, eps, value = x0.double(), eps.double(), value.double()
    s64 = float(s)
    expected = {
        "eps": value - eps,
        "x0": -(value - x0) / s64,
        "v": (value - (eps - s64 * x0)) / (1 + s64**2),
        "score": -s64 * value - eps,
    }[kind]
    error = (got.double() - expected).norm() / expected.norm()
    assert float(error) < 1e-4


def test_floats_apply_to_a_whole_batch():
    x, x0, eps, _, _ = setup()
    alpha, sigma = torch.full((3,), 0.6).double(), torch.full((3,), 0.8).double()
    for build, value in ((Prediction.from_v, x0), (Prediction.from_eps, eps)):
        one, many = build(x, value, 0.6, 0.8), build(x, value, alpha, sigma)
        for name in ("x0", "eps", "score", "v", "alpha", "sigma"):
            got, expected = getattr(one, name), getattr(many, name)
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("answer", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_predictions_have_the_dtype_of_the_state_and_at_least_float32(dtype, answer):
    """Whatever the dtype of the network's output."""
    x, x0, eps, alpha, sigma = setup(dtype)
    x, x0, eps = x.to(dtype), x0.to(answer), eps.to(answer)
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    for prediction in (
        Prediction.from_v(x, x0, alpha, sigma),
        Prediction(x, x0, eps, alpha, sigma),
        Prediction.from_x0(x, x0, 0.6, 0.8),
    ):
        parts = [getattr(prediction, name) for name in ("x0", "eps", "score", "v")]
        parts.append(prediction.combine(x=0.5, x0=0.5))
        assert {part.dtype for part in parts} == {wide}
        assert prediction.alpha.dtype == prediction.sigma.dtype == wide


def test_values_are_frozen():
    x, x0, eps, alpha, sigma = setup()
    for value, name in (
        (Prediction(x, x0, eps, alpha, sigma), "x0"),
        (Perturbed(x0, eps, x, alpha, alpha, sigma), "x"),
        (Step(x, x), "mean"),
    ):
        with pytest.raises(AttributeError):
            setattr(value, name, x)


@pytest.mark.parametrize("std", [0.5, torch.tensor([0.5, 0.5]), torch.full((2, 1), 0.5)])
def test_add_noise(std):
    mean, noise = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    expected = torch.tensor([[2.0, 1.0], [5.0, 4.0]])  # mean + 2 * .5 * noise
    kept = noise.clone()
    assert torch.equal(add_noise(mean, std, noise, 2.0), expected)
    assert torch.equal(noise, kept)  # not modified while gradients are recorded
    assert torch.equal(add_noise(mean.requires_grad_(), std, noise, 2.0), expected)
    with torch.no_grad():
        assert torch.equal(add_noise(mean, std, noise, 2.0), expected)


def test_coefficients_may_be_any_real_number():
    """Integers and numpy numbers behave as floats, also in errors."""
    x, x0, *_ = setup()
    for one, two in ((1, 2), (np.float32(1), np.float64(2))):
        assert torch.equal(linear(one, x, two, x0), x + 2 * x0)
    exact = Prediction.from_output(x, x0, 1, 0, a=1, b=0)
    assert exact.x0 is x0
    assert torch.equal(exact.combine(x=3, x0=2), 3 * x + 2 * x0)
    with pytest.raises(ValueError, match="model: expected a prediction of x0 or of a velocity"):
        _ = Prediction.from_eps(x, x0, 0, 1).x0


@pytest.mark.parametrize(
    ("a", "b"), [(0.0, 1.0), (0.0, -1.0), (0.0, -2.5), (1.0, 0.0), (-0.6, 0.8), (None, None)]
)
def test_squared_errors_are_the_squares_of_errors(a, b) -> None:
    """Values and gradients, also where the output is the noise with the other sign."""
    x0, eps, output = torch.randn(3, 4, 5).unbind()
    alpha, sigma = torch.full((4,), 0.8), torch.full((4,), 0.6)
    x = 0.8 * x0 + 0.6 * eps
    target = Prediction(x, x0, eps, alpha, sigma)
    gradients = []
    for squared in (True, False):
        leaf = output.clone().requires_grad_()
        if a is None:
            prediction = Prediction(x, leaf, (x - 0.8 * leaf) / 0.6, alpha, sigma)
        else:
            prediction = Prediction.from_output(x, leaf, alpha, sigma, a=a, b=b)
        error = prediction.output_error(target)
        squares = prediction.squared_error(target) if squared else error.square()
        torch.testing.assert_close(squares, error.square(), rtol=1e-6, atol=0.0)
        gradients += torch.autograd.grad(squares.sum(), leaf)
    torch.testing.assert_close(*gradients)
