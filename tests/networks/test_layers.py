"""Initializers, and the layers made by a style."""

import math

import pytest
import torch
from torch import nn

from diffusionkit.networks.layers import (
    Style,
    default_or_zero_,
    fan_average_,
    linear,
    over_level,
    variance_scaling_,
)


@pytest.mark.parametrize(
    ("shape", "fan_avg"),
    [((300, 200), 250), ((64, 32, 3, 3), 432), ((32, 96, 5), 320), ((24, 8, 3, 3, 3), 432)],
)
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_variance_scaling(shape: tuple[int, ...], fan_avg: float, scale: float) -> None:
    torch.manual_seed(0)
    w = variance_scaling_(torch.empty(shape, dtype=torch.float64), scale)
    variance = max(scale, 1e-10) / fan_avg
    assert w.var().item() == pytest.approx(variance, rel=0.05)
    assert w.mean().abs().item() < 5 * math.sqrt(variance / w.numel())
    assert w.abs().max().item() == pytest.approx(math.sqrt(3 * variance), rel=1e-2)
    assert w.abs().max().item() <= math.sqrt(3 * variance)


def test_fan_average_of_a_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(64, 32, 3)
    fan_average_(layer, 0.5)
    assert layer.weight.var().item() == pytest.approx(0.5 / 144, rel=0.05)
    assert not layer.bias.any()
    fan_average_(nn.Linear(2, 3, bias=False), 1.0)
    made = linear(300, 200, scale=0.1)
    assert made.weight.var().item() == pytest.approx(0.1 / 250, rel=0.05)
    assert made.weight.shape == (200, 300)
    assert not made.bias.any()


def test_default_or_zero() -> None:
    layer = nn.Linear(3, 4)
    before = layer.weight.clone(), layer.bias.clone()
    default_or_zero_(layer, 0.2)
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.bias, before[1])
    default_or_zero_(layer, 0)
    assert not layer.weight.any()
    assert not layer.bias.any()
    zero = nn.Conv2d(2, 3, 1, bias=False)
    default_or_zero_(zero, 0)
    assert not zero.weight.any()


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_convolutions_of_a_style(dims: int, kind: type[nn.Module]) -> None:
    x = torch.randn(2, 3, *(4, 6, 5)[:dims])
    for kernel in (1, 3):
        layer = Style(dims).conv(3, 4, kernel)
        assert isinstance(layer, kind)
        assert layer.weight.shape == (4, 3, *(kernel,) * dims)
        assert layer(x).shape == (2, 4, *x.shape[2:])
    assert Style(dims).conv(3, 4, stride=2, padding=0)(x).shape[2] == 1


def test_style_passes_the_scale_to_its_initializer() -> None:
    scales = []
    style = Style(1, initialize=lambda layer, scale: scales.append((type(layer), scale)))
    style.conv(2, 2)
    style.conv(2, 2, scale=0.25)
    style.linear(2, 2)
    style.linear(2, 2, scale=0.5)
    conv, dense = nn.Conv1d, nn.Linear
    assert [scale for _, scale in scales] == [1.0, 0.25, 1.0, 0.5]
    for (made, _), kind in zip(scales, (conv, conv, dense, dense), strict=True):
        assert issubclass(made, kind)
    assert Style(1).linear(2, 5).weight.shape == (5, 2)


def test_a_style_initializes_by_fan_average_by_default() -> None:
    assert not Style(2).conv(3, 4).bias.any()
    assert not Style(2).linear(3, 4).bias.any()


@pytest.mark.parametrize(
    ("group_channels", "channels", "groups"),
    [
        (4, 128, 32),
        (4, 64, 16),
        (4, 384, 32),
        (4, 8, 2),
        (4, 144, 24),  # not divisible into 32 groups
        (4, 6, 1),
        (4, 2, 1),
        (1, 32, 32),
        (1, 24, 24),
        (1, 64, 32),
        (1, 7, 7),
        (1, 80, 20),
        (1, 45, 15),
        (16, 64, 4),
    ],
)
def test_groups_of_a_normalization(group_channels: int, channels: int, groups: int) -> None:
    norm = Style(2, group_channels=group_channels, eps=3e-4).norm(channels)
    assert (norm.num_groups, norm.num_channels, norm.eps) == (groups, channels, 3e-4)
    assert Style(2).norm(8).eps == 1e-6
    assert Style(2).norm(8).num_groups == 2


def test_join() -> None:
    x, h = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    torch.testing.assert_close(Style(1).join(x, h), torch.tensor([2.0 * math.sqrt(2), 0.0]))
    assert torch.equal(Style(1, rescale=False).join(x, h), torch.tensor([4.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_levels_keep_their_precision(dtype: torch.dtype) -> None:
    h = torch.tensor([0.5, 1000.0, 1000.0], dtype=dtype).view(3, 1, 1)
    level = torch.tensor([1e-4, 1e8, 1001.0], dtype=torch.float64)  # not in half precision
    expected = (h.double() / level.view(3, 1, 1)).to(dtype)
    got = over_level(h, level)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)
