"""The kernel distance: explicit sums over pairs, bias, standard error and torchmetrics."""

import math
import statistics

import pytest
import torch
from support import seeded

from diffusionkit.metrics import kernel, kernel_distance


def uniform(n: int, d: int, generator: torch.Generator, mean: float = 0.0, half: float = 1.0):
    return mean + half * (2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1)


def by_pairs(x: list[list[float]], y: list[list[float]]) -> float:
    def average(a, b, same):
        values = [
            (sum(p * q for p, q in zip(u, v, strict=True)) / len(u) + 1) ** 3
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not (same and i == j)
        ]
        return math.fsum(values) / len(values)

    return average(x, x, True) + average(y, y, True) - 2 * average(x, y, False)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (7, 4), (5, 9)])
def test_mean_over_all_pairs(m, n) -> None:
    x, y = uniform(m, 3, seeded()), uniform(n, 3, seeded(1), 0.5, 2.0)
    assert kernel_distance(x, y).value == pytest.approx(by_pairs(x.tolist(), y.tolist()), rel=1e-12)


def test_torchmetrics() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    identity = torch.nn.Identity()
    identity.num_features = 8
    real, fake = uniform(60, 8, seeded()), uniform(60, 8, seeded(1), 0.3, 1.5)
    # One subset of all rows, so the result is deterministic.
    with pytest.warns(UserWarning, match="will save all extracted features"):
        theirs = kid.KernelInceptionDistance(feature=identity, subsets=1, subset_size=60)
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    value = float(theirs.compute()[0])
    assert kernel_distance(real, fake).value == pytest.approx(value, rel=1e-6)


def test_results_do_not_depend_on_block_sizes(monkeypatch) -> None:
    x, y = uniform(40, 5, seeded()), uniform(33, 5, seeded(1), 0.2)
    whole = kernel_distance(x, y)
    for size in (7, 11, 33):
        monkeypatch.setattr(kernel, "_BLOCK", size)
        found = kernel_distance(x, y)
        assert found.value == pytest.approx(whole.value, rel=1e-12)
        assert found.stderr == pytest.approx(whole.stderr, rel=1e-10)
    swapped = kernel_distance(y, x)
    assert swapped == pytest.approx(whole, rel=1e-10)


def true_distance(mean: float, half: float) -> float:
    """Return the distance between uniform distributions (0, 1) and (mean, half) from moments."""
    first, second = mean, mean**2 + half**2 / 3
    third = mean**3 + mean * half**2
    return 3 * first**2 + 3 * (second - 1 / 3) ** 2 + third**2


@pytest.mark.parametrize(
    ("m", "n", "d", "mean", "half", "excess"),
    [
        (60, 60, 1, 0.5, 1.3, 1.08),
        (40, 90, 1, 0.1, 1.0, 1.15),
        (60, 60, 1, 0.0, 1.0, 1.45),
        (60, 60, 10, 0.0, 1.0, 1.25),
        (40, 90, 10, 0.0, 1.0, 1.25),
    ],
)
def test_mean_and_standard_error(m, n, d, mean, half, excess) -> None:
    """Over many draws: no bias, and errors equal to the spread or, for equal sets, larger."""
    draws, generator = 600, seeded(m + n)
    found = [
        kernel_distance(uniform(m, d, generator), uniform(n, d, generator, mean, half))
        for _ in range(draws)
    ]
    values = [one.value for one in found]
    spread = statistics.stdev(values)
    error = abs(statistics.fmean(values) - true_distance(mean, half))
    assert error < 4 * spread / math.sqrt(draws)
    stated = math.sqrt(statistics.fmean([one.stderr**2 for one in found]))
    assert 0.95 < stated / spread < excess


def test_single_precision_features() -> None:
    x, y = uniform(50, 20, seeded()), uniform(50, 20, seeded(1))
    exact = kernel_distance(x.float().double(), y.float().double())
    assert kernel_distance(x.float(), y.float()) == exact


def test_identical_sets() -> None:
    """Identical samples count as any other pair: a set has a negative distance to itself."""
    x = uniform(30, 4, seeded())
    assert kernel_distance(x, x).value < 0
    same = kernel_distance(torch.ones(5, 2), torch.ones(4, 2))
    assert same.value == 0.0
    assert same.stderr == 0.0


def test_bad_input() -> None:
    x = uniform(5, 4, seeded())
    with pytest.raises(ValueError, match="real: expected at least 2 rows, got 1"):
        kernel_distance(x[:1], x)
    with pytest.raises(ValueError, match="fake: expected at least 2 rows, got 1"):
        kernel_distance(x, x[:1])
    with pytest.raises(ValueError, match="fake: expected 4 dimensions, as in real, got 3"):
        kernel_distance(x, x[:, :3])
    with pytest.raises(ValueError, match="real: expected finite values, got 5 of 5 rows"):
        kernel_distance(x / 0, x)
    with pytest.raises(TypeError, match="real: expected a floating-point"):
        kernel_distance(x.int(), x)
    with pytest.raises(ValueError, match="expected the device of real, cpu, got meta"):
        kernel_distance(x, x.to("meta"))
