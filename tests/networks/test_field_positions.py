"""Channels for the coordinates: values, and what is passed on."""

import math

import pytest
import torch
from torch import nn

from diffusionkit.networks import DDPMpp, PositionChannels


class Recorded(nn.Module):
    def forward(self, x, noise_label, *args, **kwargs):
        self.inputs, self.rest = x, (noise_label, args, kwargs)
        return x[:, :1]


def test_channels() -> None:
    network = Recorded()
    x, positions = torch.randn(2, 1, 3, 4), torch.rand(2, 2, 3, 4, dtype=torch.float64) * 2 - 1
    out = PositionChannels(network, (1, 3))(x, torch.ones(2), 5, positions=positions, flag=True)
    assert torch.equal(out, x)
    assert network.rest[1:] == ((5,), {"flag": True})
    assert network.inputs.dtype == x.dtype
    assert network.inputs.shape == (2, 1 + 2 + 8, 3, 4)
    b, i, j = 1, 2, 3
    u, v = positions[b, :, i, j].tolist()
    expected = [float(x[b, 0, i, j]), u, v]
    for k in (1, 3):
        expected += [math.sin(math.pi * k * u), math.sin(math.pi * k * v)]
        expected += [math.cos(math.pi * k * u), math.cos(math.pi * k * v)]
    assert network.inputs[b, :, i, j].tolist() == pytest.approx(expected, abs=1e-6)
    PositionChannels(network, [2], linear=False)(x, torch.ones(2), positions=positions)
    assert network.inputs.shape == (2, 1 + 4, 3, 4)


def test_networks_of_the_library() -> None:
    for dims in (1, 2, 3):
        inner = DDPMpp(2 + 3 * dims, out_channels=2, dims=dims, width=8, multipliers=(1,), blocks=1)
        x = torch.randn(2, 2, *[4] * dims)
        positions = torch.zeros(2, dims, *[4] * dims)
        network = PositionChannels(inner, (1,))
        assert network(x, torch.ones(2), positions=positions).shape == x.shape


def test_errors() -> None:
    network, x, label = PositionChannels(Recorded()), torch.randn(2, 1, 8), torch.ones(2)
    with pytest.raises(TypeError, match=r"positions: expected .* \(2, 1, 8\), got NoneType; pass"):
        network(x, label)
    with pytest.raises(ValueError, match=r"positions: expected .* got \(2, 2, 8\)"):
        network(x, label, positions=torch.zeros(2, 2, 8))
    with pytest.raises(ValueError, match="positions: expected"):
        network(x[:, 0], label, positions=x[:, 0])
    with pytest.raises(ValueError, match="frequencies: expected at least one"):
        PositionChannels(Recorded(), linear=False)
    with pytest.raises(ValueError, match="frequencies: expected an integer >= 1, got 0"):
        PositionChannels(Recorded(), [0])
