"""Steps of training and of samplers: launches, waits, CUDA graphs, and the stable target."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from fir import Run
from stf import SDE, ours, released
from torch import Tensor, nn
from typing_extensions import override

from diffusionkit import (
    DDIM,
    VPSDE,
    Ancestral,
    EpsModel,
    Heun,
    ImportanceTimes,
    Langevin,
    LikelihoodWeighting,
    PCSampler,
    ReverseDiffusion,
    ScoreMatching,
    StableTarget,
    UniPC,
    clipped_step,
)
from diffusionkit.interfaces import ScoreModel

from .measures import Sizes, device_seconds, launches, show, waits
from .training import compiled_network, ddpmpp, ncsnpp


class Zero(nn.Module):
    """A network that takes no time, with a parameter to train."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    @override
    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        """Return zeros of the shape of x."""
        return self.factor * x


def overheads(sizes: Sizes, device: torch.device) -> None:
    """Print launches, waits and microseconds of steps with a network that does nothing."""
    print("\n## What the library adds to a step\n")
    print("A network that does nothing; launches of kernels and copies, waits of the host for the")
    print("device, microseconds. The step of a sampler is the difference of two runs.\n")
    print("| | launches | waits | us |\n|---|---|---|---|")
    model = EpsModel(Zero(), VPSDE()).to(device)
    x = torch.randn(sizes.batch, 3, 32, 32, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def trained(objective: ScoreMatching, **options: Any) -> Run:
        def step() -> None:
            objective(model, x, **options).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()

        return step

    def clipped() -> None:
        ScoreMatching()(model, x).mean().backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)

    importance = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes())
    runs: dict[str, Run] = {
        "loss and backward": trained(ScoreMatching()),
        "the same, ImportanceTimes": trained(importance),
        "the same, StableTarget": trained(ScoreMatching(target=StableTarget()), reference=x),
        "loss, backward and clipped_step": clipped,
    }
    for name, run in runs.items():
        cells = [
            launches(run, device),
            waits(run, device),
            1e6 * device_seconds(run, sizes, device),
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} | {cells[2]:.3g} |", flush=True)
    parts: dict[str, tuple[Any, ...]] = {
        "DDIM": (DDIM(),),
        "Ancestral": (Ancestral(),),
        "Heun": (Heun(),),
        "UniPC": (UniPC(),),
        "ReverseDiffusion and Langevin": (ReverseDiffusion(), Langevin()),
    }
    for name, some in parts.items():
        found: list[list[Any]] = []
        for steps in (10, 20):
            run = partial(PCSampler(model, *some, steps=steps, denoise=False), x)
            found.append([launches(run, device), waits(run, device),
                           1e6 * device_seconds(run, sizes, device)])  # fmt: skip
        each = ["-" if a == "-" else f"{(b - a) / 10:.3g}" for a, b in zip(*found, strict=True)]
        print(f"| a step of {name} | " + " | ".join(each) + " |", flush=True)


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


class GraphedTraining:
    """A step of training that is launched at once, as a CUDA graph.

    Args:
        model: the model.
        x0: a batch of data (B, *D), for its shape.
    """

    def __init__(self, model: ScoreModel, x0: Tensor) -> None:
        """Record the loss, the gradients and the step of the optimizer."""
        self.model, self.x0, self.objective = model, x0.clone(), ScoreMatching()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, capturable=True, fused=True)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._step()

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(self.model, self.x0).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def __call__(self, x0: Tensor) -> Tensor:
        """Take a step and return the loss; the next call overwrites it."""
        self.x0.copy_(x0)
        self.graph.replay()
        return self.loss


def graphs(sizes: Sizes, device: torch.device) -> None:
    """Print the time of steps, launched kernel by kernel and as a graph."""
    print("\n## CUDA graphs\n")
    if device.type != "cuda":
        print("CUDA graphs are measured on a GPU only.")
        return
    print("Milliseconds of a step of Ancestral and of training; float32, DDPM++.\n")
    print("| batch | run | ms | ratio |\n|---|---|---|---|")
    network, as_model = ddpmpp(sizes, device)
    model = as_model(network).eval()
    reduced = as_model(compiled_network(network, device, "graphs")).eval()
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
    for batch in dict.fromkeys((1, 16, sizes.batch)):
        x = torch.rand(batch, 3, 32, 32, device=device)
        trained = GraphedTraining(model.train(), x)
        training: dict[str, Run] = {
            "training": trained._step,
            "a CUDA graph of the training step": partial(trained, x),
        }
        show(training, f"{batch} | ", sizes, device, 1.0)


def samplers(sizes: Sizes, device: torch.device) -> None:
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


def stable_target(sizes: Sizes, device: torch.device) -> None:
    """Print the time of the stable target for a large reference batch."""
    print(f"\n## Stable target, {sizes.references} references\n")
    print("Milliseconds of the target of 64 images of 3072 numbers.\n")
    print("| run | ms | ratio |\n|---|---|---|")
    reference = torch.rand(sizes.references, 3072, device=device) * 2 - 1
    x0 = reference[: min(64, sizes.references)]
    sample = SDE.perturb(x0, torch.linspace(SDE.t_min, SDE.T, len(x0), device=device))
    runs: dict[str, Run] = {
        "ours": partial(ours, sample, reference),
        "the released algorithm": partial(released, sample, reference),
    }
    show(runs, "", sizes, device, 1.0)
