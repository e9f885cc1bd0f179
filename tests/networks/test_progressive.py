"""Progressive branches, step by step."""

import math
from typing import Any

import pytest
import torch
from support.tiny_networks import fill
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionkit.networks.layers import Style
from diffusionkit.networks.progressive import (
    Head,
    InputResidual,
    InputSkip,
    OutputResidual,
    OutputSkip,
    OutputStart,
)
from diffusionkit.networks.resampling import ConvDownsample, ConvUpsample, Downsample, Upsample

STYLE = Style(2)


def ready(step: nn.Module) -> Any:
    fill(step)
    return step.double()


def draw(channels: int, height: int, width: int) -> Tensor:
    torch.manual_seed(channels)
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def activated(layer: nn.Module, h: Tensor) -> Tensor:
    return layer.conv(F.silu(layer.norm(h)))


def test_head() -> None:
    head = Head(8, 3, STYLE)
    assert head.conv.weight.abs().max() < 1e-5
    assert head.norm.num_groups == 2
    torch.manual_seed(0)
    whole = Head(64, 64, STYLE, scale=1.0).conv.weight
    assert whole.var().item() == pytest.approx(1 / (9 * 64), rel=0.05)
    h = draw(8, 4, 6)
    torch.testing.assert_close(ready(head)(h), activated(head, h))
    relu = ready(Head(8, 3, Style(2, activation=F.relu)))
    torch.testing.assert_close(relu(h), relu.conv(F.relu(relu.norm(h))))


@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1)])
def test_input_skip(taps) -> None:
    x, h = draw(3, 4, 6), draw(8, 2, 3)
    small = Downsample(taps)(x)
    for combine in ("sum", "cat"):
        step = ready(InputSkip(3, 8, STYLE, taps, combine))
        pyramid, joined = step(x, h)
        torch.testing.assert_close(pyramid, small)
        skip = torch.einsum("oc,bchw->bohw", step.conv.weight[:, :, 0, 0], small)
        skip = skip + step.conv.bias[:, None, None]
        expected = skip + h if combine == "sum" else torch.cat([skip, h], 1)
        torch.testing.assert_close(joined, expected)
        assert step.branch_channels == pyramid.shape[1]
        assert step.out_channels == joined.shape[1]


@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1)])
@pytest.mark.parametrize("rescale", [False, True])
def test_input_residual(taps, rescale: bool) -> None:
    style = Style(2, rescale=rescale)
    step = ready(InputResidual(3, 8, style, taps))
    x, h = draw(3, 4, 6), draw(8, 2, 3)
    alone = ConvDownsample(3, 8, style, taps).double()
    alone.load_state_dict(step.down.state_dict())
    pyramid, features = step(x, h)
    expected = alone(x) + h
    torch.testing.assert_close(features, expected / math.sqrt(2) if rescale else expected)
    assert pyramid is features
    assert step.branch_channels == step.out_channels == 8


@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1)])
def test_output_skip(taps) -> None:
    step = OutputSkip(8, 3, STYLE, taps)
    assert step.head.conv.weight.abs().max() < 1e-5
    step = ready(step)
    h, below = draw(8, 4, 6), draw(3, 2, 3)
    first, features = step(None, h)
    torch.testing.assert_close(first, activated(step.head, h))
    assert features is h
    grown, features = step(below, h)
    torch.testing.assert_close(grown, Upsample(taps)(below) + first)
    assert features is h


def test_output_start() -> None:
    start = OutputStart(8, STYLE)
    assert start.head.conv.weight.abs().max() > 0.1  # not silent: the features come to be of it
    start = ready(start)
    h = draw(8, 2, 3)
    pyramid, features = start(None, h)
    torch.testing.assert_close(pyramid, activated(start.head, h))
    assert features is h


@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1)])
@pytest.mark.parametrize("rescale", [False, True])
def test_output_residual(taps, rescale: bool) -> None:
    style = Style(2, rescale=rescale)
    step = ready(OutputResidual(8, 4, style, taps))
    alone = ConvUpsample(8, 4, style, taps).double()
    alone.load_state_dict(step.up.state_dict())
    pyramid, h = draw(8, 2, 3), draw(4, 4, 6)
    expected = alone(pyramid) + h
    grown, features = step(pyramid, h)
    torch.testing.assert_close(grown, expected / math.sqrt(2) if rescale else expected)
    assert features is grown
