"""Learn real images, draw new ones by predictor-corrector, and measure how good they are.

A small DDPM++ learns the score of scikit-learn's handwritten digits, 8x8 pixels, and draws 500
new ones. That takes a few minutes on two CPU cores. It prints what it measured and leaves one
picture, `outputs/quickstart.png`.

    python examples/quickstart.py
    python examples/quickstart.py --sde ve --sampler ddim --steps 50 --output outputs/ve.png

`train` and `draw` hold the two loops, written out: take them as a start for your own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from digits import SHAPE, Digits, Quality, load, pixels
from helpers import count, device, picture_path, save
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
SHOWN, PATHS = 64, 5  # images in the picture, and paths from noise to data
WAY = np.linspace(1, 0, 9) ** 2  # how far the data still are at each moment of a path

# The forward processes; VE has to go as far as the data are wide.
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
ODE = "ode"  # the probability flow, which an adaptive solver takes in steps of its own


class Drawn(NamedTuple):
    """What a sampler drew.

    Args:
        images: the samples (n, 1, 8, 8).
        path: the states of the first few on their way (moments, few, 1, 8, 8).
        times: the time of each moment.
        evaluations: how many times the network was evaluated, on all samples at once.
    """

    images: Tensor
    path: Tensor
    times: list[float]
    evaluations: int


def train(
    sde: ForwardSDE, data: Tensor, steps: int, generator: torch.Generator
) -> tuple[ScoreModel, list[float]]:
    """Train a model on images (n, 1, 8, 8); return it, and the loss of each step."""
    network = DDPMpp(channels=1, width=32, multipliers=(1, 1), blocks=1, dropout=0.0)
    # EDM's parameterisation, weighting and times go with any process and learn fast.
    spread = float(data.std())
    model = EDMModel(network, sde, sigma_data=spread, label=TimeLabel()).to(data.device)
    objective = ScoreMatching(EDMWeighting(spread), times=LogNormalTimes(mean=-0.8))
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


def draw(sampler: str, model: ScoreModel, n: int, steps: int, generator: torch.Generator) -> Drawn:
    """Draw n images with a sampler of the table, and keep the way of the first few."""
    if sampler == ODE:
        return draw_by_ode(model, n, generator)
    predictor, corrector = SAMPLERS[sampler]
    pc, path = PCSampler(model, predictor, corrector, steps=steps), []
    states = pc.iterate((n, *SHAPE), generator=generator)
    for state in tqdm(states, desc="sampling", unit="step", total=steps + 2):
        images = state.x
        path.append((state.t, images[:PATHS].clone()))
    moments = ((1 - WAY) * (len(path) - 1)).round().astype(int)
    times, way = zip(*(path[i] for i in moments), strict=True)
    return Drawn(images, torch.stack(way), list(times), pc.nfe)


def draw_by_ode(model: ScoreModel, n: int, generator: torch.Generator) -> Drawn:
    """Draw n images by the probability flow; each moment of the way is a flow that ends there."""
    sde, flow = model.sde, ProbabilityFlow(model, rtol=1e-3, atol=1e-3)
    noise = sde.prior_sample((n, *SHAPE), generator=generator, device=generator.device)
    images, path = flow.sample(noise), [noise[:PATHS]]
    times = (sde.t_min + WAY * (sde.T - sde.t_min)).tolist()
    for t in times[1:-1]:
        until = ProbabilityFlow(model, rtol=1e-3, atol=1e-3, t_end=t, denoise=False)
        path.append(until.sample(noise[:PATHS]))
    return Drawn(images, torch.stack([*path, images[:PATHS]]), times, flow.nfe)


def tiles(images: Tensor, columns: int) -> Tensor:
    """Return images (n, 1, 8, 8) as one, row by row, with a white line between them."""
    framed = torch.nn.functional.pad(images.cpu().squeeze(1), (1, 1, 1, 1), value=-1.0)
    framed = torch.cat([framed, framed.new_full((-len(framed) % columns, 10, 10), -1.0)])
    return framed.view(-1, columns, 10, 10).transpose(1, 2).reshape(-1, columns * 10)


def show(ax: Axes, picture: Tensor, title: str) -> None:
    """Show a picture of digits, dark on white."""
    ax.imshow(picture.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_figure(digits: Digits, drawn: Drawn, losses: Sequence[float]) -> Figure:
    """Return the picture: real digits beside samples, paths from noise to data, the loss."""
    figure = Figure(figsize=(10, 8.2), layout="constrained")
    (real, samples), (paths, curve) = figure.subplots(2, 2, height_ratios=(1.55, 1))
    show(real, tiles(digits.train[:SHOWN], 8), "Real digits")
    show(samples, tiles(drawn.images[:SHOWN], 8), "Samples")

    # Each moment is shown in a range of its own: with VE the noise is many times the data.
    states = drawn.path / drawn.path.abs().amax((1, 2, 3, 4), keepdim=True)
    show(paths, tiles(states.transpose(0, 1).flatten(0, 1), len(states)), "From noise to data")
    class_labels = [*(f"{t:.2f}" for t in drawn.times[:-1]), "data"]
    paths.set_xticks([10 * i + 4.5 for i in range(len(states))], class_labels)
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
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sde", choices=SDES, default="vp", help="the forward process (%(default)s)")
    add("--sampler", choices=[*SAMPLERS, ODE], default="pc", help="(%(default)s)")
    add("--steps", type=count, default=SAMPLER_STEPS, help="of the sampler (%(default)s)")
    add("--train-steps", type=count, default=TRAIN_STEPS, help="of training (%(default)s)")
    add("--samples", type=count, default=SAMPLES, help="how many to draw (%(default)s)")
    add("--seed", type=int, default=0, help="of everything that is random (%(default)s)")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=best, help="of torch (%(default)s)")
    add("--output", type=picture_path, default="outputs/quickstart.png", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw, measure, and leave a picture."""
    args = options(argv)
    torch.manual_seed(args.seed)  # the network's first weights
    generator = torch.Generator(args.device).manual_seed(args.seed)  # batches, times, noise
    digits = load()

    start = time.perf_counter()
    data = digits.train.to(args.device)
    model, losses = train(SDES[args.sde](data), data, args.train_steps, generator)
    trained = time.perf_counter()
    drawn = draw(args.sampler, model, args.samples, args.steps, generator)
    done = time.perf_counter()

    print(f"\ntraining    {args.train_steps} steps, {trained - start:.0f} s")
    print(f"sampling    {args.samples} images, {done - trained:.0f} s, "
          f"{drawn.evaluations} network evaluations\n")  # fmt: skip
    print(Quality(digits).table(pixels(drawn.images)))
    save(draw_figure(digits, drawn, losses), args.output)
    print(f"\npicture     {args.output}")


if __name__ == "__main__":
    main()
