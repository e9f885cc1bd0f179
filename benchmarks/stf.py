"""Compare the stable target with the released implementation.

The released implementation, rewritten: all B x n differences as one tensor, squared, summed, their
softmax, and the weighted sum of the references as another tensor. It is timed at a smaller n, as it
would not fit into memory, and scaled linearly in n. Both use the same float32 data.

    python benchmarks/stf.py [--batch 128] [--references 4096] [--released 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffusionkit import VESDE, Perturbed, RawScoreModel, ScoreMatching
from diffusionkit.networks import NCSNpp
from diffusionkit.training.stable_target import StableTarget

SDE = VESDE(sigma_min=0.01, sigma_max=50.0)
D = 3 * 32 * 32


def draw(batch: int, n: int, d: int) -> tuple[Perturbed, Tensor]:
    """Return a batch at all noise levels and the references that contain it."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand((n, d), generator=generator) * 2 - 1
    times = torch.linspace(SDE.t_min, SDE.T, batch)
    return SDE.perturb(reference[:batch], times, generator=generator), reference


def released(sample: Perturbed, reference: Tensor) -> Tensor:
    """Return the weighted mean of the references (B, D)."""
    alpha, sigma = sample.alpha.view(-1, 1, 1), sample.sigma.view(-1, 1)
    distance = (sample.x.unsqueeze(1) - alpha * reference).square().sum(2)
    weights = torch.softmax(-distance / (2 * sigma**2), 1)
    return (weights.unsqueeze(2) * reference).sum(1)


def ours(sample: Perturbed, reference: Tensor) -> Tensor:
    """Return the weighted mean of the references (B, D)."""
    return StableTarget()(sample, reference).x0


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call after a warm-up call."""
    elapsed = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        elapsed.append(time.perf_counter() - start)
    return statistics.median(elapsed[1:])


def extra_memory(name: str, batch: int, n: int) -> float:
    """Return the increase of peak memory by a call in a separate process, in GiB."""
    command = [sys.executable, __file__, "--memory", name]
    command += ["--batch", str(batch), "--references", str(n)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out)


def memory(name: str, batch: int, n: int) -> float:
    """Return the increase of peak memory by a call in this process, in GiB."""
    call = {"ours": ours, "released": released}[name]
    call(*draw(2, 4, D))  # one-time allocations of libraries
    sample, reference = draw(batch, n, D)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    before = peak_gib()
    call(sample, reference)
    return peak_gib() - before


def peak_gib() -> float:
    """Return the peak memory of this process in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def step_seconds(batch: int) -> float:
    """Return the time of a training step of the CIFAR-10 NCSN++."""
    model = RawScoreModel(NCSNpp.cifar10(), SDE)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.rand(batch, 3, 32, 32) * 2 - 1

    def step() -> None:
        optimizer.zero_grad()
        ScoreMatching()(model, x).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return seconds(step, 1)


def main() -> None:
    """Print times, memory, scaling, and the share of a training step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--references", type=int, default=4096)
    parser.add_argument("--released", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-batch", type=int, default=4)
    parser.add_argument("--memory", choices=["ours", "released"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batch, n, few, rounds = (
        getattr(arguments, name) for name in ("batch", "references", "released", "rounds")
    )
    if arguments.memory:
        print(memory(arguments.memory, batch, n))
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; B={batch}, D={D}, float32"
    )
    print(f"medians of {rounds} rounds; released: at n={few}, multiplied by {n / few:g}\n")

    sample, reference = draw(batch, n, D)
    small = reference[:few]
    own = seconds(partial(ours, sample, reference), rounds)
    theirs = seconds(partial(released, sample, small), rounds) * n / few
    difference = float((ours(sample, small) - released(sample, small)).abs().max())
    print("| | seconds | extra memory, GiB |\n|---|---|---|")
    print(f"| ours, n={n} | {own:.3f} | {extra_memory('ours', batch, n):.3f} |")
    print(f"| released, scaled to n={n} | {theirs:.1f} "
          f"| {extra_memory('released', batch, few) * n / few:.1f} |")  # fmt: skip
    print(f"| ratio | {theirs / own:.0f} | |")
    print(f"\nlargest difference of the means: {difference:.1e}\n")

    print("| B | n | D | ms | ns per B n D |\n|---|---|---|---|---|")
    for b, m, d in [
        *((batch, n // k, D) for k in (4, 2, 1)),
        *((batch // k, n, D) for k in (4, 2)),
        *((batch, n, D // k) for k in (4, 2)),
        *((batch, n, d) for d in (2, 16, 17)),
    ]:
        found = seconds(partial(ours, *draw(b, m, d)), rounds)
        print(f"| {b} | {m} | {d} | {1e3 * found:.1f} | {1e9 * found / (b * m * d):.3f} |")

    step = step_seconds(arguments.step_batch) * batch / arguments.step_batch
    print(f"\na training step of NCSN++ takes {step:.1f} s, scaled from a batch of "
          f"{arguments.step_batch}: the target is {own / step:.2%} of it")  # fmt: skip


if __name__ == "__main__":
    main()
