"""Progressive branches against StyleGAN2's description of them, in torch.nn.functional."""

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

STYLE = Style(2)
FIR = (1, 3, 3, 1)
resampling = pytest.mark.parametrize("taps", [None, FIR])
rescaling = pytest.mark.parametrize("rescale", [False, True])


def ready(step: nn.Module) -> Any:
    fill(step)
    return step.double()


def draw(channels: int, height: int, width: int) -> Tensor:
    torch.manual_seed(channels)
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def smoothed(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    """Pad with zeros and filter every channel along both axes with (1, 3, 3, 1) / 8."""
    line = torch.tensor(FIR, dtype=x.dtype) / 8
    weight = torch.outer(line, line).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, pads), weight, groups=x.shape[1])


def stuffed(x: Tensor) -> Tensor:
    """Put a zero after every entry along both axes."""
    out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    out[..., ::2, ::2] = x
    return out


def halved(x: Tensor, taps: Any) -> Tensor:
    return F.avg_pool2d(x, 2) if taps is None else smoothed(x, (1,) * 4)[..., ::2, ::2]


def doubled(x: Tensor, taps: Any) -> Tensor:
    if taps is None:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return 4 * smoothed(stuffed(x), (2, 1, 2, 1))


def conv_down(conv: nn.Module, x: Tensor, taps: Any) -> Tensor:
    """Filter, then convolve with stride two."""
    x = F.pad(x, (0, 1, 0, 1)) if taps is None else smoothed(x, (2,) * 4)
    return F.conv2d(x, conv.weight, conv.bias, stride=2)


def conv_up(conv: nn.Module, x: Tensor, taps: Any) -> Tensor:
    """Convolve the zero-stuffed input, then filter; without a filter, repeat and convolve."""
    if taps is None:
        return F.conv2d(doubled(x, None), conv.weight, conv.bias, padding=1)
    h = F.conv2d(stuffed(x)[..., :-1, :-1], conv.weight, padding=2)
    return 4 * smoothed(h, (1,) * 4) + conv.bias[:, None, None]


def headed(head: Any, h: Tensor, activation: Any = F.silu) -> Tensor:
    """Normalize two groups of four channels, activate, convolve."""
    h = F.group_norm(h, 2, head.norm.weight, head.norm.bias, 1e-6)
    return F.conv2d(activation(h), head.conv.weight, head.conv.bias, padding=1)


def test_head() -> None:
    head = Head(8, 3, STYLE)
    assert head.conv.weight.abs().max() < 1e-5
    torch.manual_seed(0)
    whole = Head(64, 64, STYLE, scale=1.0).conv.weight
    assert whole.var().item() == pytest.approx(1 / (9 * 64), rel=0.05)
    h = draw(8, 4, 6)
    torch.testing.assert_close(ready(head)(h), headed(head, h))
    relu = ready(Head(8, 3, Style(2, activation=F.relu)))
    torch.testing.assert_close(relu(h), headed(relu, h, F.relu))


@resampling
def test_input_skip(taps) -> None:
    x, h = draw(3, 4, 6), draw(8, 2, 3)
    for combine in ("sum", "cat"):
        step = ready(InputSkip(3, 8, STYLE, taps, combine))
        pyramid, joined = step(x, h)
        torch.testing.assert_close(pyramid, halved(x, taps))
        skip = torch.einsum("oc,bchw->bohw", step.conv.weight[:, :, 0, 0], halved(x, taps))
        skip = skip + step.conv.bias[:, None, None]
        expected = skip + h if combine == "sum" else torch.cat([skip, h], 1)
        torch.testing.assert_close(joined, expected)
        assert step.branch_channels == pyramid.shape[1]
        assert step.out_channels == joined.shape[1]


@resampling
@rescaling
def test_input_residual(taps, rescale: bool) -> None:
    step = ready(InputResidual(3, 8, Style(2, rescale=rescale), taps))
    x, h = draw(3, 4, 6), draw(8, 2, 3)
    pyramid, features = step(x, h)
    expected = conv_down(step.down.conv, x, taps) + h
    torch.testing.assert_close(features, expected / math.sqrt(2) if rescale else expected)
    assert pyramid is features
    assert step.branch_channels == step.out_channels == 8


@resampling
def test_output_skip(taps) -> None:
    step = OutputSkip(8, 3, STYLE, taps)
    assert step.head.conv.weight.abs().max() < 1e-5
    step = ready(step)
    h, below = draw(8, 4, 6), draw(3, 2, 3)
    first, features = step(None, h)
    torch.testing.assert_close(first, headed(step.head, h))
    assert features is h
    grown, features = step(below, h)
    torch.testing.assert_close(grown, doubled(below, taps) + headed(step.head, h))
    assert features is h


def test_output_start() -> None:
    start = OutputStart(8, STYLE)
    assert start.head.conv.weight.abs().max() > 0.1  # not almost zero: features will contain it
    start = ready(start)
    h = draw(8, 2, 3)
    pyramid, features = start(None, h)
    torch.testing.assert_close(pyramid, headed(start.head, h))
    assert features is h


@resampling
@rescaling
def test_output_residual(taps, rescale: bool) -> None:
    step = ready(OutputResidual(8, 4, Style(2, rescale=rescale), taps))
    pyramid, h = draw(8, 2, 3), draw(4, 4, 6)
    expected = conv_up(step.up.conv, pyramid, taps) + h
    grown, features = step(pyramid, h)
    torch.testing.assert_close(grown, expected / math.sqrt(2) if rescale else expected)
    assert features is grown
