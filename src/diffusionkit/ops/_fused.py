"""The fused operation on CUDA tensors: where it is used, and its derivatives.

To whatever traces or records operations, such as torch.compile, FakeTensorMode and make_fx, it is
one operation, `diffusionkit::upfirdn`, which no compiler replaces by another. What it does not
support is computed in plain torch.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # imported by torch itself
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode
from typing_extensions import override

from .._tracing import transformed
from . import _plain
from ._plan import Line, Plan

logger = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch 2.6
_MOST_TAPS = 8  # the kernel is unrolled
_MOST_INDEX = 2**30  # rows and columns are counted in 32 bits, elements in 64


def suits(x: Tensor, taps: tuple[float, ...]) -> bool:
    """Whether the fused operation supports this input and kernel."""
    return (
        _is_on_gpu(x)
        and x.ndim <= 4
        and x.dtype in _DTYPES
        and len(taps) <= _MOST_TAPS
        and _can_launch(x.device.index or 0)
        and (_is_traced(x) or _is_ordinary(x))
    )


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _is_transformed() -> bool:
    """Whether transforms of torch.func or jit.trace are active, for which only torch will do."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or transformed()


def _is_traced(x: Tensor) -> bool:
    """Whether operations on x are traced or recorded, where ours is one of them.

    An exported program consists of torch's operations alone, since it may be read where this
    library is not installed. Forward-mode derivatives and torch's operation counter do not support
    ours.
    """
    if _is_transformed() or forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_compiling():
        return not _is_exporting()
    if isinstance(x, FakeTensor):
        return not _is_counting()
    return type(x) in (Tensor, nn.Parameter) and is_in_torch_dispatch_mode() and not _is_counting()


def _is_counting() -> bool:
    """Whether torch counts floating-point operations."""
    modes = _get_current_dispatch_mode_stack()
    return any("FlopCounter" in type(mode).__name__ for mode in modes)


def _is_ordinary(x: Tensor) -> bool:
    """Whether x has data, and nothing traces, records or transforms what is done with it."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or not torch._C._has_storage(x)
        or _is_transformed()
        or is_in_torch_dispatch_mode()
    )


def plan(
    x: Tensor,
    taps: tuple[float, ...],
    gain: float,
    up: int,
    down: int,
    pads: Sequence[tuple[int, int]],
) -> Plan:
    """Return the plan of the kernel.

    Args:
        x: input (B, C, *spatial) with one or two spatial dimensions.
        taps: the kernel, the same for each dimension.
        gain: factor of the output.
        up: upsampling factor.
        down: downsampling factor.
        pads: zeros before and after, for each dimension.
    """
    before = [pad for pad, _ in pads]
    outputs = [
        (n * up + sum(pad) - len(taps)) // down + 1
        for n, pad in zip(x.shape[2:], pads, strict=True)
    ]
    return _plan(x, taps, gain, up, down, before, outputs)


def _plan(
    x: Tensor,
    taps: Sequence[float],
    gain: float,
    up: int,
    down: int,
    before: Sequence[int],
    outputs: Sequence[int],
) -> Plan:
    """Return a plan for numbers of outputs; a signal is an image of one row."""
    line = tuple(map(float, taps))  # integers would be compiled separately
    lines = [
        Line(line, up, down, zeros, n, count)
        for n, zeros, count in zip(x.shape[2:], before, outputs, strict=True)
    ]
    vertical = lines[0] if len(lines) == 2 else Line((1.0,), 1, 1, 0, 1, 1)
    return Plan(vertical, lines[-1], float(gain))


def upfirdn(x: Tensor, plan: Plan) -> Tensor:
    """Run the fused operation; differentiable any number of times.

    Args:
        x: input (B, C, *spatial) that `suits`, or a gradient of any kind.
        plan: the plan for it; a signal is an image of one row.
    """
    if _is_traced(x):
        return _recorded(x, plan)
    if _is_ordinary(x):
        y: Tensor = _Upfirdn.apply(x, plan)  # type: ignore[no-untyped-call]
        return y
    return _in_plain_torch(x, plan)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of images lie next to one another, as in the output then."""
    return (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )


