"""Measure on a GPU whatever no CPU can show; run it once on a new card.

FIR resampling against a copy of the same bytes, training and sampling of the CIFAR-10 networks
(eager, compiled, bfloat16, channels_last) with their peak memory, a sampler's step in a CUDA graph,
and the cost of correctors and of the sampler itself. Medians; ratios are to the first line of a
table. On a CPU all sizes are tiny, so that the numbers mean nothing, and parts for CUDA are left
out: such a run only shows that the program works.

    python benchmarks/gpu.py [--device cuda] [--batch 128] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fir import OURS, TAPS, Run, backward, forward, measure
from networks import in_bfloat16
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from diffusionkit import (
    DDIM,
    EMA,
    VESDE,
    VPSDE,
    Ancestral,
    EpsModel,
    Langevin,
    PCSampler,
    RawScoreModel,
    ReverseDiffusion,
    ScoreMatching,
    clipped_step,
)
from diffusionkit.interfaces import ScoreModel
from diffusionkit.networks import DDPMpp, NCSNpp
from diffusionkit.ops import _plain


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
        variants: what is measured of each network: bfloat16, channels_last, compiled.
    """

    batch: int
    steps: int
    rounds: int
    calls: int
    signal: tuple[int, int, int, int]
    network: dict[str, Any]
    variants: tuple[tuple[bool, ...], ...]


# (bfloat16, channels_last, compiled)
VARIANTS = tuple(itertools.product((False, True), repeat=3))
TRIED = ((False, False, False), (False, False, True), (True, True, False))
TINY = {"width": 8, "multipliers": (1,), "blocks": 1, "attention_levels": ()}
FULL = Sizes(128, 50, 5, 5, (64, 128, 64, 64), {}, VARIANTS)
QUICK = Sizes(2, 2, 2, 1, (2, 8, 16, 16), TINY, TRIED)


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


def plain(x: Tensor, name: str) -> Tensor:
    """Resample without the fused kernel."""
    if name == "up":
        return _plain.upfirdn(x, TAPS, 4 / 64, 2, 1, [(2, 1)] * 2)
    return _plain.upfirdn(x, TAPS, 1 / 64, 1, 2, [(1, 1)] * 2)


