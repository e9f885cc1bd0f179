"""Compare the Frechet distance of 50,000 x 2048 features with the usual implementation by sqrtm.

The usual implementation: numpy's mean and covariance of each set, and the real part of scipy's
matrix square root of the product of the covariances. Both get the same float32 features: correlated
dimensions whose variances decay like those of image features, with the fake ones shifted. Each
implementation runs in a separate process on one thread; CPU time and peak memory include both sets.

    python benchmarks/metrics.py [--rows 50000] [--columns 2048] [--rounds 1]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusionkit.metrics import FeatureMoments, frechet_distance


class Run(NamedTuple):
    """CPU seconds for moments and distance, the distance, and the peak memory in GiB."""

    moments: float
    distance: float
    value: float
    peak: float


def features(rows: int, columns: int, seed: int) -> Tensor:
    """Return correlated features (rows, columns), generated in chunks to keep peak memory low."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing *= torch.arange(1, columns + 1).float().rsqrt()
    x = torch.empty(rows, columns)
    generator.manual_seed(seed)
    for part in torch.split(x, 5000):
        part.copy_(torch.randn(part.shape, generator=generator) @ mixing + 0.01 * seed)
    return x


def ours(real: Tensor, fake: Tensor) -> tuple[float, float, float]:
    """Return the seconds for the moments and the distance, and the distance."""
    start = time.process_time()
    sets = FeatureMoments(), FeatureMoments()
    for moments, x in zip(sets, (real, fake), strict=True):
        moments.update(x)
    middle = time.process_time()
    value = frechet_distance(*sets)
    return middle - start, time.process_time() - middle, value


def usual(real: Tensor, fake: Tensor) -> tuple[float, float, float]:
    """Return the same for numpy and scipy."""
    from scipy import linalg  # type: ignore[import-untyped]

    start = time.process_time()
    (mu1, s1), (mu2, s2) = (
        (x.mean(0, dtype=np.float64), np.cov(x, rowvar=False)) for x in (real.numpy(), fake.numpy())
    )
    middle = time.process_time()
    root = linalg.sqrtm(s1 @ s2)
    value = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real)
    return middle - start, time.process_time() - middle, float(value)


def measure(
    implementation: Callable[[Tensor, Tensor], tuple[float, float, float]], rows: int, columns: int
) -> Run:
    """Run one implementation in this process."""
    torch.set_num_threads(1)
    times = implementation(*(features(rows, columns, seed) for seed in (1, 2)))
    return Run(*times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    """Print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    runs: dict[str, list[Run]] = {"diffusionkit": [], "scipy sqrtm": []}
    for _ in range(options.rounds):
        for name, implementation in zip(runs, (ours, usual), strict=True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                arguments = (implementation, options.rows, options.columns)
                runs[name].append(pool.apply(measure, arguments))
    found = {name: Run(*map(statistics.median, zip(*of, strict=True))) for name, of in runs.items()}
    print(f"{options.rows} x {options.columns} features, float32: CPU time on one thread")
    for name, run in found.items():
        print(
            f"{name:<13} moments {run.moments:6.2f} s  distance {run.distance:6.2f} s  "
            f"peak {run.peak:5.2f} GiB  value {run.value:.9f}"
        )
    own, other = found.values()
    print(
        f"ratios: distance {other.distance / own.distance:.1f}, "
        f"total {(other.moments + other.distance) / (own.moments + own.distance):.2f}"
    )


if __name__ == "__main__":
    main()
