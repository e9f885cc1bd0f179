"""Latent codes: interpolation, and temperature."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EpsModel,
    GaussianMixtureModel,
    ProbabilityFlow,
    SubVPSDE,
)
from diffusionkit.interfaces import ScoreModel
from diffusionkit.sampling.latent import slerp

PROCESSES = [VESDE(), VPSDE(), SubVPSDE(), EDMSDE()]


def on_circle(degrees, radius=1.0):
    angle = math.radians(degrees)
    x, y = radius * math.cos(angle), radius * math.sin(angle)
    return torch.tensor([[x, y]], dtype=torch.float64)


@pytest.mark.parametrize("weight", [-0.5, 0.0, 0.25, 1.0, 1.5])
def test_slerp_follows_the_circle(weight):
    point = slerp(on_circle(20), on_circle(80), weight)
    torch.testing.assert_close(point, on_circle(20 + 60 * weight), rtol=0, atol=1e-14)


def test_slerp_of_vectors_of_different_lengths():
    """sin(30 deg) / sin(60 deg) = 1 / sqrt(3) of each."""
    point = slerp(on_circle(0, 2.0), on_circle(60, 5.0), 0.5)
    expected = (on_circle(0, 2.0) + on_circle(60, 5.0)) / math.sqrt(3)
    torch.testing.assert_close(point, expected, rtol=1e-14, atol=0)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(3, 2), (2, 1, 4, 4), (4, 5, 3)]),
    weight=st.floats(0.05, 0.95),
)
def test_slerp_keeps_the_length_and_divides_the_arc(seed, shape, weight):
    generator = seeded(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = (z / torch.linalg.vector_norm(z.flatten(1), dim=1).view(-1, *(1,) * (z.ndim - 1))
            for z in (a, b))  # fmt: skip
    point = slerp(a, b, weight)
    assert point.shape == shape
    torch.testing.assert_close(point.flatten(1).norm(dim=1), torch.ones(shape[0]).double())
    torch.testing.assert_close(slerp(a, point, 0.5), slerp(a, b, weight / 2))
    torch.testing.assert_close(slerp(b, a, 1 - weight), point)


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-5])
def test_slerp_of_nearby_codes_is_linear(gap):
    a = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    b = a + gap * torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(slerp(a, b, 0.3), a + 0.3 * (b - a), rtol=0, atol=1e-10)


def test_slerp_has_one_angle_and_one_weight_for_each_sample():
    a = torch.cat([on_circle(0), on_circle(0)]).float()
    b = torch.cat([on_circle(90), on_circle(30)]).float()
    point = slerp(a, b, torch.tensor([0.5, 1.0]))
    assert point.dtype == torch.float32
    torch.testing.assert_close(point, torch.cat([on_circle(45), on_circle(30)]).float())


def test_invalid_codes_raise():
    a = torch.ones(2, 3)
    for b, weight, message in (
        (torch.ones(3, 3), 0.5, r"b: expected the shape of a, \(2, 3\), got \(3, 3\)"),
        (-a, 0.5, "a, b: expected nonzero codes"),
        (0 * a, 0.5, "a, b: expected nonzero codes"),
        (torch.full((2, 3), math.nan), 0.5, "b: expected finite values"),
        (a, math.nan, "weight: expected finite values"),
        (a, torch.tensor([0.5, math.inf]), "weight: expected finite values, got 1"),
        (a, torch.ones(3), r"one for each sample, shape \(2,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            slerp(a, b, weight)
    with pytest.raises(TypeError, match="a: expected a floating-point tensor"):
        slerp(torch.ones(2, 3).long(), a, 0.5)


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_temperature_scales_samples_of_gaussian_data(sde):
    """The flow of centered Gaussian data is linear."""
    model = GaussianMixtureModel(sde, torch.zeros(1, 3), [0.5])
    flow = ProbabilityFlow(model)
    full, half = (flow.sample((5, 3), temperature=tau, generator=seeded()) for tau in (1.0, 0.5))
    torch.testing.assert_close(half, 0.5 * full, rtol=1e-3, atol=1e-4)
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
            flow.sample((5, 3), temperature=tau)


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_interpolation_of_gaussian_data_is_slerp(sde):
    model = GaussianMixtureModel(sde, torch.zeros(1, 4), [0.5])
    flow = ProbabilityFlow(model)
    x, y = torch.randn(2, 3, 4, generator=seeded(1)).mul(0.5)
    path = flow.interpolate(x, y, steps=5)
    assert path.shape == (5, 3, 4)
    for k in range(5):
        torch.testing.assert_close(path[k], slerp(x, y, k / 4), rtol=1e-3, atol=1e-3)
    used = flow.nfe
    codes = flow.encode(torch.cat([x, y]))
    encoding = flow.nfe
    flow.decode(slerp(codes[:3].repeat(5, 1), codes[3:].repeat(5, 1), torch.arange(5)
                      .repeat_interleave(3) / 4))  # fmt: skip
    assert used == encoding + flow.nfe


class Shifted(ScoreModel):
    """Gaussian data whose mean is a condition, one for each sample."""

    def __init__(self):
        super().__init__()
        self.sde = VPSDE()
        self.inner = GaussianMixtureModel(self.sde, torch.zeros(1, 2), [0.5])

    def predict(self, x, t, *, mean, name="a", table=None):
        assert name == "a"
        assert table is None or table.shape in ((), (5,))
        alpha = self.sde.marginal(t)[0].unsqueeze(1)
        return self.inner.predict(x - alpha * mean, t)


def test_interpolation_uses_the_conditions_of_each_sample():
    flow = ProbabilityFlow(Shifted())
    mean = torch.tensor([[0.0, 0.0], [3.0, -2.0]])
    x, y = torch.randn(2, 2, 2, generator=seeded(1)).mul(0.5)
    plain = flow.interpolate(x, y, steps=3, mean=torch.zeros(2, 2))
    alone = [
        flow.interpolate(
            x[i : i + 1], y[i : i + 1], steps=3, mean=mean[i : i + 1], name="a", table=torch.ones(5)
        )
        for i in range(2)
    ]
    both = flow.interpolate(x, y, steps=3, mean=mean, table=torch.ones(()))
    torch.testing.assert_close(both, torch.cat(alone, 1), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both[1, 1], plain[1, 1], atol=0.01)


def test_a_condition_may_be_called_y():
    model = EpsModel(lambda x, noise_label, y: torch.tanh(x), VPSDE())
    x, z = torch.tensor([[[0.9, 0.1]], [[-1.1, 0.2]]])
    path = ProbabilityFlow(model).interpolate(x, z, 3, y=torch.tensor([1]))
    torch.testing.assert_close(path[2], z, rtol=0, atol=1e-2)


def test_invalid_interpolations_raise():
    flow = ProbabilityFlow(GaussianMixtureModel(VPSDE(), torch.zeros(1, 4), [0.5]))
    with pytest.raises(ValueError, match="steps: expected an integer >= 2, got 1"):
        flow.interpolate(torch.ones(1, 4), torch.zeros(1, 4), steps=1)
    with pytest.raises(ValueError, match="y: expected the shape of x"):
        flow.interpolate(torch.ones(1, 4), torch.ones(2, 4))
