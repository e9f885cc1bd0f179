"""The fused kernel on the CPU, in Triton's interpreter; run by `test_fused.py`.

The interpreter must be selected before Triton is imported, hence in a separate process.
"""

from functools import partial

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.direct_fir import direct, normal
from torch import Tensor
from torch.autograd import forward_ad

from diffusionkit.ops import (
    _fused,
    _plain,
    _triton,
    fir_conv_downsample,
    fir_conv_upsample,
    fir_downsample,
    fir_upsample,
    upfirdn,
)

pytestmark = pytest.mark.usefixtures("launching_on_the_cpu")
TAPS = (1.0, 2.0, 5.0, 3.0)
normal = partial(normal, dtype=torch.float32)
# up, down, pads; the last one crops both sides.
RATES = [(2, 1, (2, 1)), (1, 2, (1, 1)), (1, 1, (2, 2)), (3, 2, (-1, 4)), (2, 3, (-2, -1))]


def bound(x: Tensor, kernel: Tensor, up: int, down: int, pads: list) -> float:
    """Return a few float32 roundings of the largest sum of magnitudes."""
    return 4e-7 * direct(x.abs(), kernel.abs(), up, down, pads).max().item()


@st.composite
def cases(draw: st.DrawFn) -> dict:
    dims = draw(st.integers(1, 2))
    pair = st.tuples(st.integers(-2, 5), st.integers(-2, 5))
    return {
        "spatial": draw(st.lists(st.integers(1, 9), min_size=dims, max_size=dims)),
        "taps": draw(st.integers(1, 5)),
        "up": draw(st.integers(1, 3)),
        "down": draw(st.integers(1, 3)),
        "pads": draw(st.lists(pair, min_size=dims, max_size=dims)),
        "last": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


# More than one block of rows and columns, in both memory formats and in one dimension.
WIDE = {"spatial": [3, 70], "taps": 4, "up": 2, "down": 1, "pads": [(2, 1)] * 2, "seed": 0}


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cases())
@example({**WIDE, "last": False})
@example({**WIDE, "last": True})
@example({**WIDE, "last": False, "up": 1, "down": 2})
@example({**WIDE, "last": False, "spatial": [300], "pads": [(2, 1)]})
@example({**WIDE, "last": False, "spatial": [150, 2], "up": 1, "pads": [(2, 2)] * 2})
def test_the_kernel_matches_the_definition_and_its_adjoint(case: dict) -> None:
    up, down, pads = case["up"], case["down"], case["pads"]
    for n, (before, after) in zip(case["spatial"], pads, strict=True):
        assume(n * up + before + after >= case["taps"])
        assume(n * up + min(before, 0) + min(after, 0) > 0)
    x = normal(1, 2, *case["spatial"], seed=case["seed"])
    if case["last"] and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    kernel = normal(case["taps"], seed=case["seed"] + 1)
    plan = _fused.plan(x, tuple(kernel.tolist()), 0.5, up, down, pads)
    y = _fused.upfirdn(x, plan)
    expected = 0.5 * direct(x, kernel, up, down, pads)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=bound(x, kernel, up, down, pads))
    assert y.is_contiguous(memory_format=torch.channels_last) or not x.is_contiguous(
        memory_format=torch.channels_last
    )
    g = normal(*y.shape, seed=2)
    back = _fused.upfirdn(g, plan.adjoint())
    assert back.shape == x.shape
    torch.testing.assert_close((back * x).double().sum(), (g * y).double().sum(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, kernel = normal(2, 3, 9, 7).to(dtype), torch.tensor(TAPS)
    y = _fused.upfirdn(x, _fused.plan(x, TAPS, 1.0, 2, 1, [(2, 1)] * 2))
    assert y.dtype == dtype
    expected = direct(x, kernel, 2, 1, [(2, 1)] * 2).to(dtype)
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def both(x: Tensor, rate: tuple) -> tuple:
    """Return the fused and the plain operation for an input."""
    up, down, pad = rate
    pads = [pad] * (x.ndim - 2)
    plan = _fused.plan(x, TAPS, 0.1, up, down, pads)
    return (
        lambda x: _fused.upfirdn(x, plan),
        lambda x: _plain.upfirdn(x, TAPS, 0.1, up, down, pads),
    )


@pytest.mark.parametrize(
    ("spatial", "rate"), [*(((5, 6), rate) for rate in RATES), ((7,), RATES[0]), ((7,), RATES[3])]
)
def test_first_and_second_derivatives(spatial: tuple[int, ...], rate: tuple) -> None:
    x, t = normal(2, 2, *spatial).requires_grad_(), normal(2, 2, *spatial, seed=1)
    results = []
    for f in both(x, rate):
        (gradient,) = torch.autograd.grad((f(x) ** 4).sum(), x, create_graph=True)
        (product,) = torch.autograd.grad((gradient * t).sum(), x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), t)
            forward = forward_ad.unpack_dual(f(dual) ** 2).tangent
        results.append((gradient, product, forward))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", RATES[::2])
@pytest.mark.parametrize("spatial", [(7,), (5, 6)])
def test_a_backward_pass_under_vmap(spatial: tuple[int, ...], rate: tuple) -> None:
    """The backward pass then uses plain torch, with the paddings of the adjoint."""
    x = normal(2, 2, *spatial).requires_grad_()
    results = []
    for f in both(x, rate):
        y = f(x)
        g = normal(3, *y.shape, seed=1)
        (batched,) = torch.autograd.grad(y, x, g, retain_graph=True, is_grads_batched=True)
        mapped = torch.func.vmap(lambda g, y=y: torch.autograd.grad(y, x, g)[0])(g)
        torch.testing.assert_close(mapped, batched)
        results.append(batched)
    torch.testing.assert_close(*results)


def test_strided_and_expanded_inputs() -> None:
    wide = normal(2, 6, 5, 8)
    for x in (wide[:, ::2], wide[..., ::2], wide.transpose(2, 3), wide[:1].expand(3, 6, 5, 8)):
        fused, plain = both(x, RATES[0])
        torch.testing.assert_close(fused(x), plain(x), check_stride=True)


def test_infinite_pixels_stay_local() -> None:
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = torch.inf
    y = _fused.upfirdn(x, _fused.plan(x, (1.0, 2.0, 1.0), 1.0, 2, 1, [(1, 1)] * 2))
    assert int(torch.isfinite(y).sum()) == y.numel() - 9
    assert not torch.isnan(y).any()


def test_the_public_functions_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(2, 3, 6, 8), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)
    calls = {
        "up": lambda: fir_upsample(x, TAPS, gain=0.5),
        "down": lambda: fir_downsample(x, TAPS, factor=3, gain=0.5),
        "general": lambda: upfirdn(x, TAPS, up=3, down=2, padding=((1, 2), (3, 0))),
        "conv_down": lambda: fir_conv_downsample(x, weight, bias, TAPS, gain=0.5),
        "conv_up": lambda: fir_conv_upsample(x, weight, bias, TAPS, gain=0.5),
    }
    with monkeypatch.context() as patch:
        patch.setattr(_fused, "_can_launch", lambda device: False)
        expected = {name: call() for name, call in calls.items()}
    plans, launch = [], _triton.launch
    monkeypatch.setattr(
        _triton, "launch", lambda x, plan, last: plans.append(plan) or launch(x, plan, last)
    )
    for number, (name, call) in enumerate(calls.items(), 1):
        torch.testing.assert_close(call(), expected[name], rtol=1e-5, atol=1e-5)
        assert len(plans) == number
    # A tensor of taps would have to be synchronized.
    fir_upsample(x, torch.tensor(TAPS))
    assert len(plans) == len(calls)


