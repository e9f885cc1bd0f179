"""Values of FIR resampling, by hand and against the definition of a convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support.direct_fir import direct, normal
from torch import Tensor

from diffusionkit.ops import (
    fir_conv_downsample,
    fir_conv_upsample,
    fir_downsample,
    fir_upsample,
    upfirdn,
)

LETTERS = {1: "oif,bi...f->bo...", 2: "oifg,bi...fg->bo...", 3: "oifgh,bi...fgh->bo..."}


def line(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def test_hand_computed() -> None:
    x = line(1, 10, 100)
    # A true convolution: the first tap multiplies the last sample.
    assert upfirdn(x, [1, 2, 3]).tolist() == [[[1 * 3 + 10 * 2 + 100]]]
    assert upfirdn(x, [1, 2, 3], padding=(2, 2)).tolist() == [[[1, 12, 123, 230, 300]]]
    assert upfirdn(x, [1, 2, 3], padding=(-1, 1)).tolist() == [[[10 * 3 + 100 * 2]]]
    # Zeros follow each sample, including the last.
    assert upfirdn(x, [1], up=3).tolist() == [[[1, 0, 0, 10, 0, 0, 100, 0, 0]]]
    assert upfirdn(x, [1], up=3, down=2).tolist() == [[[1, 0, 0, 100, 0]]]
    assert upfirdn(x, [1], down=2, padding=(1, 0)).tolist() == [[[0, 10]]]
    # (3 x + its neighbour) / 4 between pixels, with zeros outside.
    assert fir_upsample(x).tolist() == [[[0.75, 3.25, 7.75, 32.5, 77.5, 75]]]
    # (x_-1 + 3 x_0 + 3 x_1 + x_2) / 8.
    assert fir_downsample(line(1, 10, 100, 1000)).tolist() == [[[133 / 8, 3310 / 8]]]
    # For an odd number of padding zeros, one more comes before than after.
    expected = [value / 3 for value in (1, 2, 13, 20, 130, 200)]
    torch.testing.assert_close(fir_upsample(x, [1, 2, 3]), line(*expected))
    expected = [12 / 6, 1230 / 6]
    torch.testing.assert_close(fir_downsample(line(1, 10, 100, 1000), [1, 2, 3]), line(*expected))


def test_hand_computed_convolutions() -> None:
    x, w, b = line(1, 10, 100), line(1, 2, 3), torch.tensor([0.5], dtype=torch.float64)
    # Convolved: 3, 2, 31, 20, 310, 200, 100.
    expected = [5.5, 33.5, 51.5, 330.5, 510.5, 300.5]
    torch.testing.assert_close(fir_conv_upsample(x, w, b, [1, 1]), line(*expected))
    expected = [value / 4 for value in (46, 122, 465, 1221, 1650, 1210)]
    torch.testing.assert_close(fir_conv_upsample(x, w), line(*expected))
    x = line(1, 10, 100, 1000)
    # Filtered: 1, 11, 110, 1100, 1000, over 2.
    expected = [353 / 2 + 0.5, 5310 / 2 + 0.5]
    torch.testing.assert_close(fir_conv_downsample(x, w, b, [1, 1]), line(*expected))
    expected = [4272 / 8, 17251 / 8]
    torch.testing.assert_close(fir_conv_downsample(x, w), line(*expected))


@st.composite
def cases(draw: st.DrawFn) -> dict:
    dims = draw(st.integers(1, 3))
    pair = st.tuples(st.integers(-2, 5), st.integers(-2, 5))
    return {
        "spatial": draw(st.lists(st.integers(1, 7), min_size=dims, max_size=dims)),
        "taps": draw(st.lists(st.integers(1, 5), min_size=dims, max_size=dims)),
        "separable": draw(st.booleans()),
        "up": draw(st.integers(1, 4)),
        "down": draw(st.integers(1, 4)),
        "padding": draw(st.lists(pair, min_size=dims, max_size=dims)),
        "seed": draw(st.integers(0, 1000)),
    }


NETWORK = {"spatial": [6, 8], "taps": [4, 4], "separable": True, "seed": 0}


@given(cases())
@example({**NETWORK, "up": 2, "down": 1, "padding": [(2, 1), (2, 1)]})
@example({**NETWORK, "up": 1, "down": 2, "padding": [(1, 1), (1, 1)]})
@example({**NETWORK, "up": 1, "down": 1, "padding": [(2, 2), (2, 2)]})
def test_upfirdn_matches_its_definition(case: dict) -> None:
    up, down, padding = case["up"], case["down"], case["padding"]
    sizes = case["taps"][:1] if case["separable"] else case["taps"]
    for n, k, (before, after) in zip(case["spatial"], case["taps"], padding, strict=True):
        k = sizes[0] if case["separable"] else k
        assume(n * up + before + after >= k and n * up + min(before, 0) + min(after, 0) > 0)
    x = normal(2, 3, *case["spatial"], seed=case["seed"], dtype=torch.float32)
    kernel = normal(*sizes, seed=case["seed"] + 1)
    got = upfirdn(x, kernel, up=up, down=down, padding=padding)
    expected = direct(x, kernel, up, down, padding)
    # float32 to rounding: a few ulps of the sum of magnitudes.
    bound = direct(x.abs(), kernel.abs(), up, down, padding).max().item()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4e-7 * bound)
    exact = upfirdn(x.double(), kernel, up=up, down=down, padding=padding)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-14 * bound)
    if case["separable"]:
        assert torch.equal(
            upfirdn(x, kernel.tolist(), up=up, down=down, padding=padding),
            upfirdn(x, kernel, up=up, down=down, padding=padding),
        )


@given(
    dims=st.integers(1, 3),
    factor=st.integers(1, 4),
    extra=st.integers(0, 4),
    separable=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_resampling_pads_as_published(
    dims: int, factor: int, extra: int, separable: bool, seed: int
) -> None:
    """Sizes are f n and n // f, the filter is normalized, and the padding is StyleGAN2's."""
    size = factor + extra
    kernel = 0.1 + normal(*[size] * (1 if separable else dims), seed=seed).abs()
    x = normal(1, 2, *range(4, 4 + dims), seed=seed)
    total = kernel.sum() ** (dims if separable else 1)
    pads = [((extra + 1) // 2 + factor - 1, extra // 2)] * dims
    expected = 0.7 * factor**dims * direct(x, kernel, factor, 1, pads) / total
    got = fir_upsample(x, kernel, factor=factor, gain=0.7)
    assert got.shape[2:] == tuple(factor * n for n in x.shape[2:])
    torch.testing.assert_close(got, expected)
    pads = [((extra + 1) // 2, extra // 2)] * dims
    expected = 0.7 * direct(x, kernel, 1, factor, pads) / total
    got = fir_downsample(x, kernel, factor=factor, gain=0.7)
    assert got.shape[2:] == tuple(n // factor for n in x.shape[2:])
    torch.testing.assert_close(got, expected)


@given(
    dims=st.integers(1, 3),
    factor=st.integers(1, 3),
    taps=st.integers(2, 5),
    size=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_convolutions_match_their_definition(
    dims: int, factor: int, taps: int, size: int, seed: int
) -> None:
    assume(taps >= factor)
    kernel = 0.1 + normal(taps, seed=seed).abs()
    x = normal(2, 3, *range(4, 4 + dims), seed=seed)
    shape = [size + d % 2 for d in range(dims)]
    weight, bias = normal(4, 3, *shape, seed=seed + 1), normal(4, seed=seed + 2)

    def convolve(x: Tensor, stride: int) -> Tensor:
        spatial = tuple(range(2, 2 + dims))
        for axis, k in zip(spatial, shape, strict=True):
            x = x.unfold(axis, k, stride)
        return torch.einsum(LETTERS[dims], weight, x)

    total = kernel / kernel.sum()
    add = bias.view(-1, *[1] * dims)
    p = [taps - factor + k - 1 for k in shape]
    filtered = direct(x, total, 1, 1, [((n + 1) // 2, n // 2) for n in p])
    got = fir_conv_downsample(x, weight, bias, kernel, factor=factor, gain=0.7)
    torch.testing.assert_close(got, 0.7 * convolve(filtered, factor) + add)
    assert got.shape[2:] == tuple(n // factor for n in x.shape[2:])

    one = torch.ones(1, dtype=torch.float64)
    stuffed = direct(x, one, factor, 1, [(k - 1, k - factor) for k in shape])
    p = [taps - factor - (k - 1) for k in shape]
    pads = [((n + 1) // 2 + factor - 1, n // 2 + factor - 1) for n in p]
    expected = factor**dims * 0.7 * direct(convolve(stuffed, 1), total, 1, 1, pads) + add
    got = fir_conv_upsample(x, weight, bias, kernel, factor=factor, gain=0.7)
    torch.testing.assert_close(got, expected)
    assert got.shape[2:] == tuple(factor * n for n in x.shape[2:])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_two_ones_repeat_pixels_and_average_blocks(dims: int) -> None:
    x = normal(2, 3, *[4, 6, 2][:dims])
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    torch.testing.assert_close(fir_upsample(x, [1, 1]), F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(fir_downsample(x, [1, 1]), pool(x, 2))


def test_default_kernel_interpolates_linearly_between_pixels() -> None:
    x = normal(2, 3, 5, 7)
    linear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(fir_upsample(x)[..., 1:-1, 1:-1], linear[..., 1:-1, 1:-1])


@pytest.mark.parametrize("spatial", [(9,), (5, 8), (3, 4, 5)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsampling_and_downsampling_are_adjoint(spatial: tuple[int, ...], factor: int) -> None:
    """<up(x), y> = f^dims <x, down(y)> with the flipped kernel."""
    kernel = [1.0, 2.0, 5.0, 3.0, 4.0]
    x = normal(2, 3, *spatial)
    up = fir_upsample(x, kernel, factor=factor)
    y = normal(*up.shape, seed=1)
    p = len(kernel) - factor
    pads = (p // 2, (p + 1) // 2)
    down = upfirdn(y, kernel[::-1], down=factor, padding=pads) / sum(kernel) ** len(spatial)
    scale = factor ** len(spatial)
    torch.testing.assert_close((up * y).sum(), scale * (x * down).sum())


def test_a_tensor_kernel_equals_the_numbers() -> None:
    x = normal(2, 3, 6, 5, dtype=torch.float32)
    for kernel in (torch.tensor([1, 3, 3, 1]), torch.tensor([1.0, 3.0, 3.0, 1.0]).half()):
        assert torch.equal(fir_upsample(x, kernel), fir_upsample(x))
        square = torch.outer(kernel, kernel)
        assert torch.equal(fir_downsample(x, square), fir_downsample(x))
    kernel = torch.tensor([0.1, 0.3], dtype=torch.float16)  # products are not exact in float16
    assert torch.equal(upfirdn(x, kernel), upfirdn(x, kernel.tolist()))


def test_a_kernel_shorter_than_the_factor_skips_pixels() -> None:
    assert fir_downsample(line(1, 2, 3, 4, 5, 6, 7), [2], factor=3).tolist() == [[[2, 5]]]


def test_an_empty_batch_stays_empty() -> None:
    assert fir_upsample(torch.zeros(0, 3, 4, 5)).shape == (0, 3, 8, 10)
    assert fir_downsample(torch.zeros(0, 3, 4, 5)).shape == (0, 3, 2, 2)


def test_infinite_pixels_stay_local() -> None:
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = torch.inf
    assert torch.isinf(fir_upsample(x)[..., 7:11, 7:11]).all()
    assert int(torch.isfinite(fir_upsample(x)).sum()) == 18 * 18 - 16
