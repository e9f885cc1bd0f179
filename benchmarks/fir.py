"""FIR resampling beside the algorithm that the released score_sde_pytorch runs on the CPU.

That algorithm, written anew: insert zeros, pad, convolve every channel as an image of its own at
full resolution, keep every second pixel. Times both in turn within one run, forward and forward
with backward, and prints medians and the ratios of neighbours. On a GPU it compares the fused
kernel with plain torch too: bandwidth against a copy on the device, and launches.

    python benchmarks/fir.py [--rounds 9] [--threads 2] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diffusionkit.ops import _plain, fir_downsample, fir_upsample

TAPS = (1.0, 3.0, 3.0, 1.0)
Resample = Callable[[Tensor], Tensor]
Run = Callable[[], object]


def released(x: Tensor, *, up: int = 1, down: int = 1, pads: tuple[int, int]) -> Tensor:
    """Zeros, padding, a convolution of single-channel images, and only then a slice."""
    taps = torch.tensor(TAPS, dtype=x.dtype, device=x.device) / sum(TAPS) * up
    kernel = torch.outer(taps, taps).flip(0, 1)
    b, c, h, w = x.shape
    images = x.reshape(b * c, 1, h, 1, w, 1)
    images = F.pad(images, (0, up - 1, 0, 0, 0, up - 1)).reshape(b * c, 1, h * up, w * up)
    y = F.conv2d(F.pad(images, (*pads, *pads)), kernel[None, None])[..., ::down, ::down]
    return y.reshape(b, c, *y.shape[2:])


OURS: dict[str, Resample] = {"up": fir_upsample, "down": fir_downsample}
RELEASED: dict[str, Resample] = {
    "up": partial(released, up=2, pads=(2, 1)),
    "down": partial(released, down=2, pads=(1, 1)),
}


def plain(x: Tensor, name: str) -> Tensor:
    """Our resampling without the fused kernel."""
    if name == "up":
        return _plain.upfirdn(x, TAPS, 4 / 64, 2, 1, [(2, 1)] * 2)
    return _plain.upfirdn(x, TAPS, 1 / 64, 1, 2, [(1, 1)] * 2)


def forward(resample: Resample, x: Tensor) -> Run:
    """A forward pass, nothing recorded."""

    @torch.no_grad()
    def run() -> None:
        resample(x)

    return run


def backward(resample: Resample, x: Tensor) -> Run:
    """A forward and a backward pass."""
    leaf = x.detach().clone().requires_grad_()
    gradient = torch.randn_like(resample(x))
    return lambda: torch.autograd.grad(resample(leaf), leaf, gradient)


def measure(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return milliseconds of each run, one figure a round, the runs taken in turn.

    A figure is the mean of three calls after one more, which finds its memory as the other run
    left it: returned to the system, page by page.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(3):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - start) / 3 * 1e3)
    return times


def compare(rounds: int, device: torch.device) -> None:
    """Print the table of ours and the released algorithm."""
    x = torch.randn(16, 128, 32, 32, device=device)
    print(f"float32, {tuple(x.shape)}; medians of {rounds} rounds, ratios paired by round\n")
    print("| | ours, ms | released, ms | released / ours |")
    print("|---|---|---|---|")
    for name, ours in OURS.items():
        theirs = RELEASED[name]
        torch.testing.assert_close(ours(x), theirs(x))
        for label, make in (("forward", forward), ("forward + backward", backward)):
            runs = {"ours": make(ours, x), "released": make(theirs, x)}
            times = measure(runs, rounds, device)
            pairs = zip(times["released"], times["ours"], strict=True)
            print(
                f"| {name}, {label} | {statistics.median(times['ours']):.2f} "
                f"| {statistics.median(times['released']):.1f} "
                f"| {statistics.median(a / b for a, b in pairs):.1f} |"
            )


def launches(run: Run) -> int:
    """Count the kernels and copies that a run puts on the device."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or ())


def device_milliseconds(run: Run, rounds: int) -> float:
    """Median over rounds of the time of a run on the device."""
    run()
    times: list[float] = []
    for _ in range(rounds):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(20):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 20)
    return statistics.median(times)


def bandwidth(rounds: int, device: torch.device) -> None:
    """Print bytes read and written a second, over those of a copy, and launches."""
    print(
        "\n| (64, 128, 64, 64) | fused, GB/s | over copy | plain, GB/s | launches: fused, plain |"
    )
    print("|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(64, 128, 64, 64, device=device, dtype=dtype)
        source = torch.randn(2**28 // x.itemsize, device=device, dtype=dtype)
        target = torch.empty_like(source)
        rate = 2 * source.nbytes / device_milliseconds(partial(target.copy_, source), rounds)
        for name, ours in OURS.items():
            moved = x.nbytes + ours(x).nbytes
            for label, make, passes in (
                ("forward", forward, 1),
                ("forward + backward", backward, 2),
            ):
                runs = [make(resample, x) for resample in (ours, partial(plain, name=name))]
                fused, other = (moved * passes / device_milliseconds(r, rounds) for r in runs)
                counts = ", ".join(str(launches(run)) for run in runs)
                print(
                    f"| {dtype}, {name}, {label} | {fused / 1e6:.0f} | {fused / rate:.0%} "
                    f"| {other / 1e6:.0f} | {counts} |"
                )


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description="FIR resampling, ours and the released algorithm.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    compare(arguments.rounds, device)
    if device.type == "cuda":
        bandwidth(arguments.rounds, device)
    else:
        print("\nNot run on a GPU: the fused kernel's bandwidth and launches were not measured.")


if __name__ == "__main__":
    main()
