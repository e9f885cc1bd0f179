"""U-Nets compiled, transformed, and in other dtypes and memory formats."""

import pytest
import torch
from support.tiny_networks import CLASSES, FAMILIES, arguments, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusionkit.networks.unet import UNet

kinds = pytest.mark.parametrize("kind", FAMILIES)
some = pytest.mark.parametrize(
    "kind", ["NCSNpp", "residuals", "separate FIR", "ADM updown", "EDM2 everything"]
)
classes = pytest.mark.parametrize("kind", CLASSES)
slow = pytest.mark.slow


def check_compiled(net: UNet) -> None:
    torch.compiler.reset()
    given = arguments(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given), net(**given))


@pytest.mark.parametrize(
    "kind", [k if k == "NCSNpp" else pytest.param(k, marks=slow) for k in FAMILIES]
)
def test_compiles_in_one_graph(kind: str) -> None:
    check_compiled(tiny(kind))


def test_one_level_of_adm_compiles_in_one_graph() -> None:
    check_compiled(tiny("ADMUNet", multipliers=(1,), attention_levels=(0,)))


@slow
@kinds
def test_compiles_in_one_graph_with_its_gradient(kind: str) -> None:
    torch.compiler.reset()
    net = tiny(kind)
    given = arguments(net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    got, expected = (
        torch.autograd.grad(f(**given).square().sum(), parameters) for f in (compiled, net)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@slow
@some
def test_compiles_with_inductor(kind: str) -> None:
    torch.compiler.reset()
    net = tiny(kind).float()
    given = arguments(net, dtype=torch.float32)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(**given), net(**given), rtol=1e-3, atol=1e-3)


@slow
@classes
def test_another_batch_size_recompiles_at_most_once(kind: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    net = tiny(kind)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for batch in (2, 3, 4):
        given = arguments(net, batch=batch)
        torch.testing.assert_close(compiled(**given), net(**given))
    assert counter.frame_count <= 2


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@kinds
def test_autocast(kind: str) -> None:
    net = tiny(kind).float()
    given = arguments(net, dtype=torch.float32)
    expected = net(**given)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(**given)
        half = net(**given | {"x": given["x"].bfloat16()} | _halved(given))
        with pytest.raises(TypeError, match="uint8"):
            net(**given | {"x": given["x"].to(torch.uint8)})
    assert got.dtype == torch.bfloat16
    assert 0 < relative(got, expected) < 0.05
    assert 0 < relative(half, expected) < 0.05
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


def _halved(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.bfloat16() for n, v in given.items() if n in ("condition", "low_res")}


@some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    net = tiny(kind)
    given = arguments(net)
    expected = net(**given)
    noise_label = given["noise_label"]
    given = {n: v if v.dtype == torch.int64 else v.to(dtype) for n, v in given.items()}
    got = net.to(dtype)(**given | {"noise_label": noise_label.float()})
    assert got.dtype == dtype
    assert 0 < relative(got, expected) < (0.01 if dtype == torch.float16 else 0.05)


@kinds
def test_single_precision(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    expected = net(**given)
    given = {n: v if v.dtype == torch.int64 else v.float() for n, v in given.items()}
    got = net.float()(**given)
    assert got.dtype == torch.float32
    assert 0 < relative(got, expected) < 1e-5


@kinds
def test_channels_last(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    expected = net(**given)
    net = net.to(memory_format=torch.channels_last)
    got = net(**given | {"x": given["x"].contiguous(memory_format=torch.channels_last)})
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_in_three_dimensions() -> None:
    net = tiny("DDPMpp", dims=3).float()  # torch's layers lose the memory format in float64
    given = arguments(net, 4, 2, 6, dtype=torch.float32)
    expected = net(**given)
    net = net.to(memory_format=torch.channels_last_3d)
    got = net(**given | {"x": given["x"].contiguous(memory_format=torch.channels_last_3d)})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.is_contiguous(memory_format=torch.channels_last_3d)


@some
def test_forward_derivative(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    x = given.pop("x")
    v = torch.randn_like(x)
    h = 1e-5
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        out, tangent = jvp(lambda x: net(x, **given), (x,), (v,))
        difference = (net(x + h * v, **given) - net(x - h * v, **given)) / (2 * h)
    torch.testing.assert_close(out, net(x, **given))
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)


@some
def test_second_derivative(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net, batch=1)
    x = given.pop("x").requires_grad_()
    v = torch.randn_like(x)

    def slope(x: Tensor) -> Tensor:
        out = net(x, **given).square().sum()
        return (torch.autograd.grad(out, x, create_graph=True)[0] * v).sum()

    with sdpa_kernel(SDPBackend.MATH):
        got = torch.autograd.grad(slope(x), x)[0]
        h = 1e-5
        difference = (slope(x + h * v) - slope(x - h * v)) / (2 * h)
    torch.testing.assert_close((got * v).sum(), difference, rtol=1e-4, atol=1e-4)


def loss(net: UNet, parameters: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    return functional_call(net, parameters, (), given).square().sum()


@some
def test_functional_gradient(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    parameters = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    got = grad(lambda p: loss(net, p, given))(parameters)
    net(**given).square().sum().backward()
    for name, value in got.items():
        torch.testing.assert_close(value, net.get_parameter(name).grad)


@pytest.mark.parametrize(
    "kind", ["NCSNpp", "DDPMpp", "DDPMUNet", "EDM2UNet", "skips", "separate FIR", "residuals"]
)
def test_per_sample_gradients(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    parameters = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}

    def of_one(sample: dict[str, Tensor]) -> dict[str, Tensor]:
        one = {name: value[None] for name, value in sample.items()}
        return grad(lambda p: loss(net, p, one))(parameters)

    with sdpa_kernel(SDPBackend.MATH):  # vmap would run fused attention sample by sample
        got = vmap(of_one)(given)
    for i in range(2):
        net.zero_grad()
        net(**{name: value[i : i + 1] for name, value in given.items()}).square().sum().backward()
        for name, value in got.items():
            torch.testing.assert_close(value[i], net.get_parameter(name).grad)
