"""The fused kernel against plain torch on a GPU."""

import pytest
import torch
from support import seeded
from torch.profiler import ProfilerActivity, profile

from diffusionkit.ops import _fused, _plain, fir_downsample, fir_upsample, upfirdn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TAPS = (1.0, 2.0, 5.0, 3.0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(), dtype=torch.float64).to("cuda", dtype)


@pytest.fixture(autouse=True)
def fused_is_used() -> None:
    if not _fused.suits(normal(1, 1, 4, 4), TAPS):
        pytest.skip("Triton is not installed or cannot launch kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 1000), (2, 3, 33, 70), (4, 256, 8, 8), (2, 3, 1, 300)])
@pytest.mark.parametrize("last", [False, True])
def test_values_and_gradients(dtype, shape, last) -> None:
    x = normal(*shape, dtype=dtype)
    memory_format = torch.channels_last if last and x.ndim == 4 else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    for up, down, pads in ((2, 1, (2, 1)), (1, 2, (1, 1)), (1, 1, (2, 2)), (3, 2, (-1, 4))):
        pads = [pads if n > 1 else (4, 4) for n in shape[2:]]
        y = upfirdn(x, TAPS, up=up, down=down, padding=pads)
        expected = _plain.upfirdn(x.double(), TAPS, 1.0, up, down, pads)
        # float32 sums up to 16 products of taps that sum to 121.
        tolerance = {"rtol": 1.01 * torch.finfo(dtype).eps, "atol": 2e-4}
        torch.testing.assert_close(y.double(), expected, **tolerance)
        assert y.is_contiguous(memory_format=memory_format)
        g = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, x, g)
        (want,) = torch.autograd.grad(expected, x, g.double())
        torch.testing.assert_close(got, want, **tolerance)


def test_one_launch_forward_and_one_backward() -> None:
    x = normal(4, 64, 32, 32).requires_grad_()
    for resample in (fir_upsample, fir_downsample):
        y = resample(x)
        g = torch.randn_like(y)
        torch.autograd.grad(resample(x), x, g)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            torch.autograd.grad(resample(x), x, g)
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if "upfirdn_kernel" in event.name]
        assert len(kernels) == 2
        assert not [event.name for event in profiler.events() if "Memcpy" in event.name]


def test_the_plain_path_does_not_synchronize() -> None:
    x = normal(2, 3, 8, 8, dtype=torch.float64)  # not supported by the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        fir_upsample(x)
        fir_downsample(x, torch.ones(2, 2, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_transforms_use_plain_torch() -> None:
    x, t = normal(2, 3, 8, 8), normal(2, 3, 8, 8).flip(0)
    torch.testing.assert_close(torch.func.jvp(fir_upsample, (x,), (t,))[1], fir_upsample(t))
    torch.testing.assert_close(torch.func.vmap(fir_upsample)(x[None])[0], fir_upsample(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_functions_launch_it(backend, memory_format) -> None:
    torch._dynamo.reset()
    weight = normal(4, 3, 3, 3)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv2d(fir_upsample(x), weight, padding=1)
        return fir_downsample(y.sin())

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    x = normal(2, 3, 8, 8).contiguous(memory_format=memory_format).requires_grad_()
    y, expected = compiled(x), function(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    got, want = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.autograd.grad(compiled(x).square().sum(), x)
        torch.cuda.synchronize()
    assert sum("upfirdn_kernel" in event.name for event in profiler.events()) == 4


def test_all_divisions_compute_the_same_and_one_is_chosen() -> None:
    from diffusionkit.ops import _triton

    x = normal(16, 64, 64, 64)
    plan = _fused.plan(x, TAPS, 1.0, 2, 1, [(2, 1)] * 2)
    expected = _triton.launch(x, plan, False)
    assert any(key[0] == plan for key in _triton._chosen)
    for blocks in _triton.CHOICES:
        assert torch.equal(_triton.launch(x, plan, False, blocks), expected)


def test_it_is_captured_in_a_graph() -> None:
    x = normal(2, 3, 8, 8)
    fir_upsample(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fir_upsample(x)
    x.copy_(normal(2, 3, 8, 8).flip(0))
    graph.replay()
    torch.testing.assert_close(y, fir_upsample(x))


def test_more_elements_than_fit_into_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of memory")
    x = torch.zeros(1, 2**13, 2**9, 2**9, device="cuda", dtype=torch.float16)
    x[0, -1] = 1.0
    y = fir_downsample(fir_upsample(x, [1, 1]), [1, 1])
    assert torch.equal(y[0, -1], x[0, -1])
    assert not y[0, :-1].any()
