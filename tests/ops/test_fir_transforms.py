"""FIR resampling under autograd, torch.func, compilation, autocast and other memory formats."""

import pytest
import torch
from support.direct_fir import direct, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vjp, vmap

from diffusionkit.ops import (
    fir_conv_downsample,
    fir_conv_upsample,
    fir_downsample,
    fir_upsample,
    upfirdn,
)

TAPS = (1.0, 2.0, 5.0, 3.0)
KERNEL = torch.tensor(TAPS, dtype=torch.float64)
WEIGHT = normal(2, 3, 3, 3)
# Pairs of a function, linear in x, and its definition.
FUNCTIONS = {
    "up": (
        lambda x: fir_upsample(x, TAPS),
        lambda x: direct(x, KERNEL * 2 / 11, 2, 1, [(2, 1)] * 2),
    ),
    "down": (
        lambda x: fir_downsample(x, TAPS),
        lambda x: direct(x, KERNEL / 11, 1, 2, [(1, 1)] * 2),
    ),
    "both": (
        lambda x: upfirdn(x, TAPS, up=3, down=2, padding=((-1, 2), (3, 0))),
        lambda x: direct(x, KERNEL, 3, 2, [(-1, 2), (3, 0)]),
    ),
    "filter": (
        lambda x: upfirdn(x, TAPS, padding=((1, 3), (4, -1))),
        lambda x: direct(x, KERNEL, 1, 1, [(1, 3), (4, -1)]),
    ),
}
CONVOLUTIONS = {
    "conv_up": lambda x: fir_conv_upsample(x, WEIGHT.to(x.dtype), kernel=TAPS),
    "conv_down": lambda x: fir_conv_downsample(x, WEIGHT.to(x.dtype), kernel=TAPS),
}
LINEAR = {name: ours for name, (ours, _) in FUNCTIONS.items()} | CONVOLUTIONS


