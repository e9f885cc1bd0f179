"""The fused kernel: padding, upsampling, filter, downsampling and gain in one pass.

Importing this file imports Triton.
"""
# Triton has no type stubs, and its compiler accepts no annotation but constexpr.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="import-untyped,import-not-found,assignment"
# ruff: noqa: ANN001

from __future__ import annotations

import functools
import math
import re
from collections.abc import Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from ._plan import Plan

LOWEST = (3, 4)
"""The lowest Triton, which comes with torch 2.8: older ones cannot compile the kernel."""


@triton.jit
def upfirdn_kernel(
    x_pointer,
    y_pointer,
    gain,
    planes,
    columns,
    height,
    width,
    out_height,
    out_width,
    inner,
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    WEIGHTS_H: tl.constexpr,
    WEIGHTS_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Filter images laid out as (planes, height, width, inner).

    The outputs are divided into cells of `len(FIRST_H)` by `len(FIRST_W)`, whose weights and
    relative input positions are known at compile time: cells differ only in their offset, a
    multiple of STEP_H and STEP_W samples. The outputs of a cell share loads and sums of rows. A
    program computes BLOCK_H rows of cells, with all planes stacked, by BLOCK_W columns, which
    enumerate cells and inner indices.
    """
    blocks = tl.cdiv(columns, BLOCK_W)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    column = block * BLOCK_W + tl.arange(0, BLOCK_W)
    rows = tl.cdiv(out_height, len(FIRST_H))  # of cells in a plane
    plane = row // rows
    cell_h, cell_w = row % rows, column // inner
    inside = plane < planes
    # Rows fit into 32 bits, pixels may not. (A width of 1 is not a tensor here.)
    stride = tl.cast(width, tl.int64) * inner
    out_stride = tl.cast(out_width, tl.int64) * inner
    from_h, from_w = cell_h * STEP_H, cell_w * STEP_W
    start_h = (plane * height + from_h).to(tl.int64) * stride
    start_w = from_w * inner + column % inner
    tile = x_pointer + start_h[:, None] + start_w[None, :]

    outputs = ()
    for a in tl.static_range(len(FIRST_H)):
        for b in tl.static_range(len(FIRST_W)):
            total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
            for i in tl.static_range(len(WEIGHTS_H[a])):
                at_h = from_h + (FIRST_H[a] + i)
                mask_h = inside & (at_h >= 0) & (at_h < height)
                line = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
                for j in tl.static_range(len(WEIGHTS_W[b])):
                    at_w = from_w + (FIRST_W[b] + j)
                    mask_w = (at_w >= 0) & (at_w < width)
                    offset = (FIRST_H[a] + i) * stride + (FIRST_W[b] + j) * inner
                    mask = mask_h[:, None] & mask_w[None, :]
                    value = tl.load(tile + offset, mask=mask, other=0.0)
                    line += WEIGHTS_W[b][j] * value.to(tl.float32)
                total += WEIGHTS_H[a][i] * line
            # Stored only after all loads, which could not be shared otherwise.
            outputs += ((total * gain).to(y_pointer.dtype.element_ty),)

    for a in tl.static_range(len(FIRST_H)):
        out_h = cell_h * len(FIRST_H) + a
        mask_h = inside & (out_h < out_height)
        target = y_pointer + ((plane * out_height + out_h).to(tl.int64) * out_stride)[:, None]
        if len(FIRST_W) == 2 and not CHANNELS_LAST:
            # Adjacent outputs are stored together.
            out_w = block * (2 * BLOCK_W) + tl.arange(0, 2 * BLOCK_W)
            mask = mask_h[:, None] & (out_w < out_width)[None, :]
            pairs = tl.interleave(outputs[2 * a], outputs[2 * a + 1])
            tl.store(target + out_w[None, :], pairs, mask=mask)
        else:
            for b in tl.static_range(len(FIRST_W)):
                out_w = cell_w * len(FIRST_W) + b
                mask_w = out_w < out_width
                offset = (out_w * inner + column % inner)[None, :]
                mask = mask_h[:, None] & mask_w[None, :]
                tl.store(target + offset, outputs[a * len(FIRST_W) + b], mask=mask)


class Blocks(NamedTuple):
    """A division of the outputs among programs and threads; all of them compute the same.

    Attributes:
        outputs: outputs of a program, at most, a power of 2.
        cells: cells of a program in one row, at most, a power of 2.
        rows: rows of outputs in a cell, at most.
        warps: groups of 32 threads of a program.
    """

    outputs: int
    cells: int
    rows: int
    warps: int


CHOICES = (
    Blocks(2048, 64, 4, 4),
    Blocks(1024, 64, 2, 4),
    Blocks(4096, 128, 4, 8),
    Blocks(1024, 256, 1, 4),
)
"""What is tried once for each kind of input; the first is taken where nothing can be timed."""

_LEAST_TIMED = 2**20  # outputs; what is smaller takes as long as its launch
_chosen: dict[tuple[Hashable, ...], Blocks] = {}


def launch(x: Tensor, plan: Plan, channels_last: bool, blocks: Blocks | None = None) -> Tensor:
    r"""Run the kernel.

    Args:
        x: input (B, C, \*spatial) with one or two spatial dimensions, not empty.
        plan: the plan for them; a signal is an image of one row.
        channels_last: whether images are read and written in that memory format.
        blocks: the division among programs; the fastest one by default, which the first call for
            a shape finds, unless a CUDA graph is being captured.

    Returns:
        Output (B, C, \*filtered) with the dtype of x.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    shape = (*x.shape[:2], *(plan.vertical.outputs, plan.horizontal.outputs)[4 - x.ndim :])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    inner = x.shape[1] if channels_last else 1
    planes = x.shape[0] * x.shape[1] // inner
    with torch.cuda.device_of(x):
        if blocks is None:
            blocks = CHOICES[0] if x.is_cpu else _fastest(x, y, plan, planes, inner)
        _run(x, y, plan, planes, inner, blocks)
    return y


def _fastest(x: Tensor, y: Tensor, plan: Plan, planes: int, inner: int) -> Blocks:
    """Return the blocks for an input, after timing all of them if it is a new kind of input."""
    if y.numel() < _LEAST_TIMED:
        return CHOICES[0]
    key = (plan, _magnitude(planes), inner, x.dtype, x.device)
    found = _chosen.get(key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return CHOICES[0]
        found = _chosen[key] = min(CHOICES, key=partial(_milliseconds, x, y, plan, planes, inner))
    return found


def _magnitude(planes: int) -> int:
    """Return the next power of 2, so that batches of nearly the same size are timed once."""
    return (planes - 1).bit_length()


def _milliseconds(
    x: Tensor, y: Tensor, plan: Plan, planes: int, inner: int, blocks: Blocks
) -> float:
    """Return the time of the kernel, infinite if the device has not the resources."""
    try:
        run = partial(_run, x, y, plan, planes, inner, blocks)
        return float(do_bench(run, warmup=2, rep=10, return_mode="median"))
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf


@functools.lru_cache(maxsize=1024)
def _arguments(
    plan: Plan, planes: int, inner: int, blocks: Blocks
) -> tuple[tuple[int], tuple[int | float, ...], dict[str, Any]]:
    """Return the grid, the arguments after the tensors, and the constants of the kernel."""
    h, w, gain = plan
    count = h.up * max(1, min(blocks.rows, h.outputs) // h.up)
    (first_h, weights_h), (first_w, weights_w) = h.sums(count), w.sums(w.up)
    rows, columns = planes * triton.cdiv(h.outputs, count), triton.cdiv(w.outputs, w.up) * inner
    block_w = min(triton.next_power_of_2(columns), blocks.cells)
    block_h = max(1, triton.next_power_of_2(blocks.outputs // (count * w.up * block_w)))
    block_h = min(triton.next_power_of_2(rows), block_h)
    grid = (triton.cdiv(rows, block_h) * triton.cdiv(columns, block_w),)
    values = (gain, planes, columns, h.inputs, w.inputs, h.outputs, w.outputs, inner)
    constants = {
        "FIRST_H": first_h,
        "FIRST_W": first_w,
        "WEIGHTS_H": weights_h,
        "WEIGHTS_W": weights_w,
        "STEP_H": count // h.up * h.down,
        "STEP_W": w.down,
        "BLOCK_H": block_h,
        "BLOCK_W": block_w,
        "CHANNELS_LAST": inner > 1,
        "num_warps": blocks.warps,
        "enable_fp_fusion": True,  # Triton warns if unset
    }
    return grid, values, constants


def _run(x: Tensor, y: Tensor, plan: Plan, planes: int, inner: int, blocks: Blocks) -> None:
    grid, values, constants = _arguments(plan, planes, inner, blocks)
    upfirdn_kernel[grid](x, y, *values, **constants)


def load_driver() -> None:
    """Load the launcher of kernels; unless cached, it is built with a C compiler.

    Raises:
        Exception: of a kind that depends on what is missing.
    """
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < LOWEST:
        raise RuntimeError(f"expected Triton {LOWEST[0]}.{LOWEST[1]}, got {triton.__version__}")
    driver.active.utils  # noqa: B018
