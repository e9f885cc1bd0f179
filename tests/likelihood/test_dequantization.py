import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import seeded

from diffusionkit.likelihood.dequantization import Dequantizer, UniformDequantizer


class Constant(Dequantizer):
    """Every point at the same position in its bin."""

    def __init__(self, u: float, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.u = u

    def noise(self, images, *, generator=None, **cond):
        return torch.full(images.shape, self.u, dtype=torch.float64), torch.zeros(len(images))


@given(
    levels=st.sampled_from([2, 3, 10, 17, 100, 256, 1000, 65536]),
    ends=st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (-0.3, 0.7), (0.0, 255.0), (-7.1, -6.4)]),
    u=st.sampled_from([0.0, 1e-30, 1e-8, 0.5, 0.99, 1 - 2**-24, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(levels=65536, ends=(-0.3, 0.7), u=1.0, dtype=torch.float64)
@example(levels=65536, ends=(-1.0, 1.0), u=1.0, dtype=torch.float32)
def test_a_point_never_leaves_its_bin(levels, ends, u, dtype) -> None:
    dequantizer = Constant(u, levels, *ends, dtype=dtype)
    images = torch.arange(levels).unsqueeze(0)
    x = dequantizer(images).x
    assert x.dtype == dtype
    assert torch.equal(dequantizer.quantize(x), images)
    # The position is correct up to rounding.
    width = (ends[1] - ends[0]) / levels
    expected = ends[0] + width * (images.double() + u)
    largest = max(abs(end) for end in ends)
    error = (x.double() - expected).abs().max().item()
    assert error <= 2.1 * torch.finfo(dtype).eps * largest + 2e-15 * largest


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_points_do_not_depend_on_the_integer_dtype(dtype) -> None:
    dequantizer = UniformDequantizer(levels=100)
    images = torch.arange(100).view(4, 1, 5, 5)
    drawn = dequantizer(images.to(dtype), generator=seeded())
    expected = dequantizer(images, generator=seeded())
    assert torch.equal(drawn.x, expected.x)
    assert torch.equal(dequantizer.quantize(drawn.x), images)


# Densities 1/2 on [-1, 1] and 1 on [0, 1]: 8 bits per dimension.
@pytest.mark.parametrize(("low", "nll"), [(-1.0, 0.6931471805599453), (0.0, 0.0)])
def test_the_uniform_density_costs_eight_bits(low, nll) -> None:
    drawn = UniformDequantizer(256, low, 1.0)(torch.randint(256, (3, 2, 5)))
    bits = (10 * nll + drawn.log_prob) / (10 * math.log(2))
    torch.testing.assert_close(bits, torch.full((3,), 8.0).double(), rtol=1e-14, atol=0)


def test_points_are_uniform_in_their_bins() -> None:
    dequantizer = UniformDequantizer(levels=4, low=0.0, high=4.0)
    images = torch.full((1, 100_000), 2)
    u = dequantizer(images, generator=seeded()).x - 2
    # Standard errors: 0.0009 of the mean and 0.0009 of E u^2.
    assert abs(u.mean().item() - 1 / 2) < 0.004
    assert abs(u.square().mean().item() - 1 / 3) < 0.004


def test_a_sample_does_not_depend_on_its_batch() -> None:
    dequantizer = UniformDequantizer()
    images = torch.randint(256, (3, 7))
    whole = dequantizer(images, generator=[seeded(s) for s in range(3)]).x
    alone = dequantizer(images[2:], generator=[seeded(2)]).x
    assert torch.equal(whole[2:], alone)


def test_the_ends_of_the_range_belong_to_the_outermost_bins() -> None:
    dequantizer = UniformDequantizer(levels=17)
    x = torch.tensor([[-1.0, 1.0, -1.0 - 1e-7, 1.0 + 1e-7]])
    assert dequantizer.quantize(x).tolist() == [[0, 16, 0, 16]]


def test_gradients_flow_to_the_noise() -> None:
    class Learned(Constant):
        def noise(self, images, *, generator=None, **cond):
            return self.place.expand(images.shape), self.place.log().expand(len(images))

    dequantizer = Learned(0.5, 4, 0.0, 2.0)
    dequantizer.place = torch.nn.Parameter(torch.tensor(0.25))
    drawn = dequantizer(torch.tensor([[0, 1, 3]]))
    (drawn.x.sum() + drawn.log_prob.sum()).backward()
    torch.testing.assert_close(dequantizer.place.grad, torch.tensor(3 * 0.5 + 4.0))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "torch.bool"),
        ([[1, 2]], TypeError, "list"),
        (torch.tensor([[0, 17]]), ValueError, "17"),
        (torch.tensor([[-1, 3]]), ValueError, "-1"),
        (torch.zeros(0, 3, dtype=torch.long), ValueError, r"\(0, 3\)"),
        (torch.tensor(3), ValueError, r"\(\)"),
    ],
)
def test_bad_images(images, error, message) -> None:
    with pytest.raises(error, match=message):
        UniformDequantizer(levels=17)(images)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": 1}, ValueError, ">= 2"),
        ({"levels": 256.0}, TypeError, "float"),
        ({"low": 1.0}, ValueError, "low < high"),
        ({"high": math.inf}, ValueError, "inf"),
        ({"low": "0"}, TypeError, "str"),
        ({"dtype": torch.int32}, TypeError, "torch.int32"),
        ({"dtype": torch.bfloat16}, ValueError, "256 levels"),
        ({"low": 1000.0, "high": 1001.0, "levels": 65536}, ValueError, "resolves 65536"),
    ],
)
def test_bad_settings(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        UniformDequantizer(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.tensor([[0.0, 1.1]]), ValueError, "1.1"),
        (torch.tensor([[-1.001, 0.0]]), ValueError, "-1.001"),
        (torch.tensor([[math.nan, 0.0]]), ValueError, "nan"),
        (torch.tensor([[0, 1]]), TypeError, "torch.int64"),
    ],
)
def test_points_outside_the_range(x, error, message) -> None:
    with pytest.raises(error, match=message):
        UniformDequantizer().quantize(x)
