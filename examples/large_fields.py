"""Train a network on 64x64 patches of a terrain, and draw one of 1024x1024 (multi-diffusion).

The data are heights of the Jacksboro fault in Tennessee, which come with matplotlib, minus their
average over some two kilometers. The network is only trained on patches; `PatchedModel` turns it
into a model of the whole field, a few windows at a time. It prints the cost, the peak memory, seams
and spectra, and saves a picture, `outputs/large_fields.png`. Runtime: ten minutes on one CPU core.

    python examples/large_fields.py
    python examples/large_fields.py --size 256 --train-steps 200 --output outputs/fast.png
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers import argument_parser, device, fit, picture_path, positive_int, save
from matplotlib import colormaps
from matplotlib.cbook import get_sample_data
from matplotlib.colors import LightSource
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.functional import conv2d, pad

from diffusionkit import (
    EDMSDE,
    DPMSolver2M,
    EDMModel,
    EDMWeighting,
    KarrasGrid,
    LogNormalTimes,
    PatchedModel,
    PCSampler,
    ScoreMatching,
    ScoreModel,
    random_crops,
)
from diffusionkit.networks import NCSNpp

PATCH, OVERLAP = 64, 16
SIGMA_DATA = 0.5
METERS = 30.0  # the distance of two points
SMOOTHING = 24  # the standard deviation of the average, in points
TRAIN_STEPS, BATCH, LEARNING_RATE, EMA_DECAY = 1200, 8, 2e-3, 0.995
SAMPLER_STEPS = 24


def heights() -> Tensor:
    """Return the heights (344, 403) in meters, less their Gaussian average."""
    archive: Any = get_sample_data("jacksboro_fault_dem.npz")
    data = torch.tensor(archive["elevation"]).float()[None, None]
    reach = 4 * SMOOTHING
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / SMOOTHING) ** 2)
    weights /= weights.sum()
    smooth = pad(data, (reach,) * 4, mode="reflect")
    smooth = conv2d(conv2d(smooth, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return (data - smooth)[0, 0]


def turned(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (n, c, h, h), each reflected and turned at random: up is no direction here."""
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.flip(2),
        lambda x: x.flip(3),
        lambda x: x.transpose(2, 3),
    ]
    for change in changes:
        some = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
        x = torch.where(some, change(x), x)
    return x


def make_model() -> ScoreModel:
    """Return a model of patches that is not trained yet."""
    network = NCSNpp(
        channels=1,
        width=16,
        multipliers=(1, 2, 2, 2),
        blocks=1,
        attention_levels=(),
        dropout=0.0,
        fir_kernel=None,
        progressive_input="none",
        embedding="fourier_linear",
        fourier_scale=1.0,  # the published 16 is for long training
        scale_by_sigma=False,
    )
    return EDMModel(network, EDMSDE(), sigma_data=SIGMA_DATA)


def train(model: ScoreModel, field: Tensor, steps: int, generator: torch.Generator) -> None:
    """Train a model on random crops of a field (h, w) of standard deviation SIGMA_DATA."""
    objective = ScoreMatching(EDMWeighting(SIGMA_DATA), times=LogNormalTimes(mean=-0.8))

    def loss() -> Tensor:
        crops = random_crops(field[None, None], PATCH, count=BATCH, generator=generator)
        return objective(model, turned(crops.x0, generator), generator=generator)

    fit(model, loss, steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY)


def seams(x: Tensor) -> float:
    """Return the variance of differences of neighbors across windows' ends over that elsewhere.

    Args:
        x: fields (n, c, h, w), whose windows lie PATCH - OVERLAP apart.
    """
    ratios = []
    for axis in (2, 3):
        change = x.diff(dim=axis).square().mean([a for a in range(4) if a != axis])
        stride = PATCH - OVERLAP
        at = torch.arange(len(change), device=x.device) + 1
        # A window begins every stride, another ends an overlap later.
        end = ((at % stride == 0) | (at % stride == OVERLAP)) & (at >= stride)
        ratios.append(change[end].mean() / change[~end].mean())
    return float(sum(ratios) / 2)


