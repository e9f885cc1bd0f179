"""Sizes, clocks and counters."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fir import Run, measure
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override


@dataclass(frozen=True)
class Variant:
    """How a network is trained and sampled.

    Args:
        precision: "float32", "tf32" or "bfloat16", the last by autocast.
        channels_last: the memory format.
        mode: "eager", "compiled", or "graphs" for compiled with CUDA graphs.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    precision: str = "float32"
    channels_last: bool = False
    mode: str = "eager"
    checkpointing: bool = False

    @override
    def __str__(self) -> str:
        modes = {"eager": "", "compiled": ", compiled", "graphs": ", compiled with CUDA graphs"}
        label = f"{self.precision}{', channels_last' * self.channels_last}{modes[self.mode]}"
        return label + ", checkpointing" * self.checkpointing


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Args:
        batch: the number of images.
        steps: the number of steps of a sampler.
        rounds: the number of measurements of which the median is taken.
        calls: the number of calls in a measurement.
        signal: the shape of the signals for FIR resampling.
        network: options that replace those of the CIFAR-10 networks.
        networks: the number of networks.
        references: the number of references of a stable target.
        variants: what is measured of each network.
    """

    batch: int
    steps: int
    rounds: int
    calls: int
    signal: tuple[int, int, int, int]
    network: dict[str, Any]
    networks: int
    references: int
    variants: tuple[Variant, ...]


VARIANTS = (
    *itertools.starmap(
        Variant,
        itertools.product(
            ("float32", "tf32", "bfloat16"), (False, True), ("eager", "compiled", "graphs")
        ),
    ),
    Variant(checkpointing=True),
    Variant("bfloat16", True, "compiled", checkpointing=True),
)
TRIED = (Variant(), Variant("bfloat16", True), Variant("tf32", checkpointing=True))
TINY = {"width": 8, "multipliers": (1,), "blocks": 1, "attention_levels": ()}
FULL = Sizes(128, 50, 5, 5, (64, 128, 64, 64), {}, 3, 4096, VARIANTS)
QUICK = Sizes(2, 2, 2, 1, (2, 8, 16, 16), TINY, 1, 8, TRIED)


def device_seconds(run: Run, sizes: Sizes, device: torch.device) -> float:
    """Return the median time of a run on the device, without that of the host where it can."""
    if device.type != "cuda":
        return statistics.median(measure({"": run}, sizes.rounds, device)[""]) / 1e3
    run()
    times: list[float] = []
    for _ in range(sizes.rounds):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(20):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 20e3)
    return statistics.median(times)


def launches(run: Run, device: torch.device) -> int | str:
    """Count the kernels and copies that a run launches on a GPU."""
    if device.type != "cuda":
        return "-"
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = profiler.events() or ()
    return len([event for event in events if event.device_type.name == "CUDA"])


def peak(run: Run, device: torch.device) -> str:
    """Return the most memory that tensors take during a run, in GiB."""
    if device.type != "cuda":
        run()
        return "-"
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"


def images_per_second(run: Run, images: int, sizes: Sizes, device: torch.device) -> float:
    """Return the median of the images per second of a run."""
    times = measure({"": run}, sizes.rounds, device, sizes.calls)[""]
    return images * 1e3 / statistics.median(times)


def show(
    runs: dict[str, Run], prefix: str, sizes: Sizes, device: torch.device, scale: float
) -> None:
    """Print lines of a table: milliseconds times a scale, and ratios paired by round."""
    for run in runs.values():
        run()
    times = measure(runs, sizes.rounds, device, 1)
    reference = next(iter(times.values()))
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, reference, strict=True))
        milliseconds = statistics.median(values) * scale
        print(f"| {prefix}{name} | {milliseconds:.3g} | {ratio:.2f} |", flush=True)


def attempt(name: str, run: Callable[[], Any]) -> Any:
    """Return the result of a run, or None after printing why it failed, so that others go on."""
    try:
        return run()
    except RuntimeError as error:  # those of CUDA and of torch.compile
        first = str(error).strip().partition("\n")[0]
        print(f"\n{name}: failed, {type(error).__name__}: {first}\n", flush=True)
        return None


def waits(run: Run, device: torch.device) -> int | str:
    """Count how often a run makes the host wait for a GPU."""
    run()
    if device.type != "cuda":
        return "-"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in seen)
