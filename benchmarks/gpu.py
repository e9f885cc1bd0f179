"""Measure on a GPU what a CPU cannot show; run it once on a new GPU.

FIR resampling against a copy of the same bytes, eager and compiled, and its division among
programs; training and sampling of the CIFAR-10 networks in every precision, memory format and
compilation mode, with the peak memory; kernel launches and synchronizations of a step; CUDA graphs
of a sampler's step and of a training step; the cost of correctors and of the sampler itself; the
stable target. The numbers are medians; ratios are to the first line of a table. On a CPU all sizes
are tiny, so the numbers are meaningless, and parts for CUDA are skipped: such a run only shows that
the program works.

    python benchmarks/gpu.py [--device cuda] [--batch 128] [--quick] [--only PART ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
from dataclasses import replace
from functools import partial

import torch
from on_gpu import resampling, steps, training
from on_gpu.measures import FULL, QUICK, attempt

PARTS = {
    "resampling": resampling.bandwidths,
    "divisions": resampling.divisions,
    "training": training.rates,
    "overheads": steps.overheads,
    "graphs": steps.graphs,
    "samplers": steps.samplers,
    "stable_target": steps.stable_target,
}


def describe(device: torch.device) -> None:
    """Print the device, its clocks, and the versions of torch and Triton."""
    found = importlib.util.find_spec("triton")
    versions = f"torch {torch.__version__}, Triton {'installed' if found else 'not installed'}"
    if device.type != "cuda":
        print(f"{versions}, {device}, {torch.get_num_threads()} threads")
        return
    if found:
        import triton  # type: ignore[import-untyped]

        versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    print(f"{versions}, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    print(torch.cuda.get_device_name(device))
    query = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    attempt("clocks", partial(clocks, query))


def clocks(query: str) -> None:
    """Print the clocks reported by nvidia-smi, if it is installed."""
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        print("nvidia-smi is not available: clocks are unknown")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help=f"images, {FULL.batch} by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"some of {', '.join(PARTS)}")  # fmt: skip
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tiny = arguments.quick or device.type != "cuda"
    sizes = QUICK if tiny else FULL
    sizes = sizes if arguments.batch is None else replace(sizes, batch=arguments.batch)
    torch.manual_seed(0)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    describe(device)
    if tiny:
        print("Tiny sizes: this run shows that the program works, its numbers mean nothing.")
    for name in arguments.only:
        attempt(name, partial(PARTS[name], sizes, device))


if __name__ == "__main__":
    main()
