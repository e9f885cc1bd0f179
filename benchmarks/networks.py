"""Compare the CIFAR-10 NCSN++ with the operations of the released network.

Alternates within one run: the forward pass and the full training step (loss, backward, clipping,
Adam, EMA) of both on the same weights; the throughput relative to a bare 3x3 convolution of 256
channels; bfloat16 autocast, channels_last and torch.compile. Prints medians and ratios paired by
round, then the peak memory of a training step with and without activation checkpointing.

    python benchmarks/networks.py [--rounds 15] [--threads 1] [--batch 4] [--device cpu] [--compile]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fir import RELEASED, Run, measure, released
from side_by_side import Row, options, show
from torch import Tensor, nn
from typing_extensions import override

from diffusionkit import EMA, VESDE, RawScoreModel, ScoreMatching, clipped_step
from diffusionkit.networks import NCSNpp

NETWORK = "NCSN++ for CIFAR-10"
FLOPS = 87.05e9 / 4  # of a forward pass of one image


class Released(nn.Module):
    """The operations of the released network, reimplemented, on the weights of ours."""

    def __init__(self, network: NCSNpp) -> None:
        """Keep the network that holds the weights."""
        super().__init__()
        self.net: Any = network

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Mix channels, permuted to the last dimension and back."""
        y = torch.einsum("abcd,de->abce", x.permute(0, 2, 3, 1), weight.t()) + bias
        return y.permute(0, 3, 1, 2)

    def attention(self, layer: Any, x: Tensor) -> Tensor:
        """Apply attention with the weights of all pairs of positions materialized."""
        b, c, height, width = x.shape
        h = layer.norm(x)
        weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
        q, k, v = (self.dense(h, w, bias) for w, bias in zip(weights, biases, strict=True))
        p = torch.einsum("bchw,bcij->bhwij", q, k) * int(c) ** (-0.5)
        p = F.softmax(p.reshape(b, height, width, height * width), dim=-1)
        p = p.reshape(b, height, width, height, width)
        h = torch.einsum("bhwij,bcij->bchw", p, v)
        h = self.dense(h, layer.out.weight, layer.out.bias)
        joined: Tensor = (x + h) / np.sqrt(2.0)
        return joined

    def block(self, layer: Any, x: Tensor, emb: Tensor, resample: str = "") -> Tensor:
        """Apply a BigGAN block."""
        h = F.silu(layer.norm_1(x))
        if resample:
            h, x = RELEASED[resample](h), RELEASED[resample](x)
        h = layer.conv_1(h)
        h += layer.embedding(F.silu(emb))[:, :, None, None]
        h = F.silu(layer.norm_2(h))
        h = layer.conv_2(layer.dropout(h))
        joined: Tensor = (layer.shortcut(x) + h) / np.sqrt(2.0)
        return joined

    def stage(self, stage: Any, x: Tensor, emb: Tensor, resample: str = "") -> Tensor:
        """Apply a block and its optional attention."""
        h = self.block(stage.block, x, emb, resample)
        return h if stage.attention is None else self.attention(stage.attention, h)

    @override
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        net = self.net
        frequencies = net.embedding.noise_features.frequencies
        angle = torch.log(sigma)[:, None] * frequencies[None, :] * 2 * np.pi
        emb = net.embedding.linear_1(torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1))
        emb = net.embedding.linear_2(F.silu(emb))
        branch = x = 2 * x - 1.0
        skips = [net.input(x)]
        for level, encoder in enumerate(net.encoder):
            if level > 0:
                h = self.stage(net.downs[level - 1], skips[-1], emb, "down")
                conv = net.input_branch[level - 1].down.conv
                branch = released(branch, pads=(2, 2))
                branch = F.conv2d(branch, conv.weight, stride=2) + conv.bias.reshape(1, -1, 1, 1)
                branch = (branch + h) / np.sqrt(2.0)
                skips.append(branch)
            for stage in encoder.stages:
                skips.append(self.stage(stage, skips[-1], emb))
        h = skips[-1]
        for stage in net.middle:
            h = self.stage(stage, h, emb)
        for level, decoder in enumerate(net.decoder):
            if level > 0:
                h = self.stage(net.ups[level - 1], h, emb, "up")
            for stage in decoder.stages:
                h = self.stage(stage, torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = net.head.conv(F.silu(net.head.norm(h)))
        return out / sigma.reshape(-1, 1, 1, 1)


def released_step(network: NCSNpp, x: Tensor) -> Run:
    """Return the released training step: loss, clipping, Adam and EMA, tensor by tensor."""
    net = Released(network).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-4, foreach=False, fused=False)
    shadows = [p.clone().detach() for p in trained]

    def step() -> None:
        optimizer.zero_grad()
        t = torch.rand(x.shape[0], device=x.device) * (1 - 1e-5) + 1e-5
        z = torch.randn_like(x)
        std = 0.01 * (50 / 0.01) ** t
        score = net(x + std[:, None, None, None] * z, std)
        losses = torch.square(score * std[:, None, None, None] + z)
        loss = torch.mean(0.5 * torch.sum(losses.reshape(losses.shape[0], -1), dim=-1))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for shadow, parameter in zip(shadows, trained, strict=True):
                shadow.sub_((1 - 0.999) * (shadow - parameter))

    return step


def our_step(network: NCSNpp, x: Tensor) -> Run:
    """Return the same step with the library."""
    model = RawScoreModel(network, VESDE(0.01, 50.0)).train()
    objective = ScoreMatching()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-4, fused=True)
    ema = EMA(model, decay=0.999)

    def step() -> None:
        objective(model, x).mean().backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        ema.update(model)

    return step


