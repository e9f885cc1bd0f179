"""Precision, recall, density and coverage: reference values, prdc and points with ties."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit.metrics import nearest, neighbors, precision_recall

REAL = [[0, 0], [1, 0], [0, 1.1], [1, 1.2], [10, 0], [11, 0], [10, 1.3], [11, 1.4], [30, 0]]
FAKE = [[0.5, 0.4], [1.3, 1.2], [3, 3], [-1.2, 0.3], [20, 20], [20.5, 20], [20, 21], [21, 21.2]]


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def by_pairs(real: list[tuple[int, ...]], fake: list[tuple[int, ...]], k: int) -> tuple:
    """Compute all four from their definitions, in integer arithmetic."""

    def square(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    def radii(points):
        return [
            sorted(square(p, q) for j, q in enumerate(points) if j != i)[k - 1]
            for i, p in enumerate(points)
        ]

    r, f = radii(real), radii(fake)
    near = [[square(p, q) for q in fake] for p in real]
    rows, columns = range(len(real)), range(len(fake))
    return (
        sum(any(near[i][j] <= r[i] for i in rows) for j in columns) / len(fake),
        sum(any(near[i][j] <= f[j] for j in columns) for i in rows) / len(real),
        sum(near[i][j] <= r[i] for i, j in itertools.product(rows, columns)) / (k * len(fake)),
        sum(any(near[i][j] <= r[i] for j in columns) for i in rows) / len(real),
    )


@pytest.mark.parametrize(("k", "precision", "recall"), [(1, 0.25, 4 / 9), (3, 0.375, 4 / 9)])
def test_reference_values(k, precision, recall) -> None:
    found = precision_recall(torch.tensor(REAL), torch.tensor(FAKE), k=k)
    assert found.precision == pytest.approx(precision, abs=1e-12)
    assert found.recall == pytest.approx(recall, abs=1e-12)


@pytest.mark.parametrize(
    ("k", "real", "fake"),
    [
        (1, [1.0, 1.0, 1.01, 1.01, 1.0, 1.0, 1.01, 1.01, 361.0],
         [1.28, 1.28, 6.13, 2.9, 0.25, 0.25, 1.0, 1.04]),
        (3, [2.44, 2.21, 2.21, 2.44, 2.96, 2.69, 2.69, 2.96, 400.0],
         [13.01, 7.06, 24.93, 24.93, 2.44, 1.69, 1.25, 2.44]),
    ],
)  # fmt: skip
def test_reference_radii(k, real, fake) -> None:
    for points, radii in ((REAL, real), (FAKE, fake)):
        found = neighbors._radii(torch.tensor(points, dtype=torch.float64), k)
        torch.testing.assert_close(
            found, torch.tensor(radii, dtype=torch.float64), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc(k) -> None:
    prdc = pytest.importorskip("prdc")
    real, fake = normal(120, 6), normal(90, 6, seed=1) * 0.8 + 0.4
    theirs = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    assert precision_recall(real, fake, k=k)._asdict() == pytest.approx(theirs, abs=1e-6)


points = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=4, max_size=15)


@given(points, points, st.integers(1, 3), st.sampled_from([0.0, 1e3 + 1 / 3]))
def test_points_with_many_ties(real, fake, k, shift) -> None:
    """Also if the shift reduces distances from a matrix product to rounding noise."""
    shift = round(shift * 2**36) / 2**36  # differences of shifted points are exact
    expected = by_pairs(real, fake, k)
    found = precision_recall(
        torch.tensor(real).double() + shift, torch.tensor(fake).double() + shift, k=k
    )
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("k", [1, 4])
def test_copied_samples(k, shift, dtype) -> None:
    """Each ball has copies of its center and of the k neighbors, the last on the boundary."""
    real = (normal(60, 40) + shift).to(dtype)
    found = precision_recall(real, real[torch.randperm(60)], k=k)
    assert found == pytest.approx((1.0, 1.0, (k + 1) / k, 1.0), abs=1e-12)
    same = torch.full((9, 3), 0.1)
    assert precision_recall(same, same[:7], k=k) == (1.0, 1.0, 9 / k, 1.0)
    assert precision_recall(same, same[:7] + 1e-6, k=k) == (0.0, 0.0, 0.0, 0.0)


def test_results_do_not_depend_on_block_sizes(monkeypatch) -> None:
    real, fake = normal(23, 4), normal(17, 4, seed=1) * 0.7 + 0.5
    whole = [precision_recall(real, fake, k=k) for k in (1, 5)]
    for size in (1, 2, 7, 16):
        monkeypatch.setattr(neighbors, "_block", lambda d, size=size: size)
        assert [precision_recall(real, fake, k=k) for k in (1, 5)] == whole


def test_swapping_the_sets_swaps_precision_and_recall() -> None:
    """Distant samples have neither."""
    real, fake = normal(50, 3), normal(40, 3, seed=1) + 0.5
    there, back = precision_recall(real, fake), precision_recall(fake, real)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert precision_recall(real, fake + 100) == (0.0, 0.0, 0.0, 0.0)


def test_bad_input() -> None:
    x = normal(6, 4)
    with pytest.raises(ValueError, match="fake: expected at least 4 rows, got 3"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="real: expected at least 6 rows, got 5"):
        precision_recall(x[:5], x, k=5)
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        precision_recall(x, x, k=0)
    with pytest.raises(TypeError, match="k: expected an integer, got float"):
        precision_recall(x, x, k=3.0)
    with pytest.raises(ValueError, match="fake: expected 4 dimensions, as in real, got 3"):
        precision_recall(x, x[:, 1:])
    with pytest.raises(ValueError, match="fake: expected finite values, got 6 of 6"):
        precision_recall(x, x * torch.nan)


def test_nearest_rows_are_those_of_all_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 3, 2, generator=generator) + 1000
    queries = torch.randn(7, 3, 2, generator=generator) + 1000
    found = nearest(data, queries, k=5)
    distances = torch.cdist(queries.flatten(1).double(), data.flatten(1).double(),
                            compute_mode="donot_use_mm_for_euclid_dist")  # fmt: skip
    expected = distances.sort(1)
    assert torch.equal(found.index, expected.indices[:, :5])
    assert torch.allclose(found.distance, expected.values[:, :5], rtol=1e-9)


def test_nearest_of_images_and_of_copies() -> None:
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    found = nearest(images, images[[3, 11]])
    assert found.index.tolist() == [[3], [11]]
    assert found.distance.tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="queries: expected items of shape"):
        nearest(images, images[:, :, :2])
    with pytest.raises(ValueError, match="data: expected at least 21 rows, got 20"):
        nearest(images, images, k=21)
