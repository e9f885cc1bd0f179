"""Dropout drops the right share of features, independently, and works under transforms."""

import math

import pytest
import torch
from torch import Tensor

from diffusionkit.networks.dropout import Dropout


def drop(x: Tensor, p: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    out: Tensor = Dropout(p).train()(x)
    return out


@pytest.mark.parametrize("p", [0.1, 0.13, 0.5, 0.95])
def test_share_and_mean(p: float) -> None:
    n = 400_000
    y = drop(torch.ones(n), p)
    error = math.sqrt(p * (1 - p) / n)
    assert abs(float((y == 0).double().mean()) - p) < 4 * error
    assert abs(float(y.double().mean()) - 1) < 4 * error / (1 - p)
    assert torch.unique(y).tolist() == pytest.approx([0, 1 / (1 - p)], rel=2e-4)


def test_features_are_dropped_independently() -> None:
    # Four features share one random number: check lags of up to eight.
    n = 200_000
    dropped = (drop(torch.ones(n), 0.3) == 0).double()
    for lag in range(1, 9):
        both = (dropped[lag:] * dropped[:-lag]).mean()
        assert abs(float(both) - 0.09) < 4 * math.sqrt(0.09 * 0.91 / n) * 1.5


def test_every_one_of_four_has_the_same_share() -> None:
    n = 400_000
    shares = (drop(torch.ones(n), 0.2) == 0).double().view(-1, 4).mean(0)
    assert (shares - 0.2).abs().max() < 4 * math.sqrt(0.16 / (n / 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (5,), (2, 3, 5), (2, 4, 3, 3)])
def test_shape_dtype_and_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    y = drop(x, 0.5)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.equal(y, torch.where(y == 0, y, 2 * x))


def test_extremes() -> None:
    layer = Dropout(0.0).train()
    x = torch.randn(7)
    assert layer(x) is x
    assert torch.isfinite(drop(torch.ones(1000), 1 - 1e-9)).all()
    assert Dropout(0.5).eval()(x) is x


def test_keeps_the_memory_format() -> None:
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert drop(x, 0.5).is_contiguous(memory_format=torch.channels_last)


def test_follows_the_global_generator() -> None:
    x = torch.ones(100)
    assert torch.equal(drop(x, 0.5, seed=3), drop(x, 0.5, seed=3))
    assert not torch.equal(drop(x, 0.5, seed=3), drop(x, 0.5, seed=4))


def test_gradient_is_the_mask() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = drop(x, 0.4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x.detach(), y.detach())


def test_function_transforms() -> None:
    layer = Dropout(0.5).train()
    x = torch.ones(6, 40)
    different = torch.func.vmap(layer, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(layer, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    torch.manual_seed(0)
    value, tangent = torch.func.jvp(layer, (x,), (3 * x,))
    torch.testing.assert_close(tangent, 3 * value)


def test_compiles_without_a_graph_break() -> None:
    y = torch.compile(Dropout(0.5).train(), fullgraph=True, backend="aot_eager")(torch.ones(4000))
    assert abs(float((y == 0).double().mean()) - 0.5) < 0.05
    assert torch.unique(y).tolist() == [0, 2]
