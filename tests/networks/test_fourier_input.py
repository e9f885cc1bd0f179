"""Fourier features of the input."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffusionkit import VPSDE, EpsModel
from diffusionkit.networks import MLP, NCSNpp
from diffusionkit.networks.fourier_input import FourierFeatures


class Seen(nn.Module):
    """A network that returns its arguments."""

    def forward(self, x: Tensor, noise_label: Tensor, *args, **kwargs):
        return x, noise_label, args, kwargs


@pytest.mark.parametrize("exponents", [(6, 7), (0,), (-1, 3, 2)])
def test_against_its_formula(exponents) -> None:
    torch.manual_seed(0)
    x, noise_label = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2)
    seen, got, args, kwargs = FourierFeatures(Seen(), exponents=exponents)(
        x, noise_label, 1, class_labels=2
    )
    assert got is noise_label
    assert args == (1,)
    assert kwargs == {"class_labels": 2}
    parts = [x]
    for n in exponents:
        for wave in (math.sin, math.cos):
            parts.append(x.clone().apply_(lambda v, n=n, f=wave: f(2 * math.pi * 2**n * v)))
    assert seen.shape == (2, 3 * (1 + 2 * len(exponents)), 4)
    torch.testing.assert_close(seen, torch.cat(parts, 1), rtol=0, atol=1e-11)


def test_features_of_adjacent_levels_differ() -> None:
    x = 2 * (torch.arange(256).double() + 0.5) / 256 - 1
    seen = FourierFeatures(Seen(), exponents=(6,))(x.view(1, 1, -1), torch.zeros(1))[0]
    sine = seen[0, 1]
    assert torch.allclose(sine.abs(), torch.ones(256).double())
    assert (sine[1:] * sine[:-1] < 0).all()


def test_large_inputs_in_single_precision() -> None:
    """At 1e5 turns, float32 multiples of the input have no fractional digits left."""
    x = torch.tensor([[1000.12345, -37.001, 0.3]])
    got = FourierFeatures(Seen())(x, torch.zeros(1))[0].double()
    expected = FourierFeatures(Seen())(x.double(), torch.zeros(1))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_gradient() -> None:
    x = torch.tensor([[0.123, -0.7]], dtype=torch.float64, requires_grad=True)
    net = FourierFeatures(Seen(), exponents=(1, 2))
    assert torch.autograd.gradcheck(lambda y: net(y, torch.zeros(1))[0], (x,))


def test_wraps_the_networks_of_the_library() -> None:
    torch.manual_seed(0)
    image = FourierFeatures(
        NCSNpp(5, out_channels=1, width=8, multipliers=(1, 2), blocks=1, embedding="positional",
               scale_by_sigma=False)
    )  # fmt: skip
    model = EpsModel(image, VPSDE())
    assert model(torch.randn(2, 1, 8, 8), torch.rand(2)).shape == (2, 1, 8, 8)
    net = FourierFeatures(MLP(10, out_features=2, num_classes=3))
    assert net(torch.randn(4, 2), torch.rand(4), class_labels=torch.tensor([0, 1, 2, 0])).shape == (
        4,
        2,
    )
    assert "exponents=(6, 7)" in repr(net)


def test_errors() -> None:
    with pytest.raises(TypeError, match="network: expected a Module, got function"):
        FourierFeatures(lambda x, noise_label: x)
    with pytest.raises(ValueError, match="exponents: expected at least one entry, got none"):
        FourierFeatures(Seen(), exponents=())
    for bad in (1.5, True):
        with pytest.raises(TypeError, match="exponents: expected an integer"):
            FourierFeatures(Seen(), exponents=(1, bad))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.int64"):
        FourierFeatures(Seen())(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(B, C, ...\), got \(3,\)"):
        FourierFeatures(Seen())(torch.zeros(3), torch.zeros(3))