def resampling(sizes: Sizes, device: torch.device) -> None:
    """Print the bandwidth of FIR resampling and its share of that of a copy."""
    print(f"\n## FIR resampling of {sizes.signal}\n")
    print("GB/s of input and output, and its share of a copy of as many bytes.")
    print("On a CPU nothing is fused.\n" * (device.type != "cuda"))
    print("| | copy | fused | share | launches | plain | share | launches |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(sizes.signal, device=device, dtype=dtype)
        for name, ours in OURS.items():
            moved = x.nbytes + ours(x).nbytes
            source = torch.empty(moved // 2, device=device, dtype=torch.uint8)
            target = torch.empty_like(source)
            copy = moved / device_seconds(partial(target.copy_, source), sizes, device)
            for label, make, passes in (("forward", forward, 1), ("with backward", backward, 2)):
                cells = [
                    f"{str(dtype).removeprefix('torch.')}, {name}, {label}",
                    f"{copy / 1e9:.3g}",
                ]
                for resample in (ours, partial(plain, name=name)):
                    run = make(resample, x)
                    rate = passes * moved / device_seconds(run, sizes, device)
                    cells += [f"{rate / 1e9:.3g}", f"{rate / copy:.0%}", f"{launches(run, device)}"]
                print("| " + " | ".join(cells) + " |", flush=True)


def ddpmpp(sizes: Sizes, device: torch.device) -> tuple[nn.Module, Callable[..., ScoreModel]]:
    """Return the network and the model of DDPM++ and VP."""
    network = DDPMpp.cifar10(**sizes.network).to(device)
    return network, lambda network: EpsModel(network, VPSDE())


def ncsnpp(sizes: Sizes, device: torch.device) -> tuple[nn.Module, Callable[..., ScoreModel]]:
    """Return the network and the model of NCSN++ and VE."""
    network = NCSNpp.cifar10(**sizes.network).to(device)
    return network, lambda network: RawScoreModel(network, VESDE(0.01, 50.0))


def compiled_network(network: nn.Module, device: torch.device, **options: Any) -> Any:
    """Return a network compiled by inductor, or, on a CPU, where that takes long, only traced."""
    if device.type != "cuda":
        return torch.compile(network, backend="aot_eager")
    return torch.compile(network, **options)


def training_step(model: ScoreModel, x: Tensor, device: torch.device, bfloat16: bool) -> Run:
    """Return a step with the loss under autocast or not, clipping, Adam and the average."""
    objective = ScoreMatching()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)
    ema = EMA(model, decay=0.999)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = objective(model, x).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        ema.update(model)

    return step


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


def training_and_sampling(sizes: Sizes, device: torch.device) -> None:
    """Print the images per second and the peak memory of all variants of both networks."""
    print(f"\n## Training and sampling, batch {sizes.batch}\n")
    print(f"Images per second; a sample takes {sizes.steps} steps of DDIM.")
    print("Peak memory in GiB, with the state of the optimizer also while sampling.\n")
    print("| | first step, s | training | ratio | GiB | sampling | ratio | GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, make in (("NCSN++, VE", ncsnpp), ("DDPM++, VP", ddpmpp)):
        references: list[float] = []
        for bfloat16, last, compiled in sizes.variants:
            label = f"{name}, {'bfloat16' if bfloat16 else 'float32'}"
            label += f"{', channels_last' * last}{', compiled' * compiled}"
            cells = attempt(label, partial(
                variant, make, sizes, device, bfloat16, last, compiled, references
            ))  # fmt: skip
            if cells is not None:
                print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def variant(
    make: Callable[..., Any],
    sizes: Sizes,
    device: torch.device,
    bfloat16: bool,
    last: bool,
    compiled: bool,
    references: list[float],
) -> list[str]:
    """Return the cells of a variant; the first one leaves its rates as references."""
    torch.manual_seed(0)
    torch.compiler.reset()  # graphs of networks that are gone
    gc.collect()
    network, as_model = make(sizes, device)
    x = torch.rand(sizes.batch, 3, 32, 32, device=device)
    if last:
        network = network.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    model = as_model(compiled_network(network, device) if compiled else network)
    step = training_step(model, x, device, bfloat16)
    sampler = PCSampler(model, DDIM(), steps=sizes.steps)
    shape = (sizes.batch, 3, 32, 32)
    sample: Run = partial(sampler, shape, device=device)
    sample = in_bfloat16(sample, device.type) if bfloat16 else sample
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cells = [f"{time.perf_counter() - start:.1f}"]
    for i, run in enumerate((step, sample)):
        run()  # compiles, and allocates the state of the optimizer
        memory = peak(run, device)
        rate = images_per_second(run, sizes.batch, sizes, device)
        references += [rate] * (len(references) == i)
        cells += [f"{rate:.3g}", f"{rate / references[i]:.2f}", memory]
    return cells


class GraphedStep:
    """A step of a predictor that is launched at once, as a CUDA graph.

    Args:
        model: the model, in evaluation mode.
        x: a state (B, *D), for its shape.
    """

    def __init__(self, model: ScoreModel, x: Tensor) -> None:
        """Record the step on tensors that every later one reuses."""
        self.x, self.model = x.clone(), model
        self.t, self.s = x.new_full((len(x),), 0.5), x.new_full((len(x),), 0.4)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and tables copied before recording
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self._step()

    def _step(self) -> Tensor:
        with torch.no_grad():
            return Ancestral().step(self.model, self.x, self.t, self.s).x

    def __call__(self, x: Tensor, t: float, s: float) -> Tensor:
        """Return the state at time s; the next call overwrites it."""
        self.x.copy_(x)
        self.t.fill_(t)
        self.s.fill_(s)
        self.graph.replay()
        return self.out


def graphs(sizes: Sizes, device: torch.device) -> None:
    """Print the time of a sampler's step, launched kernel by kernel and as a graph."""
    print("\n## CUDA graphs\n")
    if device.type != "cuda":
        print("CUDA graphs of a sampler's step are measured on a GPU only.")
        return
    print("Milliseconds of a step of Ancestral; float32, DDPM++.\n")
    print("| batch | run | ms | ratio |\n|---|---|---|---|")
    network, as_model = ddpmpp(sizes, device)
    model = as_model(network).eval()
    reduced = as_model(
        compiled_network(network, device, mode="reduce-overhead", dynamic=False)
    ).eval()
    for batch in dict.fromkeys((1, 16, sizes.batch)):
        x = torch.randn(batch, 3, 32, 32, device=device)
        graphed = GraphedStep(model, x)
        times = PCSampler(model, Ancestral(), steps=sizes.steps).times.tolist()

        def replayed(x: Tensor, graphed: GraphedStep, times: list[float]) -> None:
            for t, s in itertools.pairwise(times):
                x = graphed(x, t, s)

        def sampled(model: ScoreModel, x: Tensor) -> object:
            return PCSampler(model, Ancestral(), steps=sizes.steps, denoise=False)(x)

        runs: dict[str, Run] = {
            "PCSampler": partial(sampled, model, x),
            "PCSampler, compiled with reduce-overhead": partial(sampled, reduced, x),
            "a CUDA graph of the step": partial(replayed, x, graphed, times),
        }
        show(runs, f"{batch} | ", sizes, device, 1 / sizes.steps)


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


def overheads(sizes: Sizes, device: torch.device) -> None:
    """Print the time of samplers relative to that of the network alone."""
    print("\n## Samplers\n")
    print(f"Milliseconds of {sizes.steps} steps; NCSN++ and VE, float32, without gradients.\n")
    print("| batch | run | ms | ratio |\n|---|---|---|---|")
    network, as_model = ncsnpp(sizes, device)
    model = as_model(network).eval()
    for batch in dict.fromkeys((1, sizes.batch)):
        x = torch.randn(batch, 3, 32, 32, device=device)
        noise_label = torch.ones(batch, device=device)

        @torch.no_grad()
        def bare(x: Tensor, noise_label: Tensor) -> None:
            for _ in range(sizes.steps):
                network(x, noise_label)

        options: dict[str, Any] = {"steps": sizes.steps, "denoise": False}
        alone = PCSampler(model, ReverseDiffusion(), **options)
        both = PCSampler(model, ReverseDiffusion(), Langevin(), **options)
        runs: dict[str, Run] = {
            "the network, once a step": partial(bare, x, noise_label),
            "predictor": partial(alone, x),
            "predictor and corrector": partial(both, x),
        }
        show(runs, f"{batch} | ", sizes, device, 1.0)


def attempt(name: str, run: Callable[[], Any]) -> Any:
    """Return the result of a run, or None after printing why it failed, so that others go on."""
    try:
        return run()
    except RuntimeError as error:  # those of CUDA and of torch.compile
        first = str(error).strip().partition("\n")[0]
        print(f"\n{name}: failed, {type(error).__name__}: {first}\n", flush=True)
        return None


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help=f"images, {FULL.batch} by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as on a CPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tiny = arguments.quick or device.type != "cuda"
    sizes = QUICK if tiny else FULL
    sizes = sizes if arguments.batch is None else replace(sizes, batch=arguments.batch)
    torch.manual_seed(0)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device)};")
        print(f"float32 convolutions in TF32: {torch.backends.cudnn.allow_tf32}")
    else:
        print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    if tiny:
        print("Tiny sizes: this run shows that the program works, its numbers mean nothing.")
    for name, part in (
        ("FIR resampling", resampling),
        ("training and sampling", training_and_sampling),
        ("CUDA graphs", graphs),
        ("samplers", overheads),
    ):
        attempt(name, partial(part, sizes, device))


if __name__ == "__main__":
    main()
