"""Compare FIR resampling with the algorithm of the released score_sde_pytorch.

The released algorithm, reimplemented: insert zeros, pad, convolve every channel as a separate image
at full resolution, keep every second pixel. Both alternate within one run with the bare depthwise
convolution, forward and forward with backward. `benchmarks/gpu.py` has the bandwidth of the fused
kernels.

    python benchmarks/fir.py [--rounds 15] [--threads 1] [--device cpu]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from side_by_side import Case, microseconds, options, repeated, report
from torch import Tensor

from diffusionkit.ops import fir_downsample, fir_upsample

TAPS = (1.0, 3.0, 3.0, 1.0)
Resample = Callable[[Tensor], Tensor]
Run = Callable[[], object]


def released(x: Tensor, *, up: int = 1, down: int = 1, pads: tuple[int, int]) -> Tensor:
    """Insert zeros, pad, convolve each channel as an image, and only then subsample."""
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


def forward(resample: Resample, x: Tensor) -> Run:
    """Return a forward pass without autograd."""

    @torch.no_grad()
    def run() -> None:
        resample(x)

    return run


def backward(resample: Resample, x: Tensor) -> Run:
    """Return a forward and backward pass."""
    leaf = x.detach().clone().requires_grad_()
    gradient = torch.randn_like(resample(x))
    return lambda: torch.autograd.grad(resample(leaf), leaf, gradient)


def measure(
    runs: dict[str, Run], rounds: int, device: torch.device, calls: int = 3
) -> dict[str, list[float]]:
    """Return the milliseconds of each run, one value per round, with the runs alternating.

    A value is the mean of several calls after a warm-up call, which pays for the memory that the
    previous run returned to the system.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            microseconds(run, 1, device)
            times[name].append(microseconds(repeated(run, calls), calls, device) / 1e3)
    return times


def bare(x: Tensor, *, up: bool) -> Run:
    """Return the one depthwise convolution that computes the same values."""
    taps = torch.tensor(TAPS, device=x.device) / sum(TAPS)
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4).contiguous() * (4 if up else 1)
    convolve = F.conv_transpose2d if up else F.conv2d

    @torch.no_grad()
    def run() -> Tensor:
        return convolve(x, kernel, stride=2, padding=1, groups=x.shape[1])

    return run


def cases(shape: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    """Yield forward passes, and forward with backward passes, of one shape."""
    x = torch.randn(shape, device=device)
    for name, ours in OURS.items():
        theirs = RELEASED[name]
        torch.testing.assert_close(ours(x), theirs(x))
        work = f"FIR {name}, {shape}"
        yield Case(
            work,
            forward(ours, x),
            bare(x, up=name == "up"),
            {"released operations": forward(theirs, x)},
        )
        yield Case(
            f"{work}, forward and backward",
            backward(ours, x),
            peers={"released operations": backward(theirs, x)},
        )


def main() -> None:
    """Print the table."""
    arguments = options(__doc__.partition("\n")[0]).parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    report("fir", [*cases((16, 128, 32, 32), device), *cases((16, 3, 32, 32), device)], arguments)


if __name__ == "__main__":
    main()