def evaluated(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor) -> Run:
    """Return a forward pass without autograd."""

    @torch.no_grad()
    def run() -> Tensor:
        return network(x, sigma)

    return run


def in_bfloat16(run: Run, device: str) -> Run:
    """Return a run under autocast."""

    def cast() -> object:
        with torch.autocast(device, torch.bfloat16):
            return run()

    return cast


def row(work: str, times: dict[str, list[float]], name: str, reference: str) -> Row:
    """Return the row of one of our runs; the released operations are its peer."""
    ours, theirs = times[name], times[reference]
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return Row(work, statistics.median(ours) * 1e3, None, "released operations", ratio)


def throughput(times: dict[str, list[float]], batch: int, conv_flops: float) -> float:
    """Return the FLOP/s of our forward pass relative to the bare convolution."""
    pairs = zip(times["ours"], times["bare convolution"], strict=True)
    return statistics.median(FLOPS * batch / a / (conv_flops / b) for a, b in pairs)


def in_process(*arguments: object) -> float:
    """Run this script with options in a separate process and return the number it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_step(name: str, batch: int, device: str) -> None:
    """Print the milliseconds of a training step."""
    torch.manual_seed(0)
    network = NCSNpp.cifar10().to(device)
    x = torch.rand(batch, 3, 32, 32, device=device)
    run = our_step(network, x) if name == "ours" else released_step(network, x)
    run()
    print(statistics.median(measure({name: run}, 3, torch.device(device), calls=2)[name]))


def steps(rounds: int, batch: int, *same: object) -> Row:
    """Return the row of a training step, both alternating, each in a separate process.

    So memory holds one network and one optimizer, as in training.
    """
    times: dict[str, list[float]] = {"released step": [], "our step": []}
    for _ in range(rounds):
        for name, kind in (("released step", "released"), ("our step", "ours")):
            times[name].append(in_process("--step", kind, "--batch", batch, *same))
    return row(f"{NETWORK}, batch {batch}, training step", times, "our step", "released step")


def take_step(recompute: bool, batch: int) -> None:
    """Run forward and backward of one step and print the peak memory in MiB."""
    network = NCSNpp.cifar10(activation_checkpointing=recompute)
    model = RawScoreModel(network, VESDE(0.01, 50.0))
    loss = ScoreMatching()(model, torch.rand(batch, 3, 32, 32)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    status = Path("/proc/self/status").read_text()  # getrusage would inherit the parent's peak
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def forwards(batch: int, device: str, compiled: bool, rounds: int) -> list[Row]:
    """Return the rows of the forward passes, and print how far they are from released ones."""
    torch.manual_seed(0)
    network = NCSNpp.cifar10().to(device).eval()
    for parameter in network.parameters():  # zero-initialized layers must matter
        parameter.data += 0.01 * torch.randn_like(parameter)
    x, sigma = torch.rand(batch, 3, 32, 32, device=device), torch.logspace(-1, 1.5, batch)
    sigma = sigma.to(device)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(256, 256, 3, padding=1, device=device)
    h, repeats = torch.randn(batch, 256, 16, 16, device=device), 20

    @torch.no_grad()
    def bare() -> None:
        for _ in range(repeats):
            conv(h)

    runs = {
        "released": evaluated(Released(network), x, sigma),
        "ours": evaluated(network, x, sigma),
        "ours, channels_last": evaluated(last, x_last, sigma),
        "bare convolution": bare,
    }
    if compiled:
        runs["ours, compiled"] = evaluated(torch.compile(network, fullgraph=True), x, sigma)
        runs["ours, channels_last, compiled"] = evaluated(
            torch.compile(last, fullgraph=True), x_last, sigma
        )
    for name in [name for name in runs if name.startswith("ours")]:
        runs[f"{name}, bfloat16"] = in_bfloat16(runs[name], device)
    outputs = {name: run() for name, run in runs.items()}
    times = measure(runs, rounds, torch.device(device), calls=2)
    conv_flops = repeats * 2 * h.numel() * 256 * 9
    relative = throughput(times, batch, conv_flops)
    print(f"throughput of our forward pass relative to the convolution: {relative:.0%}")
    want = outputs["released"]
    for name, got in outputs.items():
        if isinstance(want, Tensor) and isinstance(got, Tensor):
            error = (got.float() - want).norm() / want.norm()
            print(f"relative difference of {name} from released: {float(error):.1e}")
    return [
        row(
            f"{NETWORK}, batch {batch}, forward{name.removeprefix('ours')}", times, name, "released"
        )
        for name in runs
        if name.startswith("ours")
    ]


def main() -> None:
    """Print the table."""
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=("ours", "released"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch, device, rounds = arguments.batch, arguments.device, arguments.rounds
    arguments.moments = 1
    if arguments.peak is not None:
        take_step(bool(arguments.peak), batch)
        return
    if arguments.step is not None:
        time_step(arguments.step, batch, device)
        return
    same = ("--threads", arguments.threads, "--device", device)
    rows = [
        *forwards(batch, device, arguments.compile, rounds),
        steps(math.ceil(rounds / 3), batch, *same),
    ]
    show("networks", rows, arguments)
    if device == "cpu":
        print("peak memory of a process for forward and backward of a step, MiB")
        for recompute in (False, True):
            name = "with" if recompute else "without"
            memory = in_process("--peak", int(recompute), "--batch", 4 * batch, *same)
            print(f"batch {4 * batch}, {name} activation checkpointing: {memory:.0f}")


if __name__ == "__main__":
    main()