def spectrum(x: Tensor) -> Tensor:
    """Return the mean power (4,) of fields (h, w) in bands of wavelengths from 2 to 32 points."""
    window = torch.hann_window(PATCH, periodic=False, device=x.device)
    parts = x.unfold(0, PATCH, PATCH // 2).unfold(1, PATCH, PATCH // 2)
    power = torch.fft.fft2(parts * window[:, None] * window).abs().square().mean((0, 1))
    f = torch.fft.fftfreq(PATCH, device=x.device)
    size = torch.hypot(f[:, None], f)
    return torch.stack([power[(size > 0.5 / w) & (size <= 1 / w)].mean() for w in (2, 4, 8, 16)])


def peak_memory() -> float:
    """Return the largest memory of this process so far, in MB."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (1e6 if sys.platform == "darwin" else 1e3)


def draw_figure(real: Tensor, sample: Tensor) -> Figure:
    """Draw terrains (h, w) in meters at one scale, lit from the north-west."""
    light = LightSource(azdeg=315, altdeg=45)
    figure = Figure(figsize=(13, 9), layout="constrained")
    widths = [real.shape[1], sample.shape[1]]
    reach = float(real.abs().quantile(0.995))
    titles = "data and a patch", "generated from patches"
    for ax, x, title in zip(
        figure.subplots(1, 2, width_ratios=widths), (real, sample), titles, strict=True
    ):
        image = light.shade(
            x.cpu().numpy(), cmap=colormaps["gist_earth"], vmin=-reach, vmax=1.2 * reach,
            vert_exag=2, dx=METERS, dy=METERS, blend_mode="soft",
        )  # fmt: skip
        ax.imshow(image, interpolation="none")
        ax.set(xticks=[], yticks=[], title=f"{title}, {x.shape[0]} x {x.shape[1]}")
        ax.set_anchor("N")
    corner = (real.shape[1] - PATCH) // 2, (real.shape[0] - PATCH) // 2
    figure.axes[0].add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="white"))
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--size", type=positive_int, default=1024, help="points along each side of the sample")
    add("--train-steps", type=positive_int, default=TRAIN_STEPS, help="training steps")
    add("--steps", type=positive_int, default=SAMPLER_STEPS, help="sampler steps")
    add("--shift", action="store_true", help="move the windows at every step")
    add("--untrained", action="store_true", help="do not train, to measure memory alone")
    add("--seed", type=int, default=0, help="the random seed")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=best, help="the torch device")
    add(
        "--output", type=picture_path, default="outputs/large_fields.png", help="path of the figure"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on patches, generate a large field, and save the picture."""
    args = options(argv)
    torch.manual_seed(args.seed)  # weight initialization
    generator = torch.Generator(args.device).manual_seed(args.seed)  # all other randomness
    real = heights().to(args.device)
    scale = SIGMA_DATA / real.std()
    model = make_model().to(args.device)
    start = time.perf_counter()
    if not args.untrained:
        train(model, real * scale, args.train_steps, generator)
    trained = time.perf_counter()
    patched = PatchedModel(model, PATCH, OVERLAP, shift=args.shift, batch=8)
    sampler = PCSampler(patched, DPMSolver2M(), grid=KarrasGrid(), steps=args.steps, progress=True)
    x = sampler((1, 1, args.size, args.size), generator=generator) / scale
    done = time.perf_counter()
    print(f"\ntraining {trained - start:.0f} s, sampling {args.size} x {args.size} in "
          f"{sampler.nfe} evaluations {done - trained:.0f} s, "
          f"peak memory {peak_memory():.0f} MB")  # fmt: skip
    print(f"standard deviation {float(x.std()):.0f} m, of the data {float(real.std()):.0f} m")
    print(f"differences across the windows' ends, variance over that elsewhere: {seams(x):.3f}")
    powers = spectrum(x[0, 0]) / spectrum(real)
    bands = zip(("2-4", "4-8", "8-16", "16-32"), powers.tolist(), strict=True)
    print("power over that of the data at wavelengths of "
          + ", ".join(f"{band}: {power:.2f}" for band, power in bands) + " points")  # fmt: skip
    save(draw_figure(real, x[0, 0]), args.output)
    print(f"picture {args.output}")


if __name__ == "__main__":
    main()
