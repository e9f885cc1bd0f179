"""Give patches of photographs four times the resolution: learn what a small image leaves open.

A network that is given 4x4 pixels learns, by improved DDPM's objective, what 16x16 pixels there
may be. Several samples are drawn for each patch held out, by the learned variances on a part of
the chain's steps, and compared with interpolation: how near to the truth one of them and their
mean are, how much of the detail they have that a mean lacks, and whether they fit what was given.
That takes about seven minutes on one CPU core. It prints a table and leaves one picture,
`outputs/super_resolution.png`; a look at it takes half a minute:

    python examples/super_resolution.py
    python examples/super_resolution.py --train-steps 50 --patches 16 --samples 2 --steps 10
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
from helpers import count, energy_distance, fit, picture_path, save
from matplotlib.figure import Figure
from photographs import SIZE, load
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import tqdm

from diffusionkit import (
    Ancestral,
    Clip,
    DDPMChain,
    DenoisedModel,
    EpsModel,
    HybridLoss,
    PCSampler,
    ScoreModel,
)
from diffusionkit.networks import ADMUNet

FACTOR = 4  # how many pixels along each side the small image has in one
BATCH, LEARNING_RATE, EMA_DECAY = 32, 1e-3, 0.998
SHOWN, SAMPLES_SHOWN = 10, 4  # patches in the picture, and samples of each


def shrink(images: Tensor) -> Tensor:
    """Return images (n, 3, 16, 16) as (n, 3, 4, 4), each pixel the mean of its place."""
    return avg_pool2d(images, FACTOR)


def enlarge(small: Tensor, mode: str) -> Tensor:
    """Return small images (n, 3, 4, 4) interpolated to (n, 3, 16, 16)."""
    return interpolate(small, scale_factor=FACTOR, mode=mode).clamp(-1, 1)


def train(images: Tensor, steps: int, seed: int) -> ScoreModel:
    """Train a model of images given what they are when shrunk."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = ADMUNet(
        channels=3,
        low_res_channels=3,
        width=24,
        multipliers=(1, 2, 2),
        blocks=1,
        attention_levels=(2,),
    )
    model = EpsModel(network, DDPMChain.cosine(1000), variance="learned_range")
    objective = HybridLoss()

    def loss() -> Tensor:
        x0 = images[torch.randint(len(images), (BATCH,), generator=generator)]
        return objective(model, x0, low_res=shrink(x0), generator=generator)

    fit(model, loss, steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY, optimizer=torch.optim.AdamW)
    return model


def draw(model: ScoreModel, small: Tensor, n: int, steps: int, seed: int) -> Tensor:
    """Draw n samples for each small image (m, 3, 4, 4): (m, n, 3, 16, 16)."""
    sampler = PCSampler(
        DenoisedModel(model, Clip()),
        Ancestral(variance="model"),
        grid=DDPMChain.cosine(1000).respaced(str(steps)),
        progress=lambda items: tqdm(items, desc="sampling", unit="step"),
    )
    generator = torch.Generator().manual_seed(seed)
    every = small.repeat_interleave(n, 0)
    samples = sampler((len(every), 3, SIZE, SIZE), low_res=every, generator=generator)
    return samples.view(len(small), n, *samples.shape[1:])


def psnr(images: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the mean over images of the peak signal-to-noise ratio, and its standard error, dB."""
    ratio = 10 * torch.log10(4 / (images - truth).square().mean((1, 2, 3)))  # white - black is 2
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(len(ratio))


def detail(images: Tensor) -> Tensor:
    """Return what images (n, 3, 16, 16) have beyond what is left when they are shrunk (n, d)."""
    return (images - enlarge(shrink(images), "nearest")).flatten(1)


def table_row(name: str, images: Tensor, truth: Tensor) -> str:
    """Return what is measured of one image for each true one."""
    ratio, error = psnr(images, truth)
    off = (shrink(images) - shrink(truth)).square().mean().sqrt() * 127.5
    cells = [
        f"{ratio:.2f} +- {error:.2f}",
        f"{energy_distance(detail(images), detail(truth)):.4f}",
        f"{float(off):.2f}",
    ]
    return f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells)


def table(samples: Tensor, truth: Tensor) -> str:
    """Return the table of samples (m, n, 3, 16, 16) beside interpolation."""
    heads = ("PSNR (dB)", "detail, energy dist.", "shrunk, off by")
    small = shrink(truth)
    lines = [
        f"{'':<22}" + "".join(f"{head:>22}" for head in heads),
        table_row("nearest pixel", enlarge(small, "nearest"), truth),
        table_row("bilinear", enlarge(small, "bilinear"), truth),
        table_row("bicubic", enlarge(small, "bicubic"), truth),
        table_row("one sample", samples[:, 0], truth),
        table_row(f"mean of {samples.shape[1]} samples", samples.mean(1), truth),
        "",
        "off by: the root mean square, in levels of 255, from the small image that was given",
        f"spread of the samples, in levels: {float(spread(samples)) * 127.5:.2f}; "
        f"error of their mean: {float(error_of_mean(samples, truth)) * 127.5:.2f}",
    ]
    return "\n".join(lines)


def spread(samples: Tensor) -> Tensor:
    """Return how far a fresh sample is from the mean of n others, root mean square."""
    n = samples.shape[1]
    return (samples.var(1).mean() * (1 + 1 / n)).sqrt()


def error_of_mean(samples: Tensor, truth: Tensor) -> Tensor:
    """Return how far the truth is from the mean of the samples, root mean square."""
    return (samples.mean(1) - truth).square().mean().sqrt()


def draw_figure(samples: Tensor, truth: Tensor) -> Figure:
    """Return the picture: a column for each patch; small, bicubic, samples, their mean, truth."""
    samples, truth = samples[:SHOWN], truth[:SHOWN]
    small = shrink(truth)
    rows = {"given": enlarge(small, "nearest"), "bicubic": enlarge(small, "bicubic")}
    for k in range(min(SAMPLES_SHOWN, samples.shape[1])):
        rows[f"sample {k + 1}"] = samples[:, k]
    rows |= {"mean of samples": samples.mean(1), "truth": truth}
    figure = Figure(figsize=(len(truth), len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(truth), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(line, images, strict=True):
            ax.imshow((image.clamp(-1, 1) / 2 + 0.5).movedim(0, -1).numpy())
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--train-steps", type=positive_int, default=2400, help="(%(default)s)")
    add("--patches", type=positive_int, default=128, help="held out, how many (%(default)s)")
    add("--samples", type=positive_int, default=8, help="of each, at least 2 (%(default)s)")
    add("--steps", type=positive_int, default=50, help="sampler steps (%(default)s)")
    add("--seed", type=int, default=0, help="the random seed (%(default)s)")
    picture = "outputs/super_resolution.png"
    add("--output", type=picture_path, default=picture, help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.samples < 2:
        parser.error("--samples: expected at least 2, whose spread is measured, got 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw several images for each small one, and leave a picture."""
    args = options(argv)
    images = load()
    start = time.perf_counter()
    model = train(images.train, args.train_steps, args.seed)
    trained = time.perf_counter()
    order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))
    truth = images.test[order[: args.patches]]
    samples = draw(model, shrink(truth), args.samples, args.steps, args.seed)
    print(f"\ntraining {trained - start:.0f} s, sampling {time.perf_counter() - trained:.0f} s\n")
    print(table(samples, truth))
    save(draw_figure(samples, truth), args.output)
    print(f"\npicture {args.output}")


if __name__ == "__main__":
    main()
