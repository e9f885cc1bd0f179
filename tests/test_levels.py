import math

import pytest
import torch

from diffusionkit.decoders import Levels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_centres_are_those_of_the_paper(dtype) -> None:
    k = torch.tensor([[0, 1, 128, 255]]).to(dtype)
    expected = torch.tensor([[2 * (i + 0.5) / 256 - 1 for i in (0, 1, 128, 255)]])
    torch.testing.assert_close(Levels().encode(k), expected, rtol=0, atol=0)
    assert Levels().encode(k, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("parts", [(2, -1.0, 1.0), (17, 0.0, 1.0), (256, -1, 1), (1000, -3.0, 0.1)])
def test_decoding_undoes_encoding(parts) -> None:
    levels = Levels(*parts)
    k = torch.arange(levels.levels).view(1, -1)
    x = levels.encode(k)
    assert torch.equal(levels.decode(x), k)
    for shift in (-0.49, 0.49):
        assert torch.equal(levels.decode(x + shift * levels.width), k)
    assert levels.width == pytest.approx((parts[2] - parts[1]) / parts[0])


def test_beyond_the_range_are_the_outermost_levels() -> None:
    assert Levels(4).decode(torch.tensor([-9.0, 1.0, 9.0])).tolist() == [0, 3, 3]


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        ([[1]], TypeError, "expected a tensor of integers .* got list"),
        (torch.zeros(1, 2), TypeError, "integers 0 ... 3, got torch.float32"),
        (torch.zeros(1, 2, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(1, 2, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.tensor([[0, 4]]), ValueError, "levels 0 ... 3, got 0 to 4"),
        (torch.tensor([[-1, 2]]), ValueError, "levels 0 ... 3, got -1 to 2"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, "non-empty"),
        (torch.tensor(1), ValueError, "non-empty"),
    ],
)
def test_bad_images(images, error, match) -> None:
    with pytest.raises(error, match=match):
        Levels(4).encode(images)


def test_bad_levels() -> None:
    with pytest.raises(ValueError, match="levels: expected an integer >= 2, got 1"):
        Levels(1)
    with pytest.raises(TypeError, match="levels: expected an integer"):
        Levels(2.0)
    with pytest.raises(TypeError, match="low: expected a number, got str"):
        Levels(4, "0")
    with pytest.raises(TypeError, match="high: expected a number, got NoneType"):
        Levels(4, 0.0, None)
    for low, high in ((1.0, 1.0), (1.0, -1.0), (-math.inf, 0.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="finite low < high"):
            Levels(4, low, high)


def test_every_integer_dtype_is_read() -> None:
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64):
        Levels(4).check(torch.tensor([[0, 3]], dtype=dtype))
        with pytest.raises(ValueError, match="got 0 to 4"):
            Levels(4).check(torch.tensor([[0, 4]], dtype=dtype))
