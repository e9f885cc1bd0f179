"""The bandwidth of FIR resampling, and the division of its outputs among programs."""

from __future__ import annotations

from functools import partial

import torch
from fir import OURS, TAPS, Resample, backward, forward
from torch import Tensor

from diffusionkit.ops import _fused, _plain

from .measures import Sizes, device_seconds, launches

ARGUMENTS = {
    "up": (4 / 64, 2, 1, [(2, 1)] * 2),
    "down": (1 / 64, 1, 2, [(1, 1)] * 2),
}


def plain(x: Tensor, name: str) -> Tensor:
    """Resample without the fused kernel."""
    return _plain.upfirdn(x, TAPS, *ARGUMENTS[name])


def compiled(resample: Resample, device: torch.device) -> Resample:
    """Compile with inductor, or, on a CPU, where that takes long, only trace."""
    return torch.compile(resample, backend="inductor" if device.type == "cuda" else "aot_eager")


def bandwidths(sizes: Sizes, device: torch.device) -> None:
    """Print the bandwidth of FIR resampling and its share of that of a copy."""
    print(f"\n## FIR resampling of {sizes.signal}\n")
    print("GB/s of input and output, its share of a copy of as many bytes, and launches: of the")
    print("fused kernel, of the same in a compiled function, and of plain torch.")
    print("On a CPU nothing is fused.\n" * (device.type != "cuda"))
    print("| | copy | fused | share | launches | compiled | share | launches "
          "| plain | share | launches |")  # fmt: skip
    print("|---" * 11 + "|")
    formats = {"": torch.contiguous_format, ", channels_last": torch.channels_last}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for suffix, memory_format in formats.items():
            x = torch.randn(sizes.signal, device=device, dtype=dtype)
            x = x.contiguous(memory_format=memory_format)
            for name in OURS:
                bandwidth(f"{str(dtype).removeprefix('torch.')}{suffix}", name, x, sizes, device)


def bandwidth(label: str, name: str, x: Tensor, sizes: Sizes, device: torch.device) -> None:
    """Print the lines of one signal."""
    ours = OURS[name]
    moved = x.nbytes + ours(x).nbytes
    source = torch.empty(moved // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = moved / device_seconds(partial(target.copy_, source), sizes, device)
    torch.compiler.reset()
    ways = (ours, compiled(ours, device), partial(plain, name=name))
    for kind, make, passes in (("forward", forward, 1), ("with backward", backward, 2)):
        cells = [f"{label}, {name}, {kind}", f"{copy / 1e9:.3g}"]
        for resample in ways:
            run = make(resample, x)
            rate = passes * moved / device_seconds(run, sizes, device)
            cells += [f"{rate / 1e9:.3g}", f"{rate / copy:.0%}", f"{launches(run, device)}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def divisions(sizes: Sizes, device: torch.device) -> None:
    """Print the time of every division of the outputs among programs."""
    print("\n## Divisions of the fused kernel\n")
    if device.type != "cuda":
        print("They are timed on a GPU only.")
        return
    from diffusionkit.ops import _triton

    print("Microseconds, and GB/s of input and output; the first call for a shape times those that")
    print("are marked, and later ones take the fastest.\n")
    print("| | outputs | cells | rows | warps | us | GB/s | |\n" + "|---" * 8 + "|")
    others = [
        _triton.Blocks(outputs, cells, rows, warps)
        for outputs in (512, 1024, 2048, 4096)
        for cells in (32, 64, 128, 256)
        for rows in (1, 2, 4)
        for warps in (2, 4, 8)
    ]
    x = torch.randn(sizes.signal, device=device)
    for name, (gain, up, down, pads) in ARGUMENTS.items():
        plan, rows = _fused.plan(x, TAPS, gain, up, down, pads), []
        for blocks in dict.fromkeys((*_triton.CHOICES, *others)):
            try:
                run = partial(_triton.launch, x, plan, False, blocks)
                moved = x.nbytes + run().nbytes
                rows.append((device_seconds(run, sizes, device), moved, blocks))
            except Exception as error:  # more than the GPU's resources
                print(f"{name}, {blocks}: {type(error).__name__}")
        for seconds, moved, blocks in sorted(rows)[:20]:
            cells = [name, *blocks, f"{1e6 * seconds:.3g}", f"{moved / seconds / 1e9:.3g}"]
            mark = "*" if blocks in _triton.CHOICES else ""
            print("| " + " | ".join(map(str, [*cells, mark])) + " |", flush=True)
