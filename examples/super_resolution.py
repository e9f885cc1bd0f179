"""Train 4x super-resolution of photograph patches and compare samples with interpolation.

A network conditioned on 4x4 pixels learns the distribution of the 16x16 pixels with the objective
of improved DDPM. Several samples of each held-out patch are drawn on a respaced chain with learned
variances. The table compares them and their mean with interpolation: PSNR, the distribution of fine
detail, and consistency with the low-resolution image. It prints the table and saves a picture,
`outputs/super_resolution.png`. Runtime: seven minutes on one CPU core; half a minute for the second
command.

    python examples/super_resolution.py
    python examples/super_resolution.py --train-steps 50 --patches 16 --samples 2 --steps 10
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange, repeat
from helpers import argument_parser, energy_distance, fit, picture_path, positive_int, save
from matplotlib.figure import Figure
from photographs import SIZE, enlarge, load, shrink
from torch import Tensor
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

BATCH, LEARNING_RATE, EMA_DECAY = 32, 1e-3, 0.998
SHOWN, SAMPLES_SHOWN = 10, 4  # patches and samples per patch in the picture


def train(images: Tensor, steps: int, seed: int) -> ScoreModel:
    """Train a model of images conditioned on their downsampled versions."""
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


def sample(model: ScoreModel, small: Tensor, n: int, steps: int, seed: int) -> Tensor:
    """Return n samples (m, n, 3, 16, 16) for each small image (m, 3, 4, 4)."""
    sampler = PCSampler(
        DenoisedModel(model, Clip()),
        Ancestral(variance="model"),
        grid=DDPMChain.cosine(1000).respaced(str(steps)),
        progress=partial(tqdm, desc="sampling", unit="step"),
    )
    generator = torch.Generator().manual_seed(seed)
    low_res = repeat(small, "m c h w -> (m n) c h w", n=n)
    samples = sampler((len(low_res), 3, SIZE, SIZE), low_res=low_res, generator=generator)
    return rearrange(samples, "(m n) c h w -> m n c h w", n=n)


def psnr(images: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the mean peak signal-to-noise ratio in dB and its standard error over images."""
    ratio = 10 * torch.log10(4 / (images - truth).square().mean((1, 2, 3)))  # the peak is 2
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(len(ratio))


def detail(images: Tensor) -> Tensor:
    """Return the detail (n, d) of images (n, 3, 16, 16) that downsampling removes."""
    return (images - enlarge(shrink(images), "nearest")).flatten(1)


def table_row(name: str, images: Tensor, truth: Tensor) -> str:
    """Return the row of the table for one image per true image."""
    ratio, error = psnr(images, truth)
    off = (shrink(images) - shrink(truth)).square().mean().sqrt() * 127.5
    cells = [
        f"{ratio:.2f} ± {error:.2f}",
        f"{energy_distance(detail(images), detail(truth)):.4f}",
        f"{float(off):.2f}",
    ]
    return f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells)


def table(samples: Tensor, truth: Tensor) -> str:
    """Return the table of samples (m, n, 3, 16, 16) and interpolations."""
    heads = ("PSNR (dB)", "detail, energy dist.", "low-res RMSE")
    small = shrink(truth)
    lines = [
        f"{'':<22}" + "".join(f"{head:>22}" for head in heads),
        table_row("nearest neighbor", enlarge(small, "nearest"), truth),
        table_row("bilinear", enlarge(small, "bilinear"), truth),
        table_row("bicubic", enlarge(small, "bicubic"), truth),
        table_row("one sample", samples[:, 0], truth),
        table_row(f"mean of {samples.shape[1]} samples", samples.mean(1), truth),
        "",
        "low-res RMSE: of the downsampled image against the given one, in levels of 255",
        f"spread of the samples, in levels: {float(spread(samples)) * 127.5:.2f}; "
        f"error of their mean: {float(error_of_mean(samples, truth)) * 127.5:.2f}",
    ]
    return "\n".join(lines)


def spread(samples: Tensor) -> Tensor:
    """Return the expected root mean squared distance of a new sample to the mean of n others."""
    n = samples.shape[1]
    return (samples.var(1).mean() * (1 + 1 / n)).sqrt()


def error_of_mean(samples: Tensor, truth: Tensor) -> Tensor:
    """Return the root mean squared error of the mean of the samples."""
    return (samples.mean(1) - truth).square().mean().sqrt()


def draw_figure(samples: Tensor, truth: Tensor) -> Figure:
    """Plot a column for each patch: low resolution, bicubic, samples, their mean, truth."""
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
    add("--train-steps", type=positive_int, default=2400, help="training steps")
    add("--patches", type=positive_int, default=128, help="held-out patches")
    add("--samples", type=positive_int, default=8, help="samples per patch, at least 2")
    add("--steps", type=positive_int, default=50, help="sampler steps")
    add("--seed", type=int, default=0, help="the random seed")
    picture = "outputs/super_resolution.png"
    add("--output", type=picture_path, default=picture, help="path of the figure")
    args = parser.parse_args(argv)
    if args.samples < 2:
        parser.error("--samples: expected at least 2 to measure their spread, got 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample several images for each small one, and save the picture."""
    args = options(argv)
    images = load()
    start = time.perf_counter()
    model = train(images.train, args.train_steps, args.seed)
    trained = time.perf_counter()
    order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))
    truth = images.test[order[: args.patches]]
    samples = sample(model, shrink(truth), args.samples, args.steps, args.seed)
    print(f"\ntraining {trained - start:.0f} s, sampling {time.perf_counter() - trained:.0f} s\n")
    print(table(samples, truth))
    save(draw_figure(samples, truth), args.output)
    print(f"\npicture {args.output}")


if __name__ == "__main__":
    main()