def basis(shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.eye(size, dtype=torch.float64).view(size, *shape)


@pytest.fixture(params=FUNCTIONS)
def pair(request):
    return FUNCTIONS[request.param]


def test_derivatives_match_the_definition(pair) -> None:
    ours, definition = pair
    x, t = normal(2, 1, 3, 4), normal(2, 1, 3, 4, seed=1)
    y, tangent = jvp(ours, (x,), (t,))
    torch.testing.assert_close(y, definition(x))
    torch.testing.assert_close(tangent, definition(t))
    # The matrix of the operation, column by column.
    matrix = definition(basis((1, 3, 4))).flatten(1)
    y, pull = vjp(ours, x)
    g = normal(*y.shape, seed=2)
    torch.testing.assert_close(pull(g)[0].flatten(), (g.flatten(1) @ matrix.T).flatten())
    torch.testing.assert_close(vmap(ours)(basis((1, 3, 4))[:, None]).flatten(1), matrix)


@pytest.mark.parametrize("name", LINEAR)
def test_gradcheck(name) -> None:
    x = normal(1, 3, 3, 4).requires_grad_()

    def cubic(x: Tensor) -> Tensor:
        return LINEAR[name](x**2)

    assert gradcheck(cubic, x, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(cubic, x, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", LINEAR)
def test_nested_transforms(name) -> None:
    """A loss sum f(x)^4 / 12 has the Hessian J^T diag(f^2) J."""
    f = LINEAR[name]
    x, t = normal(1, 3, 3, 4), normal(1, 3, 3, 4, seed=1)
    matrix = torch.stack([f(column[None]).flatten() for column in basis((3, 3, 4))])
    expected = matrix @ ((f(x).flatten() ** 2) * (t.flatten() @ matrix))

    def loss(x: Tensor) -> Tensor:
        return (f(x) ** 4).sum() / 12

    _, product = jvp(grad(loss), (x,), (t,))
    torch.testing.assert_close(product.flatten(), expected)
    nested = grad(lambda x: (grad(loss)(x) * t).sum())(x)
    torch.testing.assert_close(nested.flatten(), expected)
    batch = vmap(grad(lambda x: (grad(loss)(x) * t).sum()))(torch.stack([x, 0 * x]))
    torch.testing.assert_close(batch[0].flatten(), expected)
    assert not batch[1].any()


@pytest.mark.parametrize("shape", [(4,), (3, 2)])
def test_gradients_reach_the_kernel(shape: tuple[int, ...]) -> None:
    x, kernel = normal(2, 2, 4, 5), normal(*shape, seed=1).requires_grad_()
    for up, down in ((1, 1), (2, 1), (1, 2)):
        assert gradcheck(lambda k, up=up, down=down: upfirdn(x, k, up=up, down=down), kernel)
    assert gradcheck(lambda k: fir_upsample(x, k.abs() + 1), kernel)


def check_compiled(name: str, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LINEAR[name], fullgraph=True, dynamic=dynamic, backend=backend)
    for shape in ((2, 3, 4, 6), (3, 3, 5, 4)):
        x = normal(*shape).requires_grad_()
        y, expected = compiled(x), LINEAR[name](x)
        torch.testing.assert_close(y, expected)
        g = normal(*y.shape, seed=1)
        (got,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(got, torch.autograd.grad(expected, x, g)[0])


# The slow test compiles all; of those left out here one is compiled below and one is in "both".
@pytest.mark.parametrize("name", ["down", "both", "conv_up", "conv_down"])
def test_compiles_to_one_graph(name) -> None:
    check_compiled(name, "eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_compiles_with_inductor(name, dynamic) -> None:
    check_compiled(name, "inductor", dynamic)


def test_compiles_with_kernel_and_gain_as_arguments() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fir_upsample, fullgraph=True, dynamic=True, backend="eager")
    x = normal(2, 3, 4, 6)
    for kernel, gain in (((1.0, 3.0, 3.0, 1.0), 1.0), ((1.0, 2.5, 2.0), 0.5)):
        expected = fir_upsample(x, kernel, gain=gain)
        torch.testing.assert_close(compiled(x, kernel, gain=gain), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_is_rounded_once(name, dtype) -> None:
    ours, definition = FUNCTIONS[name]
    x = normal(2, 3, 6, 6).to(dtype)
    y = ours(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, definition(x).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_does_not_change_the_dtype(name) -> None:
    ours = FUNCTIONS[name][0]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = normal(2, 3, 6, 6).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x)
        assert y.dtype == dtype
        assert torch.equal(y, ours(x))


@pytest.mark.parametrize("function", [fir_conv_upsample, fir_conv_downsample])
def test_autocast_reaches_the_convolution(function) -> None:
    x, weight, bias = normal(2, 3, 6, 6).float(), WEIGHT.float(), normal(2).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x, weight, bias)
        assert function(x.bfloat16(), weight, bias).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), function(x, weight, bias), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", LINEAR)
def test_memory_format_is_kept(name) -> None:
    x = normal(2, 3, 6, 8).float()
    expected = LINEAR[name](x)
    assert expected.is_contiguous()
    y = LINEAR[name](x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    for view in (x.transpose(2, 3).contiguous().transpose(2, 3), x.repeat(1, 2, 1, 1)[:, ::2]):
        assert not view.is_contiguous()
        torch.testing.assert_close(LINEAR[name](view), LINEAR[name](view.contiguous()))


@pytest.mark.parametrize("function", [fir_upsample, fir_downsample])
def test_volumes_keep_their_memory_format(function) -> None:
    x = normal(2, 3, 4, 6, 8).float()
    y = function(x.to(memory_format=torch.channels_last_3d))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, function(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors_have_the_shape(name) -> None:
    x = torch.zeros(2, 3, 6, 8)
    ours = FUNCTIONS[name][0]
    y = ours(x.to("meta"))
    assert (y.shape, y.device.type) == (ours(x).shape, "meta")


def test_the_default_device_does_not_matter() -> None:
    x = normal(1, 1, 3, 3)
    with torch.device("meta"):
        y = fir_upsample(x)
    assert torch.equal(y, fir_upsample(x))
