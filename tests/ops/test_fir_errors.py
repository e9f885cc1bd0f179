"""Errors of FIR resampling state what was expected and what was received."""

import pytest
import torch

from diffusionkit.ops import (
    fir_conv_downsample,
    fir_conv_upsample,
    fir_downsample,
    fir_upsample,
    upfirdn,
)

X = torch.zeros(2, 3, 8, 8)
W = torch.zeros(5, 3, 3, 3)
FUNCTIONS = [upfirdn, fir_upsample, fir_downsample]
CONVOLUTIONS = [fir_conv_downsample, fir_conv_upsample]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x: expected a floating-point tensor, got list"),
        (X.int(), TypeError, "x: expected a floating-point tensor, got torch.int32"),
        (X.cfloat(), TypeError, "got torch.complex64"),
        (X[0, 0], ValueError, r"x: expected shape \(B, C, \*spatial\).*got \(8, 8\)"),
        (X[..., None, None], ValueError, r"got \(2, 3, 8, 8, 1, 1\)"),
        (X[:, :0], ValueError, r"channels and pixels, got shape \(2, 0, 8, 8\)"),
        (X[..., :0], ValueError, r"channels and pixels, got shape \(2, 3, 8, 0\)"),
    ],
)
def test_input(function, x, error, message) -> None:
    with pytest.raises(error, match=message):
        function(x, [1, 1])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        ([], ValueError, "kernel: expected at least one tap, got none"),
        (3.0, TypeError, "kernel: expected a sequence of numbers or a tensor, got float"),
        ("ab", TypeError, "kernel: expected a sequence of numbers or a tensor, got str"),
        ([[1, 1], [1, 1]], TypeError, r"kernel: expected a number, got list"),
        ([1.0, float("nan")], ValueError, "kernel: expected a finite number, got nan"),
        ([1.0, float("inf")], ValueError, "kernel: expected a finite number, got inf"),
        ([1.0, float("-inf")], ValueError, "kernel: expected a finite number, got -inf"),
        (torch.ones(0), ValueError, r"kernel: expected at least one tap, got shape \(0,\)"),
        (torch.tensor(1.0), ValueError, r"1 or 2 dimensions, got shape \(\)"),
        (torch.ones(2, 2, 2), ValueError, r"1 or 2 dimensions, got shape \(2, 2, 2\)"),
        (
            torch.ones(2, dtype=torch.complex64),
            TypeError,
            "expected real numbers, got torch.complex",
        ),
        (torch.ones(2) > 0, TypeError, "kernel: expected real numbers, got torch.bool"),
        (
            torch.ones(2, device="meta"),
            ValueError,
            "kernel: expected the device of x, cpu, got meta",
        ),
    ],
)
def test_kernel(function, kernel, error, message) -> None:
    with pytest.raises(error, match=message):
        function(X, kernel)


def test_kernel_of_a_signal() -> None:
    with pytest.raises(ValueError, match=r"kernel: expected 1 dimension, got shape \(2, 2\)"):
        upfirdn(X[0], torch.ones(2, 2))


@pytest.mark.parametrize("function", [fir_upsample, fir_downsample])
def test_numbers(function) -> None:
    for factor, error in ((0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="factor: expected an integer"):
            function(X, factor=factor)
    with pytest.raises(TypeError, match="gain: expected a number, got str"):
        function(X, gain="1")
    with pytest.raises(ValueError, match="gain: expected a finite number, got nan"):
        function(X, gain=float("nan"))
    with pytest.raises(ValueError, match="kernel: expected taps of nonzero sum, got"):
        function(X, [1, 0, -1])


def test_upsampling_needs_as_many_taps_as_its_factor() -> None:
    with pytest.raises(ValueError, match="kernel: expected at least factor = 3 taps, got 2"):
        fir_upsample(X, [1, 1], factor=3)


def test_rates() -> None:
    for name in ("up", "down"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got 0"):
            upfirdn(X, [1], **{name: 0})
        with pytest.raises(TypeError, match=f"{name}: expected an integer, got float"):
            upfirdn(X, [1], **{name: 1.5})


@pytest.mark.parametrize(
    ("padding", "error"),
    [
        (1, TypeError),
        ((1.0, 1.0), TypeError),
        ((True, False), TypeError),
        (((1, 1), (1, 1.0)), TypeError),
        (((1, 1), 1), TypeError),
        ((), ValueError),
        ((1, 1, 1), ValueError),
        (((1, 1),), ValueError),
        (((1, 1), (1, 1), (1, 1)), ValueError),
        (((1, 1), (1,)), ValueError),
    ],
)
def test_padding(padding, error) -> None:
    with pytest.raises(error, match="padding: expected a pair of integers or 2 such pairs, got"):
        upfirdn(X, [1], padding=padding)


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match=r"x: expected enough samples to filter, got 8 .*9 taps"):
        upfirdn(X, [1] * 9)
    with pytest.raises(ValueError, match=r"upsampled by 2, padded by \(-16, 20\)"):
        upfirdn(X, [1], up=2, padding=(-16, 20))
    with pytest.raises(ValueError, match=r"x: expected enough samples to filter, got 1 \("):
        fir_downsample(X[..., :1])
    with pytest.raises(ValueError, match="x: expected at least 2 samples, got 1"):
        fir_conv_downsample(X[..., :1], W)


@pytest.mark.parametrize("function", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (None, None, TypeError, "weight: expected a floating-point tensor, got NoneType"),
        (W.int(), None, TypeError, "weight: expected a floating-point tensor, got torch.int32"),
        (W.double(), None, TypeError, "weight: expected the dtype of x, torch.float32"),
        (W[0], None, ValueError, r"weight: expected shape \(\*, 3, \*, \*\), got \(3, 3, 3\)"),
        (W[:, :2], None, ValueError, r"weight: expected shape .*, got \(5, 2, 3, 3\)"),
        (W[..., :0], None, ValueError, r"weight: expected shape .*, got \(5, 3, 3, 0\)"),
        (W.to("meta"), None, ValueError, "weight: expected the device of x, cpu, got meta"),
        (W, torch.zeros(3), ValueError, r"bias: expected shape \(5\), got \(3,\)"),
        (W, torch.zeros(5).double(), TypeError, "bias: expected the dtype of x, torch.float32"),
        (W, 1.0, TypeError, "bias: expected a floating-point tensor, got float"),
    ],
)
def test_weight(function, weight, bias, error, message) -> None:
    with pytest.raises(error, match=message):
        function(X, weight, bias)


@pytest.mark.parametrize("function", CONVOLUTIONS)
def test_convolutions_validate_their_other_arguments(function) -> None:
    with pytest.raises(TypeError, match="x: expected"):
        function(X.int(), W)
    with pytest.raises(ValueError, match="kernel: expected taps of nonzero sum"):
        function(X, W, kernel=[1, -1])
    with pytest.raises(ValueError, match="factor: expected an integer >= 1, got 0"):
        function(X, W, factor=0)
    with pytest.raises(ValueError, match="gain: expected a finite number, got inf"):
        function(X, W, gain=float("inf"))
