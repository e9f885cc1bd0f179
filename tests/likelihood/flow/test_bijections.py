"""Invertible layers: inverses, log-determinants, activation normalization, channel mixing."""

import pytest
import torch
from support import seeded
from support.flows import coupling, perturbed

from diffusionkit.likelihood.flow.bijections import ActNorm, ChannelMixing

LAYERS = {
    "actnorm": (lambda: ActNorm(3), (3, 2, 2)),
    "mixing": (lambda: ChannelMixing(3), (3, 2, 2)),
    "vector": (lambda: coupling(0, 4), (4, 1)),
    "series": (lambda: coupling(1, 1), (1, 5)),
    "image": (lambda: coupling(2, 2, parity=1), (2, 2, 3)),
    "image without attention": (lambda: coupling(2, 2, heads=0), (2, 2, 3)),
    "volume": (lambda: coupling(3, 1), (1, 2, 1, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_and_log_determinant(name) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = perturbed(build()).eval()
    z = torch.randn(2, *shape, dtype=torch.float64)
    context = torch.randn(2, 2, *shape[1:], dtype=torch.float64)
    y, log_det = layer(z, context)
    torch.testing.assert_close(layer.inverse(y, context), z, rtol=1e-10, atol=1e-10)
    for n in range(2):
        one, about = z[n : n + 1], context[n : n + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, c=about: layer(v, c)[0], one)
        expected = torch.linalg.slogdet(jacobian.reshape(z[0].numel(), -1)).logabsdet
        torch.testing.assert_close(log_det[n], expected, rtol=1e-10, atol=1e-10)
        assert abs(expected) > 1e-3  # not trivial


def test_actnorm_normalizes_its_first_draw() -> None:
    layer = ActNorm(3).double()
    generator = seeded()
    spread = torch.tensor([0.1, 1.0, 20.0]).view(3, 1, 1)
    z = 5 + spread * torch.randn(4, 3, 2, 5, generator=generator, dtype=torch.float64)
    y, _ = layer(z, z)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3).double())
    # Later draws are not normalized.
    again, _ = layer(2 * z, z)
    torch.testing.assert_close(again.std((0, 2, 3), correction=0), torch.full((3,), 2.0).double())


def test_actnorm_is_initialized_in_training_mode_and_by_a_loaded_state() -> None:
    z = 3 + 2 * torch.randn(8, 2, 4)
    fresh = ActNorm(2).eval()
    assert torch.equal(fresh(z, z)[0], z)
    used = ActNorm(2)
    y, _ = used(z, z)
    loaded = ActNorm(2)
    loaded.load_state_dict(used.state_dict())
    torch.testing.assert_close(loaded.train()(10 * z, z)[0], used.eval()(10 * z, z)[0])
    assert not torch.equal(y, z)


def test_actnorm_of_a_single_value_is_finite() -> None:
    layer = ActNorm(1)
    y, log_det = layer(torch.tensor([[[3.0]]]), torch.zeros(1, 1, 1))
    assert y.item() == 0.0
    assert log_det.item() == 0.0


def test_channel_mixing_starts_as_a_rotation() -> None:
    weight = ChannelMixing(5).weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(5), rtol=0, atol=1e-6)
