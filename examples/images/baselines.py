"""Bits per dimension of two simple densities on images: baselines for a model.

    python examples/images/baselines.py --data glyphs --size 16

The baselines are a Gaussian with the mean and covariance of the training images, and a kernel
density estimate of them, both for dequantized images and evaluated on held-out images. The
bandwidth of the kernel is the best one for the held-out images, which favors the baseline.
"""

import argparse
import math
from types import SimpleNamespace
from typing import Any

import torch
from launch import launched
from sources import HELP, held_out, one_line_errors, open_source
from torch import Tensor

from diffusionkit import UniformDequantizer, evaluate_bits_per_dim
from diffusionkit.likelihood import BitsPerDim
from diffusionkit.metrics import FeatureMoments


class Gaussian:
    """The Gaussian with the mean and covariance of points (N, *D)."""

    def __init__(self, points: Tensor) -> None:
        moments = FeatureMoments()
        moments.update(points.flatten(1))
        self.mean = moments.mean
        self.factor = torch.linalg.cholesky(moments.covariance)

    def __call__(self, x: Tensor, **_: Any) -> SimpleNamespace:
        """Return the negative log-density of x (B, *D) as `nats` (B,)."""
        away = (x.flatten(1).double() - self.mean).T
        z = torch.linalg.solve_triangular(self.factor, away, upper=False)
        log_det = 2 * self.factor.diagonal().log().sum()
        d = len(self.mean)
        return SimpleNamespace(nats=0.5 * (z.square().sum(0) + log_det + d * math.log(2 * math.pi)))


class KernelDensity:
    """The mean of Gaussians of one standard deviation around points (N, *D)."""

    def __init__(self, points: Tensor, bandwidth: float) -> None:
        self.points, self.bandwidth = points.flatten(1).double(), bandwidth
        self.squares = self.points.square().sum(1)

    def __call__(self, x: Tensor, **_: Any) -> SimpleNamespace:
        """Return the negative log-density of x (B, *D) as `nats` (B,)."""
        rows = x.flatten(1).double()
        distances = self.squares + rows.square().sum(1, keepdim=True) - 2 * rows @ self.points.T
        n, d = self.points.shape
        normalizer = math.log(n) + 0.5 * d * math.log(2 * math.pi * self.bandwidth**2)
        log_sum = torch.logsumexp(-0.5 * distances / self.bandwidth**2, 1)
        return SimpleNamespace(nats=normalizer - log_sum)


def baselines(
    train: Tensor, test: Tensor, bandwidths: list[float], seed: int = 0
) -> dict[str, BitsPerDim]:
    """Return the results of both densities for images in uint8, in bits per dimension."""
    dequantizer = UniformDequantizer(256, 0.0, 256.0, dtype=torch.float64)
    points = dequantizer(train, generator=torch.Generator().manual_seed(seed)).x

    def bits(density: Any) -> BitsPerDim:
        return evaluate_bits_per_dim(
            density, test, dequantizer=dequantizer, seed=seed, batch_size=256, progress=False
        )

    found = {f"kernel density {h:g}": bits(KernelDensity(points, h)) for h in bandwidths}
    best = min(found, key=lambda name: found[name].mean)
    return {"Gaussian": bits(Gaussian(points)), best: found[best]}


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="glyphs", help=f"training images: {HELP}")
    parser.add_argument("--held-out", help="held-out images, by default the test part of a "
                        "built-in set")  # fmt: skip
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--channels", type=int, choices=(1, 3))
    parser.add_argument("--limit", type=int, help="how many held-out images are used")
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[8, 12, 16, 24, 32],
                        help="standard deviations of the kernel, in levels")  # fmt: skip
    options = parser.parse_args(arguments)

    def tensor(source: str, part: Any) -> Tensor:
        data = open_source(source, part, size=options.size, channels=options.channels)
        return torch.stack([data[i][0] for i in range(len(data))])

    source = held_out(options.data, options.held_out)
    if source is None:
        parser.error("--held-out: expected images, got none")
    with launched() as place, one_line_errors("baselines.py"):
        test = tensor(source, "test")[: options.limit]
        found = baselines(tensor(options.data, "train"), test, options.bandwidths)
        if place.first:
            for name, bits in found.items():
                print(f"{name:<24}{bits}")


if __name__ == "__main__":
    main()
