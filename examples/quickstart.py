"""Train a score model on real images, sample it by predictor-corrector, and evaluate the samples.

A small DDPM++ learns the score of scikit-learn's handwritten digits, 8x8 pixels, and generates 500
samples. It prints quality measures and saves a picture, `outputs/quickstart.png`. Runtime: a few
minutes on two CPU cores.

    python examples/quickstart.py
    python examples/quickstart.py --sde ve --sampler ddim --steps 50 --output outputs/ve.png

`train` and `sample` spell out the two loops; copy them as a starting point.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from digits import SHAPE, Digits, Quality, load, pixels
from helpers import argument_parser, device, picture_path, positive_int, save, tile
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from diffusionkit import (
    DDIM,
    EMA,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    Corrector,
    EDMModel,
    EDMWeighting,
    EulerMaruyama,
    ForwardSDE,
    Langevin,
    LogNormalTimes,
    PCSampler,
    Predictor,
    ProbabilityFlow,
    ReverseDiffusion,
    ScoreMatching,
    ScoreModel,
    SubVPSDE,
    TimeLabel,
    clipped_step,
    suggest_sigma_max,
)
from diffusionkit.networks import DDPMpp

TRAIN_STEPS, BATCH, LEARNING_RATE, EMA_DECAY = 1200, 128, 2e-3, 0.995
SAMPLES, SAMPLER_STEPS, SNR = 500, 100, 0.16
SHOWN, TRAJECTORIES = 64, 5  # images and sampling trajectories in the picture
REMAINING = np.linspace(1, 0, 9) ** 2  # the remaining share of a trajectory at each column

# The forward processes; the sigma_max of VE depends on the diameter of the data.
SDES: dict[str, Callable[[Tensor], ForwardSDE]] = {
    "vp": lambda data: VPSDE(),
    "subvp": lambda data: SubVPSDE(),
    "ve": lambda data: VESDE(sigma_min=0.01, sigma_max=suggest_sigma_max(data)),
}

# A sampler is a predictor and a corrector; either may be missing.
SAMPLERS: dict[str, tuple[Predictor | None, Corrector | None]] = {
    "pc": (ReverseDiffusion(), Langevin(snr=SNR)),
    "pc-ancestral": (Ancestral(), Langevin(snr=SNR)),
    "reverse-diffusion": (ReverseDiffusion(), None),
    "ancestral": (Ancestral(), None),
    "euler-maruyama": (EulerMaruyama(), None),
    "ddim": (DDIM(), None),
    "langevin": (None, AnnealedLangevin(snr=SNR)),
}
ODE = "ode"  # the probability flow, with an adaptive solver


class Samples(NamedTuple):
    """Samples and a few of their trajectories.

    Args:
        images: the samples (n, 1, 8, 8).
        trajectories: states of the first samples (times, samples, 1, 8, 8).
        times: the time of each state, decreasing.
        nfe: the number of network evaluations, each on the whole batch.
    """

    images: Tensor
    trajectories: Tensor
    times: list[float]
    nfe: int


def train(
    sde: ForwardSDE, data: Tensor, steps: int, generator: torch.Generator
) -> tuple[ScoreModel, list[float]]:
    """Train a model on images (n, 1, 8, 8); return it and the loss at each step."""
    network = DDPMpp(channels=1, width=32, multipliers=(1, 1), blocks=1, dropout=0.0)
    # EDM's parameterization, weighting and noise levels suit any process and train fast.
    sigma_data = float(data.std())
    model = EDMModel(network, sde, sigma_data=sigma_data, label=TimeLabel()).to(data.device)
    objective = ScoreMatching(EDMWeighting(sigma_data), times=LogNormalTimes(mean=-0.8))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    ema, losses = EMA(model, decay=EMA_DECAY), []
    for _ in (bar := tqdm(range(steps), desc="training", unit="step")):
        rows = torch.randint(len(data), (BATCH,), generator=generator, device=data.device)
        loss = objective(model, data[rows], generator=generator).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        schedule.step()
        ema.update(model)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    model.load_state_dict(ema.model.state_dict())
    return model, losses


def sample(
    sampler: str, model: ScoreModel, n: int, steps: int, generator: torch.Generator
) -> Samples:
    """Generate n images with a named sampler, recording the first trajectories."""
    if sampler == ODE:
        return sample_ode(model, n, generator)
    predictor, corrector = SAMPLERS[sampler]
    pc, states = PCSampler(model, predictor, corrector, steps=steps), []
    iterator = pc.iterate((n, *SHAPE), generator=generator)
    for state in tqdm(iterator, desc="sampling", unit="step", total=steps + 2):
        images = state.x
        states.append((state.t, images[:TRAJECTORIES].clone()))
    shown = ((1 - REMAINING) * (len(states) - 1)).round().astype(int)
    times, trajectories = zip(*(states[i] for i in shown), strict=True)
    return Samples(images, torch.stack(trajectories), list(times), pc.nfe)


def sample_ode(model: ScoreModel, n: int, generator: torch.Generator) -> Samples:
    """Generate n images with the probability flow; flows that end early give the trajectories."""
    sde, flow = model.sde, ProbabilityFlow(model, rtol=1e-3, atol=1e-3)
    noise = sde.prior_sample((n, *SHAPE), generator=generator, device=generator.device)
    images, states = flow.sample(noise), [noise[:TRAJECTORIES]]
    times = (sde.t_min + REMAINING * (sde.T - sde.t_min)).tolist()
    for t in times[1:-1]:
        until = ProbabilityFlow(model, rtol=1e-3, atol=1e-3, t_end=t, denoise=False)
        states.append(until.sample(noise[:TRAJECTORIES]))
    return Samples(images, torch.stack([*states, images[:TRAJECTORIES]]), times, flow.nfe)


def show(ax: Axes, images: Tensor, columns: int, title: str) -> None:
    """Show digits (n, 1, 8, 8) in a grid, dark on white."""
    ax.imshow(tile(images, columns, -1.0).numpy(), cmap="gray_r", vmin=-1, vmax=1)
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_figure(digits: Digits, samples: Samples, losses: Sequence[float]) -> Figure:
    """Plot real digits next to samples, sampling trajectories, and the training loss."""
    figure = Figure(figsize=(10, 8.2), layout="constrained")
    (real, fake), (paths, curve) = figure.subplots(2, 2, height_ratios=(1.55, 1))
    show(real, digits.train[:SHOWN], 8, "Real digits")
    show(fake, samples.images[:SHOWN], 8, "Samples")

    # Scale each time to its own range: VE noise is many times larger than the data.
    states = samples.trajectories / samples.trajectories.abs().amax((1, 2, 3, 4), keepdim=True)
    columns = len(states)
    show(paths, states.transpose(0, 1).flatten(0, 1), columns, "From noise to data")
    ticks = [*(f"{t:.2f}" for t in samples.times[:-1]), "data"]
    paths.set_xticks([10 * i + 4.5 for i in range(columns)], ticks)
    paths.set_xlabel("time t")
    paths.tick_params(length=0)

    window = max(len(losses) // 50, 1)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    curve.plot(losses, color="0.8", linewidth=0.7)
    curve.plot(np.arange(len(smooth)) + window / 2, smooth, color="tab:blue", linewidth=1.8)
    curve.set_yscale("log")
    curve.yaxis.set_major_formatter("{x:.1f}")
    curve.yaxis.set_minor_formatter("{x:.1f}")
    curve.set_title("Training loss")
    curve.set_xlabel("step")
    curve.spines[["top", "right"]].set_visible(False)
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--sde", choices=SDES, default="vp", help="the forward process")
    add("--sampler", choices=[*SAMPLERS, ODE], default="pc", help="the sampler")
    add("--steps", type=positive_int, default=SAMPLER_STEPS, help="sampler steps")
    add("--train-steps", type=positive_int, default=TRAIN_STEPS, help="training steps")
    add("--samples", type=positive_int, default=SAMPLES, help="images to generate")
    add("--seed", type=int, default=0, help="the random seed")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=best, help="the torch device")
    add("--output", type=picture_path, default="outputs/quickstart.png", help="path of the figure")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, evaluate, and save the picture."""
    args = options(argv)
    torch.manual_seed(args.seed)  # weight initialization
    generator = torch.Generator(args.device).manual_seed(args.seed)  # batches, times, noise
    digits = load()

    start = time.perf_counter()
    data = digits.train.to(args.device)
    model, losses = train(SDES[args.sde](data), data, args.train_steps, generator)
    trained = time.perf_counter()
    samples = sample(args.sampler, model, args.samples, args.steps, generator)
    done = time.perf_counter()

    print(f"\ntraining    {args.train_steps} steps, {trained - start:.0f} s")
    print(f"sampling    {args.samples} images, {done - trained:.0f} s, "
          f"{samples.nfe} network evaluations\n")  # fmt: skip
    print(Quality(digits).table(pixels(samples.images)))
    save(draw_figure(digits, samples, losses), args.output)
    print(f"\npicture     {args.output}")


if __name__ == "__main__":
    main()