@pytest.mark.parametrize(("up", "down", "last"), [(2, 1, False), (1, 2, True)])
def test_any_division_among_programs_computes_the_same(up: int, down: int, last: bool) -> None:
    x = normal(1, 2, 5, 20)
    plan = _fused.plan(x, TAPS, 0.1, up, down, [(2, 1)] * 2)
    first, *others = (_triton.launch(x, plan, last, blocks) for blocks in _triton.CHOICES)
    assert all(torch.equal(y, first) for y in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "last"), [((2, 3, 5), False), ((1, 2, 3, 4), True)])
def test_the_operation_that_compilers_see(
    shape: tuple[int, ...], last: bool, dtype: torch.dtype
) -> None:
    x, dims = normal(*shape).to(dtype), len(shape) - 2
    arguments = (TAPS, 0.1, 2, 1, [2] * dims, [2 * n for n in shape[2:]], last)
    expected = _plain.upfirdn(x.double(), TAPS, 0.1, 2, 1, [(2, 1)] * dims)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        _fused.operation(x, *arguments).double(), expected, rtol=2 * eps, atol=2 * eps
    )


def test_the_fastest_division_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is simulated; what is small is not timed, nor is anything in a CUDA graph."""
    x, timed, capturing = normal(2, 3, 8, 8), [], [True]

    def clock(run: partial, **options: object) -> float:
        blocks = run.args[-1]
        timed.append(blocks)
        if len(timed) == 1:
            raise torch.OutOfMemoryError
        return 1.0 if blocks == _triton.CHOICES[2] else 2.0

    def chosen(x: Tensor) -> object:
        plan = _fused.plan(x, TAPS, 0.1, 2, 1, [(2, 1)] * 2)
        return _triton._fastest(x, torch.empty(2 * len(x), 3, 16, 8), plan, 3 * len(x), 1)

    monkeypatch.setattr(_triton, "do_bench", clock)
    monkeypatch.setattr(_triton, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert chosen(x) == _triton.CHOICES[0]
    monkeypatch.setattr(_triton, "_LEAST_TIMED", 0)
    assert chosen(x) == _triton.CHOICES[0]
    assert not timed
    capturing[0] = False
    for _ in range(2):
        assert chosen(x) == _triton.CHOICES[2]
        assert len(timed) == len(_triton.CHOICES)
    capturing[0] = True
    assert chosen(x) == _triton.CHOICES[2]


def test_inputs_not_supported_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    monkeypatch.setattr(_triton, "launch", lambda x, plan, last: launches.append(x))

    def suits(*shape: int, taps: tuple[float, ...] = TAPS, **options: object) -> bool:
        return _fused.suits(torch.zeros(shape or (2, 3, 8, 8), **options), taps)

    assert suits()
    assert suits(2, 3, 8, dtype=torch.bfloat16)
    assert not suits(2, 3, 8, 8, 8)
    assert not suits(dtype=torch.float64)
    assert not suits(taps=TAPS * 3)
    assert not suits(device="meta")
    # Numbers of elements are known when the operation runs.
    assert fir_upsample(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 16, 16)
    monkeypatch.setattr(_fused, "_MOST_INDEX", 16)
    assert not fir_upsample(torch.zeros(1, 1, 8, 8)).any()
    assert not launches
    monkeypatch.setattr(_fused, "_can_launch", lambda device: False)
    assert not suits()
