"""Measure the overhead of a predictor-corrector step without the network, against two references.

Three steps alternate within one run: PCSampler(ReverseDiffusion, Langevin) on VPSDE with a network
that returns a precomputed tensor; the bare arithmetic of a step, two normal draws and four fused
adds; and the step of the released score_sde_pytorch, reimplemented (tables on the device, times as
tensors, norms averaged over the batch). Prints medians and ratios.

    python benchmarks/sampler_overhead.py [--rounds 15] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffusionkit import VPSDE, EpsModel, Langevin, PCSampler, ReverseDiffusion

Run = Callable[[], object]


def ours(x: Tensor, steps: int) -> Run:
    """Return a run of the sampler, including its setup."""
    output = torch.randn_like(x)
    model = EpsModel(lambda x, noise_label: output, VPSDE())
    sampler = PCSampler(model, ReverseDiffusion(), Langevin(), steps=steps, denoise=False)
    return lambda: sampler(x)


def bare(x: Tensor, steps: int) -> Run:
    """Return a run of two normal draws and four fused adds per step."""
    output = torch.randn_like(x)

    @torch.no_grad()
    def run() -> Tensor:
        state = x
        for _ in range(steps):
            for _ in range(2):
                mean = torch.add(state, output, alpha=1e-3)
                state = torch.add(mean, torch.randn_like(x), alpha=1e-3)
        return state

    return run


def released(x: Tensor, steps: int) -> Run:
    """Return a run of the released Langevin corrector and reverse-diffusion predictor."""
    output = torch.randn_like(x)
    ones = (-1, *(1,) * (x.ndim - 1))
    betas = torch.linspace(0.1 / steps, 20.0 / steps, steps, device=x.device)
    alphas = 1.0 - betas
    grid = torch.linspace(1.0, 1e-3, steps, device=x.device)

    def score(t: Tensor) -> Tensor:
        _ = t * 999
        log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        std = torch.sqrt(1.0 - torch.exp(2.0 * log_mean))
        return -output / std.view(ones)

    @torch.no_grad()
    def run() -> Tensor:
        state = x
        for i in range(steps):
            t = torch.ones(x.shape[0], device=x.device) * grid[i]
            alpha = alphas[(t * (steps - 1)).long()]
            grad, noise = score(t), torch.randn_like(x)
            grad_norm = torch.norm(grad.reshape(grad.shape[0], -1), dim=-1).mean()
            noise_norm = torch.norm(noise.reshape(noise.shape[0], -1), dim=-1).mean()
            size = (0.16 * noise_norm / grad_norm) ** 2 * 2 * alpha
            mean = state + size.view(ones) * grad
            state = mean + torch.sqrt(size * 2).view(ones) * noise
            index = (t * (steps - 1)).long()
            beta = betas[index]
            drift = torch.sqrt(alphas[index]).view(ones) * state - state
            g = torch.sqrt(beta)
            drift = drift - g.view(ones) ** 2 * score(t)
            noise = torch.randn_like(x)
            mean = state - drift
            state = mean + g.view(ones) * noise
        return state

    return run


def measure(
    runs: dict[str, Run], steps: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the microseconds per step of each run, one value per round, runs alternating."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ >= 2:  # after two warm-up rounds
                times[name].append((time.perf_counter() - start) / steps * 1e6)
    return times


def main() -> None:
    """Print the table for two shapes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, float32;")
    print(f"medians of {arguments.rounds} rounds, ratios paired by round\n")
    print("| shape | ours, us per step | bare, us | released, us | ours / bare | released / bare |")
    print("|---|---|---|---|---|---|")
    for shape, steps in (((16, 3, 32, 32), 200), ((1, 3, 2, 2), 1000)):
        x = torch.randn(shape, device=device)
        runs = {"ours": ours(x, steps), "bare": bare(x, steps), "released": released(x, steps)}
        times = measure(runs, steps, arguments.rounds, device)
        median = {name: statistics.median(values) for name, values in times.items()}
        ratio = {
            name: statistics.median(a / b for a, b in zip(times[name], times["bare"], strict=True))
            for name in ("ours", "released")
        }
        print(
            f"| {shape} | {median['ours']:.0f} | {median['bare']:.0f} | {median['released']:.0f} "
            f"| {ratio['ours']:.2f} | {ratio['released']:.2f} |"
        )


if __name__ == "__main__":
    main()
