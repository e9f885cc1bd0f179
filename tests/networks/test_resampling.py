"""Resampling by two against explicit formulas for its entries."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from diffusionkit.networks.layers import Style
from diffusionkit.networks.resampling import ConvDownsample, ConvUpsample, Downsample, Upsample

FIR = (1, 3, 3, 1)
SHAPES = [(4,), (4, 6), (4, 2, 6)]


def draw(spatial: tuple[int, ...], channels: int = 3) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, channels, *spatial, dtype=torch.float64)


def padded(x: Tensor, d: int) -> Tensor:
    """Move a dimension to the end and put one zero at each end of it."""
    return torch.nn.functional.pad(x.movedim(d, -1), (1, 1))


def along(x: Tensor, one) -> Tensor:
    for d in range(2, x.ndim):
        x = one(padded(x, d)).movedim(-1, d)
    return x


def repeated(z: Tensor) -> Tensor:
    return z[..., 1:-1].repeat_interleave(2, dim=-1)


def interpolated(z: Tensor) -> Tensor:
    even = (z[..., :-2] + 3 * z[..., 1:-1]) / 4
    odd = (3 * z[..., 1:-1] + z[..., 2:]) / 4
    return torch.stack([even, odd], dim=-1).flatten(-2)


def averaged(z: Tensor) -> Tensor:
    return (z[..., 1:-1:2] + z[..., 2:-1:2]) / 2


def smoothed(z: Tensor) -> Tensor:
    return (z[..., :-3:2] + 3 * z[..., 1:-2:2] + 3 * z[..., 2:-1:2] + z[..., 3::2]) / 8


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize(
    ("layer", "one"),
    [
        (Upsample(), repeated),
        (Upsample(FIR), interpolated),
        (Downsample(), averaged),
        (Downsample(FIR), smoothed),
    ],
    ids=["repeat", "interpolate", "average", "smooth"],
)
def test_without_convolution(layer: nn.Module, one, spatial: tuple[int, ...]) -> None:
    x = draw(spatial)
    torch.testing.assert_close(layer(x), along(x, one), rtol=1e-14, atol=1e-14)
    assert torch.equal(layer(x, torch.zeros(2, 8)), layer(x))  # the embedding is ignored


def one_tap(layer: nn.Module, at: int) -> nn.Module:
    """Make a layer's convolution take one entry of its kernel, the same along each dimension."""
    layer = layer.double()
    with torch.no_grad():
        layer.conv.weight.zero_()
        index = (at,) * (layer.conv.weight.ndim - 2)
        layer.conv.weight[(0, 0, *index)] = 2.0
        layer.conv.weight[(1, 2, *index)] = -1.0
        layer.conv.bias.copy_(torch.tensor([0.5, 3.0]))
    return layer


def mixed(x: Tensor) -> Tensor:
    return torch.stack([2 * x[:, 0] + 0.5, 3 - x[:, 2]], dim=1)


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize(("taps", "one"), [(None, repeated), (FIR, interpolated)])
def test_upsampling_with_the_middle_tap(taps, one, spatial: tuple[int, ...]) -> None:
    x = draw(spatial)
    layer = one_tap(ConvUpsample(3, 2, Style(len(spatial)), taps), 1)
    torch.testing.assert_close(layer(x), mixed(along(x, one)))


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize(
    ("taps", "front", "at", "one"),
    [
        (FIR, 0, 1, smoothed),
        (None, 0, 0, lambda z: z[..., 1:-1:2]),
        (None, 0, 1, lambda z: z[..., 2:-1:2]),
        (None, 0, 2, lambda z: z[..., 3::2]),
        (None, 1, 0, lambda z: z[..., :-2:2]),
        (None, 1, 1, lambda z: z[..., 1:-1:2]),
        (None, 1, 2, lambda z: z[..., 2::2]),
    ],
)
def test_downsampling_with_one_tap(taps, front: int, at: int, one, spatial) -> None:
    x = draw(spatial)
    layer = one_tap(ConvDownsample(3, 2, Style(len(spatial)), taps, pad_front=front), at)
    torch.testing.assert_close(layer(x), mixed(along(x, one)))


def test_upsampling_does_not_flip_the_kernel() -> None:
    # With the tap before the middle one, the output is shifted by one entry.
    x = draw((6,))
    for taps, one in ((None, repeated), (FIR, interpolated)):
        layer = one_tap(ConvUpsample(3, 2, Style(1), taps), 0)
        expected = mixed(along(x, one))
        torch.testing.assert_close(layer(x)[..., 1:], expected[..., :-1])


def test_downsampling_inverts_upsampling_for_means() -> None:
    for spatial in SHAPES:
        x = draw(spatial)
        torch.testing.assert_close(Downsample()(Upsample()(x)), x, rtol=1e-15, atol=0)


@pytest.mark.parametrize("taps", [(1, 1), (1, 2, 1), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_sizes_do_not_depend_on_the_kernel_length(taps, dims: int) -> None:
    x = draw((4, 6, 2)[:dims])
    double, half = [2 * n for n in x.shape[2:]], [n // 2 for n in x.shape[2:]]
    style = Style(dims)
    for layer in (Upsample(taps), ConvUpsample(3, 3, style, taps).double()):
        assert list(layer(x).shape[2:]) == double
    for layer in (Downsample(taps), ConvDownsample(3, 3, style, taps).double()):
        assert list(layer(x).shape[2:]) == half
    if taps == (1, 1):
        torch.testing.assert_close(Upsample(taps)(x), Upsample()(x))
        torch.testing.assert_close(Downsample(taps)(x), Downsample()(x))


def test_samples_and_channels_are_resampled_separately() -> None:
    x = draw((4, 4))
    for layer, (i, j) in product((Upsample(FIR), Downsample(FIR)), ((0, 0), (1, 2))):
        torch.testing.assert_close(layer(x[i : i + 1, j : j + 1]), layer(x)[i : i + 1, j : j + 1])
