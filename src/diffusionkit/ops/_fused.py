"""Conditions for using the fused kernel, and its derivatives.

Everything else is computed in plain torch, which supports all cases.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

from . import _plain
from ._plan import Line, Plan

logger = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_TAPS = 8  # the kernel is unrolled
_MOST_INDEX = 2**30  # rows and columns are counted in 32 bits, elements in 64


def suits(x: Tensor, taps: tuple[float, ...], up: int, pads: Sequence[tuple[int, int]]) -> bool:
    """Whether the fused kernel supports this input, kernel and padding."""
    if not x.is_cuda or x.ndim > 4 or _hidden(x):
        return False
    longest = max(
        n * up + abs(before) + abs(after)
        for n, (before, after) in zip(x.shape[2:], pads, strict=True)
    )
    return (
        x.dtype in _DTYPES
        and len(taps) <= _MOST_TAPS
        and 0 < x.shape[0] * x.shape[1] * longest < _MOST_INDEX
        and torch.cuda.get_device_capability(x.device) >= (7, 5)
        and _triton_launches()
    )


def _hidden(x: Tensor) -> bool:
    """Whether x is a proxy, or torch is observed by something that cannot see the kernel.

    That is the case under torch.compile, which generates its own kernels; under torch.func, whose
    tensors have no storage and which needs another form of autograd functions; and in dispatch
    modes, which, for instance, record or count operations.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or not torch._C._has_storage(x)
        or torch._C._are_functorch_transforms_active()
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
    """Return the plan of the kernel; a signal is an image of one row.

    Args:
        x: input (B, C, *spatial) with one or two spatial dimensions.
        taps: the kernel, the same for each dimension.
        gain: factor of the output.
        up: upsampling factor.
        down: downsampling factor.
        pads: zeros before and after, for each dimension.
    """
    taps = tuple(map(float, taps))  # integers would be compiled separately
    lines = [
        Line(taps, up, down, before, n, (n * up + before + after - len(taps)) // down + 1)
        for n, (before, after) in zip(x.shape[2:], pads, strict=True)
    ]
    vertical = lines[0] if len(lines) == 2 else Line((1.0,), 1, 1, 0, 1, 1)
    return Plan(vertical, lines[-1], float(gain))


def upfirdn(x: Tensor, plan: Plan) -> Tensor:
    """Run the kernel; differentiable any number of times."""
    if _hidden(x):  # the backward pass may be hidden although the forward pass was not
        lines = (plan.vertical, plan.horizontal)[4 - x.ndim :]
        taps, up, down = lines[0][:3]
        pads = [(line.before, line.after()) for line in lines]
        return _plain.upfirdn(x, taps, plan.gain, up, down, pads)
    y: Tensor = _Upfirdn.apply(x, plan)  # type: ignore[no-untyped-call]
    return y


class _Upfirdn(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        from ._triton import launch

        ctx.plan = plan
        return launch(x, plan)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return upfirdn(gradients[0], ctx.plan.adjoint()), None

    @staticmethod
    @override
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return upfirdn(tangents[0], ctx.plan)


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