def _recorded(x: Tensor, plan: Plan) -> Tensor:
    """Run the operation that compilers see."""
    lines = (plan.vertical, plan.horizontal)[4 - x.ndim :]
    before, outputs = [line.before for line in lines], [line.outputs for line in lines]
    last = plan.horizontal  # Dynamo of torch 2.6 cannot take a slice of it
    y: Tensor = operation(
        x, last.taps, plan.gain, last.up, last.down, before, outputs, is_channels_last(x)
    )
    return y


def _in_plain_torch(x: Tensor, plan: Plan) -> Tensor:
    lines = (plan.vertical, plan.horizontal)[4 - x.ndim :]
    taps, up, down = plan.horizontal[:3]
    pads = [(line.before, line.after()) for line in lines]
    return _plain.upfirdn(x, taps, plan.gain, up, down, pads)


def _run(x: Tensor, plan: Plan, channels_last: bool) -> Tensor:
    """Launch the kernel if it can count the rows and columns and there are any."""
    if _is_on_gpu(x) and 0 < x.shape[0] * x.shape[1] * plan.longest() < _MOST_INDEX:
        from ._triton import launch

        return launch(x, plan, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return _in_plain_torch(x, plan).contiguous(memory_format=memory_format)


class _Upfirdn(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _run(x, plan, is_channels_last(x))

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return upfirdn(gradients[0], ctx.plan.adjoint()), None

    @staticmethod
    @override
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return upfirdn(tangents[0], ctx.plan)


# Opaque to compilers, which would otherwise have to inline a kernel with tuples of weights. The
# memory format is an argument, as a compiler may pass x in another one than it was traced with.
@torch.library.custom_op(
    "diffusionkit::upfirdn",
    mutates_args=(),
    schema="(Tensor x, float[] taps, float gain, SymInt up, SymInt down, SymInt[] before, "
    "SymInt[] outputs, bool channels_last) -> Tensor",
)
def operation(
    x: Tensor,
    taps: Sequence[float],
    gain: float,
    up: int,
    down: int,
    before: Sequence[int],
    outputs: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """Run the fused operation, on the CPU in plain torch."""
    return _run(x, _plan(x, taps, gain, up, down, before, outputs), channels_last)


@operation.register_fake
def _(
    x: Tensor,
    taps: Sequence[float],
    gain: float,
    up: int,
    down: int,
    before: Sequence[int],
    outputs: Sequence[int],
    channels_last: bool,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*x.shape[:2], *outputs)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.plan = _plan(*inputs[:7])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # Where a compiler traces the derivatives, the gradient is of a type of its own.
    known = _is_transformed() or forward_ad._current_level >= 0 or _is_ordinary(gradient)
    run = upfirdn if known else _recorded
    return run(gradient, ctx.plan.adjoint()), *(None,) * 7


operation.register_autograd(_backward, setup_context=_keep)


def _can_launch(device: int) -> bool:
    """Whether kernels can be launched on a GPU."""
    return _is_new_enough(device) and _triton_launches()


# Compilers take the result as it is, as if decorated by `torch.compiler.assume_constant_result`,
# which would import all of Dynamo.
_can_launch._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _is_new_enough(device: int) -> bool:
    """Whether a GPU is there, which a fake tensor does not need, and runs the kernel."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 5)


@functools.cache
def _triton_launches() -> bool:
    """Whether Triton is installed and can launch kernels."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from ._triton import load_driver

        load_driver()
    except Exception as error:  # of many types; plain torch works in any case
        logger.warning(
            "FIR resampling uses plain torch, as Triton cannot launch kernels: %s", error
        )
        return False
    return True
