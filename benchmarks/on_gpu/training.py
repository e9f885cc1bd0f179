"""Training and sampling of the CIFAR-10 networks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fir import Run
from networks import in_bfloat16
from torch import nn

from diffusionkit import (
    EMA,
    VESDE,
    VPSDE,
    EpsModel,
    Heun,
    Langevin,
    PCSampler,
    RawScoreModel,
    ReverseDiffusion,
    ScoreMatching,
    UniPC,
    clipped_step,
)
from diffusionkit.interfaces import ScoreModel
from diffusionkit.networks import ADMUNet, DDPMpp, NCSNpp

from .measures import Sizes, Variant, attempt, images_per_second, peak

Wrap = Callable[..., ScoreModel]
Make = Callable[..., tuple[nn.Module, Wrap]]


def ncsnpp(sizes: Sizes, device: torch.device, **options: Any) -> tuple[nn.Module, Wrap]:
    """Return the network and the model of NCSN++ and VE."""
    network = NCSNpp.cifar10(**{**sizes.network, **options}).to(device)
    return network, lambda network: RawScoreModel(network, VESDE(0.01, 50.0))


def ddpmpp(sizes: Sizes, device: torch.device, **options: Any) -> tuple[nn.Module, Wrap]:
    """Return the network and the model of DDPM++ and VP."""
    network = DDPMpp.cifar10(**{**sizes.network, **options}).to(device)
    return network, lambda network: EpsModel(network, VPSDE())


def adm(sizes: Sizes, device: torch.device, **options: Any) -> tuple[nn.Module, Wrap]:
    """Return the network and the model of ADM, without a learned variance, and VP."""
    given = {**sizes.network, **options, "learn_sigma": False}
    network = ADMUNet.cifar10(**given).to(device)
    return network, lambda network: EpsModel(network, VPSDE())


def compiled_network(network: nn.Module, device: torch.device, mode: str) -> Any:
    """Return a network as it is, or compiled by inductor; on a CPU that is only traced."""
    if mode == "eager":
        return network
    if device.type != "cuda":
        return torch.compile(network, backend="aot_eager")
    return torch.compile(network, mode="reduce-overhead" if mode == "graphs" else None)


def training_step(model: ScoreModel, x: torch.Tensor, device: torch.device, bf16: bool) -> Run:
    """Return a step with the loss under autocast or not, clipping, Adam and the average."""
    objective = ScoreMatching()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)
    ema = EMA(model, decay=0.999)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = objective(model, x).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        ema.update(model)

    return step


def rates(sizes: Sizes, device: torch.device) -> None:
    """Print the images per second and the peak memory of all variants of the networks."""
    print(f"\n## Training and sampling, batch {sizes.batch}\n")
    print("Images per second, and the peak memory in GiB (max_memory_allocated), which has the")
    print("state of the optimizer while sampling too. PC is a run of 1000 steps with correctors,")
    print(f"from the time of {sizes.steps} of them.\n")
    print("| | first step, s | training | ratio | GiB | PC 1000 | Heun 18 | UniPC 10 | GiB |")
    print("|---" * 9 + "|")
    networks: dict[str, Make] = {"NCSN++, VE": ncsnpp, "DDPM++, VP": ddpmpp, "ADM, VP": adm}
    for name, make in list(networks.items())[: sizes.networks]:
        references: list[float] = []
        for variant in sizes.variants:
            label = f"{name}, {variant}"
            cells = attempt(label, partial(row, make, sizes, device, variant, references))
            if cells is not None:
                print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def row(
    make: Make, sizes: Sizes, device: torch.device, variant: Variant, references: list[float]
) -> list[str]:
    """Return the cells of a variant; the first one leaves its rate as the reference."""
    torch.manual_seed(0)
    torch.compiler.reset()  # graphs of networks that are gone
    gc.collect()
    tf32 = variant.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    half = variant.precision == "bfloat16"
    network, as_model = make(sizes, device, activation_checkpointing=variant.checkpointing)
    x = torch.rand(sizes.batch, 3, 32, 32, device=device)
    if variant.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    model = as_model(compiled_network(network, device, variant.mode))
    step = training_step(model, x, device, half)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cells = [f"{time.perf_counter() - start:.1f}"]
    step()  # allocates the state of the optimizer
    memory = peak(step, device)
    rate = images_per_second(step, sizes.batch, sizes, device)
    references += [rate] * (not references)
    cells += [f"{rate:.3g}", f"{rate / references[0]:.2f}", memory]
    model.eval()
    samplers: dict[int, Any] = {
        1000: PCSampler(model, ReverseDiffusion(), Langevin(), steps=sizes.steps, denoise=False),
        18: PCSampler(model, Heun(), steps=min(18, 9 * sizes.steps), denoise=False),
        10: PCSampler(model, UniPC(), steps=min(10, 5 * sizes.steps), denoise=False),
    }
    shape = (sizes.batch, 3, 32, 32)
    for steps, sampler in samplers.items():
        sample: Run = partial(sampler, shape, device=device)
        sample = in_bfloat16(sample, device.type) if half else sample
        sample()
        memory = peak(sample, device)
        rate = images_per_second(sample, sizes.batch, sizes, device)
        cells.append(f"{rate * (len(sampler.times) - 1) / steps:.3g}")
    return [*cells, memory]
