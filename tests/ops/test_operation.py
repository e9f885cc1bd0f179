"""What compilers and recorders see of the fused operation: itself, and no convolution.

Tensors on the CPU are taken for those of a GPU; the operation computes in plain torch here, and in
Triton's interpreter in `interpreted.py`.
"""

import warnings
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from support.direct_fir import normal
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from diffusionkit.networks import NCSNpp
from diffusionkit.ops import _fused, fir_conv_upsample, fir_downsample, fir_upsample

pytestmark = pytest.mark.usefixtures("launching_on_the_cpu", "without_a_kernel")
NAME = "diffusionkit.upfirdn.default"


@pytest.fixture(autouse=True)
def without_a_kernel(monkeypatch) -> None:
    monkeypatch.setattr(_fused, "_MOST_INDEX", 0)


def calls(graph: torch.fx.GraphModule) -> Counter:
    """Count the operations of a graph; constants are counted as "constant"."""
    nodes = [node for node in graph.graph.nodes if node.op in ("call_function", "get_attr")]
    return Counter("constant" if n.op == "get_attr" else str(n.target) for n in nodes)


def compiled(function, graphs: list, dynamic: bool = False):
    """Compile in one graph, and collect those of the forward and the backward pass."""

    def collect(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def groups(graph: torch.fx.GraphModule) -> set:
    """Return the numbers of groups of the convolutions, and other operations of that name."""
    found = set()
    for node in graph.graph.nodes:
        place = {"aten.convolution.default": 8, "aten.convolution_backward.default": 9}
        at = place.get(str(node.target))
        if at is not None:
            found.add(node.args[at])
        elif node.op == "call_function" and "conv" in str(node.target):
            found.add(str(node.target))
    return found


@pytest.mark.parametrize(
    ("shape", "up", "down", "last", "dtype"),
    [
        ((2, 3, 5), 2, 1, False, torch.float32),
        pytest.param((2, 3, 5, 4), 2, 1, False, torch.bfloat16, marks=pytest.mark.slow),
        ((2, 3, 5, 4), 3, 2, True, torch.float16),
    ],
)
def test_the_operation_is_registered_correctly(shape, up, down, last, dtype) -> None:
    dims = len(shape) - 2
    outputs = [(n * up + 4 - 3) // down + 1 for n in shape[2:]]
    arguments = ((1.0, 2.0, 1.0), 0.5, up, down, [2] * dims, outputs, last)
    x = normal(*shape).to(dtype).requires_grad_()
    torch.library.opcheck(_fused.operation, (x, *arguments))


class Resampled(torch.nn.Module):
    """What `NCSNpp` does at a change of resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return fir_upsample(self.second(fir_downsample(self.first(x)).sin()))


def check_kept(network, inputs: tuple, count: int) -> None:
    """The forward and the backward graph have so many operations, and no other convolutions."""
    graphs, results, x = [], [], inputs[0]
    trained = [p for p in network.parameters() if p.requires_grad]
    for run in (network, compiled(network, graphs)):
        x = x.detach().requires_grad_()
        y = run(x, *inputs[1:])
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *trained))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    for graph in graphs:
        assert calls(graph)[NAME] == count
        assert groups(graph) == {1}
        assert not calls(graph)["constant"]
    assert len(graphs) == 2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_layers_keep_it(memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6).to(memory_format=memory_format)
    check_kept(Resampled().to(memory_format=memory_format), (x,), 2)


@pytest.mark.slow
def test_a_compiled_network_keeps_it() -> None:
    torch.manual_seed(0)
    network = NCSNpp(2, width=8, multipliers=(1, 2), blocks=1, attention_levels=())
    # Both branches of a block at each change of resolution, and the progressive input.
    check_kept(network, (torch.randn(2, 2, 8, 8), torch.tensor([0.5, 2.0])), 5)


def test_sizes_may_be_dynamic() -> None:
    graphs = []
    resample = compiled(lambda x: fir_upsample(fir_downsample(x)), graphs, dynamic=True)
    for shape in ((2, 3, 4, 6), (3, 3, 6, 4)):
        x = normal(*shape).float().requires_grad_()
        expected = fir_upsample(fir_downsample(x))
        y = resample(x)
        torch.testing.assert_close(y, expected)
        g = normal(*y.shape, seed=1).float()
        (got,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(got, torch.autograd.grad(expected, x, g)[0])
    assert [calls(graph)[NAME] for graph in graphs] == [2, 2]


def test_second_derivatives_are_traced() -> None:
    """(sum f(x)^4)'' t has the operation, its adjoint, the operation, and the adjoint again."""

    def product(x, t):
        x = x.requires_grad_()
        (g,) = torch.autograd.grad((fir_upsample(x) ** 4).sum(), x, create_graph=True)
        return torch.autograd.grad((g * t).sum(), x)[0]

    x, t = normal(1, 2, 4, 4).float(), normal(1, 2, 4, 4, seed=1).float()
    graph = make_fx(product)(x, t)
    assert calls(graph)[NAME] == 4
    assert groups(graph) == set()
    x, t = normal(1, 2, 4, 4, seed=2).float(), normal(1, 2, 4, 4, seed=3).float()
    torch.testing.assert_close(graph(x, t), product(x, t))


def test_fake_tensors_have_the_shape_and_the_memory_format() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        y = fir_upsample(x)
    assert (y.shape, y.dtype) == ((2, 3, 8, 12), torch.bfloat16)
    assert y.is_contiguous(memory_format=torch.channels_last)


def used(function, *arguments) -> int:
    """How often a run uses the operation or its kernel."""
    count = []
    with pytest.MonkeyPatch.context() as patch:
        run = _fused._run
        patch.setattr(_fused, "_run", lambda *args: count.append(1) or run(*args))
        function(*arguments)
    return len(count)


def test_plain_torch_where_the_operation_has_no_rule() -> None:
    x, t = normal(2, 3, 4, 6).float(), normal(2, 3, 4, 6, seed=1).float()
    expected = fir_upsample(t)
    assert used(fir_upsample, x) == 1
    assert used(vmap(fir_upsample), x[None]) == 0
    assert used(lambda: jvp(fir_upsample, (x,), (t,))) == 0
    torch.testing.assert_close(jvp(fir_upsample, (x,), (t,))[1], expected)
    assert used(torch.func.grad(lambda x: fir_upsample(x).sum()), x) == 0
    with FlopCounterMode(display=False) as counter:
        assert used(fir_upsample, x) == 0
    assert counter.get_total_flops() > 0
    with forward_ad.dual_level():
        dual = fir_upsample(forward_ad.make_dual(x, t))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    mapped = compiled(
        lambda x, t: jvp(fir_upsample, (x,), (t,))[1] + vmap(fir_upsample)(x[None])[0], []
    )
    torch.testing.assert_close(mapped(x, t), expected + fir_upsample(x))


def test_programs_that_are_saved_contain_only_operations_of_torch() -> None:
    class Up(torch.nn.Module):
        def forward(self, x):
            return fir_upsample(x)

    x = normal(2, 3, 4, 6).float()
    if hasattr(torch.compiler, "is_exporting"):  # else Triton is too old for the kernel
        for strict in (False, True):
            program = torch.export.export(Up(), (x,), strict=strict)
            assert NAME not in calls(program)
            torch.testing.assert_close(program.module()(x), fir_upsample(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks of shapes, which a trace cannot repeat
        traced = torch.jit.trace(Up(), (x,))
    assert "_convolution" in str(traced.graph)


def test_gradients_of_a_traced_forward_pass_may_be_vectorized() -> None:
    x = normal(2, 3, 4, 6).float().requires_grad_()
    plan = _fused.plan(x, (1.0, 2.0, 1.0), 1.0, 2, 1, [(1, 1)] * 2)
    y = _fused._recorded(x, plan)
    g = normal(3, *y.shape, seed=1).float()
    (batched,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    for row, one in zip(g, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, x, row, retain_graph=True)[0], one)


@pytest.mark.slow
def test_inductor_keeps_it() -> None:
    """Its convolutions may choose another memory format than they were traced with."""
    torch._dynamo.reset()
    weight = normal(4, 3, 3, 3).float()

    def function(x):
        return fir_downsample(fir_conv_upsample(x, weight).relu()).sin()

    run = torch.compile(function, fullgraph=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = normal(2, 3, 8, 6).float().to(memory_format=memory_format).requires_grad_()
        assert used(run, x) == 2
        y, expected = run(x), function(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        got, want = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
