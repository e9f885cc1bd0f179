"""The Frechet distance and its moments: closed forms, reference values and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit.metrics import FeatureMoments, frechet, frechet_distance

# Points whose distance was computed with the NumPy and SciPy code of improved-diffusion.
REAL = [[0, 0], [1, 0], [0, 1.1], [1, 1.2], [10, 0], [11, 0], [10, 1.3], [11, 1.4], [30, 0]]
FAKE = [[0.5, 0.4], [1.3, 1.2], [3, 3], [-1.2, 0.3], [20, 20], [20.5, 20], [20, 21], [21, 21.2]]
REFERENCE = 223.1631791379133


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    mixing = torch.randn(d, d, generator=seeded(99 + d), dtype=torch.float64)
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64) @ mixing


def with_moments(mean: torch.Tensor, root: torch.Tensor, n: int = 50) -> torch.Tensor:
    """Features whose sample mean is `mean` and whose sample covariance is root^T root."""
    x = torch.randn(n, len(mean), generator=seeded(7), dtype=torch.float64)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (n - 1))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T @ root + mean


def moments_of(*parts: torch.Tensor) -> FeatureMoments:
    moments = FeatureMoments()
    for part in parts:
        moments.update(part)
    return moments


def assert_same(one: FeatureMoments, other: FeatureMoments) -> None:
    assert one.count == other.count
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-12, atol=1e-12)


def test_reference_value() -> None:
    found = frechet_distance(
        *(torch.tensor(points, dtype=torch.float64) for points in (REAL, FAKE))
    )
    assert found == pytest.approx(REFERENCE, rel=1e-12)


def test_diagonal_gaussians() -> None:
    mean = torch.tensor([[1.0, -2.0, 0.5], [0.5, 3.0, 0.5]]).double()
    std = torch.tensor([[1.0, 3.0, 0.2], [2.0, 0.5, 0.2]]).double()
    real, fake = (with_moments(m, s.diag()) for m, s in zip(mean, std, strict=True))
    expected = 0.5**2 + 5.0**2 + 1.0**2 + 2.5**2
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(real, (mean[1], std[1].square().diag())) == pytest.approx(
        expected, rel=1e-12
    )


def test_published_moments_are_numpy_arrays() -> None:
    """They may be read-only, as from np.load(..., mmap_mode="r")."""
    x, y = normal(30, 4), normal(20, 4, seed=1)
    pair = x.mean(0).numpy(), np.cov(x.T.numpy())
    for array in pair:
        array.flags.writeable = False
    assert frechet_distance(pair, y) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """In two dimensions tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2)."""
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    b = torch.tensor([[0.5, -0.4], [-0.4, 3.0]]).double()
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(a.det() * b.det()))
    zero = torch.zeros(2).double()
    expected = float(a.trace() + b.trace()) - 2 * root
    assert frechet_distance((zero, a), (zero, b)) == pytest.approx(expected, rel=1e-13)


def test_singular_covariances() -> None:
    """For two rank-one covariances the trace of the root is |u . v|."""
    u = torch.tensor([3.0, 0.0, 4.0, 0.0]).double()
    v = torch.tensor([1.0, 2.0, 0.0, 2.0]).double()
    zero, full = torch.zeros(4).double(), torch.diag(torch.tensor([4.0, 1, 9, 16])).double()
    found = frechet_distance((zero, u.outer(u)), (zero, v.outer(v)))
    assert found == pytest.approx(25 + 9 - 2 * 3, rel=1e-13)
    # Against any S it is (u^T S u)^(1/2): sqrt(9 * 4 + 16 * 9).
    found = frechet_distance((zero, u.outer(u)), (zero, full))
    assert found == pytest.approx(25 + 30 - 2 * math.sqrt(180), rel=1e-13)
    assert frechet_distance((zero, torch.zeros(4, 4)), (zero, full)) == pytest.approx(30)


def test_singular_up_to_rounding() -> None:
    """Cholesky may succeed with a last pivot of rounding noise, whose root is 1e-8."""
    zero, full = torch.zeros(6).double(), torch.arange(1.0, 7.0).double()
    for seed in range(40):
        root = torch.randn(6, 5, generator=seeded(seed), dtype=torch.float64)
        product = np.linalg.svd((root.T * full.sqrt()).numpy(), compute_uv=False).sum()
        expected = float(root.square().sum()) + 21 - 2 * product
        found = frechet_distance((zero, root @ root.T), (zero, full.diag()))
        assert found == pytest.approx(expected, abs=1e-12)


def test_covariances_in_reduced_precision() -> None:
    """Rounding makes eigenvalues of a published covariance negative, which is accepted."""
    x, y = normal(20, 60), normal(80, 60, seed=1)
    covariance = moments_of(x).covariance.half()
    assert torch.linalg.eigvalsh(covariance.double())[0] < -1e-3
    found = frechet_distance((x.mean(0), covariance), y)
    assert found == pytest.approx(frechet_distance(x, y), rel=1e-2)


def test_fewer_samples_than_dimensions() -> None:
    """The trace of the root equals the nuclear norm of the samples' products."""
    x, y = normal(20, 60), normal(30, 60, seed=1) * 0.5 + 0.1
    centred = [(z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    root = np.linalg.svd((centred[0] @ centred[1].T).numpy(), compute_uv=False).sum()
    squares = sum(float(z.square().sum()) for z in centred)
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + squares - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-10 * squares)


def test_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    identity = torch.nn.Identity()
    identity.num_features = 16
    real, fake = normal(300, 16), normal(200, 16, seed=1) * 0.8 + 0.3
    theirs = fid.FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert frechet_distance(real, fake) == pytest.approx(float(theirs.compute()), rel=1e-6)


@given(st.integers(0, 10**6), st.floats(-100, 100), st.floats(0.1, 10))
def test_invariances(seed, shift, scale) -> None:
    x, y = normal(40, 5, seed), normal(30, 5, seed + 1) + 0.5
    plain = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(plain, rel=1e-10)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=seeded(seed)).double())
    moved = [scale * z @ rotation + shift for z in (x, y)]
    assert frechet_distance(*moved) == pytest.approx(scale**2 * plain, rel=1e-8)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0.0, abs=1e-10 * plain)
    assert frechet_distance(x, x + 2) == pytest.approx(20.0, rel=1e-9)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 1000))
def test_streaming_and_merging(sizes, seed) -> None:
    whole = normal(sum(sizes) + 1, 6, seed) + 1e3
    parts = [*whole[:-1].split(sizes), whole[-1:]]
    once = moments_of(whole)
    torch.testing.assert_close(once.covariance.numpy(), np.cov(whole.T.numpy()), rtol=1e-11, atol=0)
    torch.testing.assert_close(once.mean, whole.mean(0), rtol=1e-14, atol=0)
    assert_same(moments_of(*parts), once)
    pieces = [moments_of(part) for part in parts]
    left, right = FeatureMoments(), FeatureMoments()
    for piece in pieces:
        left.merge(piece)
    for part in reversed(parts):  # (a + (b + (c + ...)))
        more = moments_of(part)
        more.merge(right)
        right = more
    assert_same(left, once)
    assert_same(right, once)
    assert [piece.count for piece in pieces] == [len(part) for part in parts]


def test_results_do_not_depend_on_block_sizes(monkeypatch) -> None:
    x = normal(50, 9)
    whole = moments_of(x)
    monkeypatch.setattr(frechet, "_ROWS", 7)
    monkeypatch.setattr(frechet, "_COLUMNS", 4)
    assert_same(moments_of(x), whole)
    torch.testing.assert_close(whole.covariance.numpy(), np.cov(x.T.numpy()), rtol=1e-12, atol=0)


def test_single_precision_far_from_zero() -> None:
    """Sums of squares in float32 would lose a standard deviation of 1e-2 around 1e3."""
    x = (torch.randn(500, 3, generator=seeded()) * 1e-2 + 1e3).half().float() + 0.25
    exact = np.cov(x.double().T.numpy())
    found = moments_of(*x.split(60))
    torch.testing.assert_close(found.covariance.numpy(), exact, rtol=1e-9, atol=1e-15)


def test_repr() -> None:
    assert repr(FeatureMoments()) == "FeatureMoments(count=0, dims=0)"
    assert repr(moments_of(normal(7, 4))) == "FeatureMoments(count=7, dims=4)"


def test_saved_states() -> None:
    x, y = normal(30, 4), normal(20, 4, seed=1)
    first = moments_of(x)
    state = first.state_dict()
    again = FeatureMoments()
    again.load_state_dict(state)
    again.update(y)
    assert_same(again, moments_of(x, y))
    again.load_state_dict(state)  # unchanged by the update
    assert_same(again, moments_of(x))
    first.update(y)
    again.load_state_dict(state)
    assert_same(again, moments_of(x))
    first.load_state_dict(state)
    empty = FeatureMoments()
    empty.load_state_dict(FeatureMoments().state_dict())
    empty.merge(FeatureMoments())
    empty.merge(first)
    assert_same(empty, first)


def test_bad_features() -> None:
    x = normal(20, 4)
    moments = moments_of(x)
    broken = x.clone()
    broken[3, 1], broken[5] = math.nan, math.inf
    with pytest.raises(ValueError, match="got 2 of 20 rows with NaN or infinity"):
        moments.update(broken)
    with pytest.raises(ValueError, match=r"fake: .* 2 of 20 rows"):
        frechet_distance(x, broken)
    with pytest.raises(ValueError, match="expected 4 dimensions, as before, got 3"):
        moments.update(x[:, :3])
    with pytest.raises(ValueError, match="expected 4 dimensions, as before, got 3"):
        moments.merge(moments_of(x[:, :3]))
    assert_same(moments, moments_of(x))
    with pytest.raises(ValueError, match=r"expected shape \(n, d\), .* got \(20, 2, 2\)"):
        moments.update(x.view(20, 2, 2))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        moments.update(x.long())
    with pytest.raises(TypeError, match="got ndarray"):
        moments.update(x.numpy())
    with pytest.raises(ValueError, match="at least 1 rows, got 0"):
        moments.update(x[:0])
    with pytest.raises(ValueError, match="fake: expected 4 dimensions, as in real, got 3"):
        frechet_distance(moments, x[:, :3])
    with pytest.raises(ValueError, match="real: expected at least 2 rows, got 1"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(moments_of(x[:1]), x)
    with pytest.raises(ValueError, match="at least 1 samples, got 0"):
        _ = FeatureMoments().mean
    with pytest.raises(TypeError, match="other: expected FeatureMoments, got Tensor"):
        moments.merge(x)


def test_bad_moments() -> None:
    mean, covariance = torch.zeros(2), torch.eye(2)
    with pytest.raises(TypeError, match=r"real: expected FeatureMoments, a tensor .* got list"):
        frechet_distance([1.0], (mean, covariance))
    for wrong, got in (
        (covariance.numpy(), "ndarray"),
        ((mean, 1.0), "tuple of Tensor, float"),
        ((mean, covariance, mean), "tuple of Tensor, Tensor, Tensor"),
        ((), "tuple"),
    ):
        with pytest.raises(TypeError, match=f"real: .* mean and covariance, got {got}$"):
            frechet_distance(wrong, (mean, covariance))
    with pytest.raises(
        ValueError, match=r"real: expected a mean \(d,\) .* got \(2,\) and \(3, 3\)"
    ):
        frechet_distance((mean, torch.eye(3)), (mean, covariance))
    with pytest.raises(ValueError, match=r"fake: expected a finite .* got 2 values NaN"):
        frechet_distance((mean, covariance), (mean * math.nan, covariance))
    with pytest.raises(ValueError, match=r"fake: expected a finite .* got 4 values NaN"):
        frechet_distance((mean, covariance), (mean, covariance * math.inf))
    with pytest.raises(ValueError, match=r"real: expected a symmetric .* got .* 0\.1 apart"):
        frechet_distance((mean, torch.tensor([[1.0, 0.5], [0.4, 1.0]])), (mean, covariance))
    for name, pairs in (
        ("real", ((mean, -covariance), (mean, covariance))),
        ("fake", ((mean, covariance), (mean, torch.tensor([[1.0, 2.0], [2.0, 1.0]])))),
    ):
        with pytest.raises(
            ValueError, match=f"{name}: expected a covariance, got an eigen.* of -1,"
        ):
            frechet_distance(*pairs)
    moments = FeatureMoments()
    with pytest.raises(ValueError, match="expected count, mean and scatter, got"):
        moments.load_state_dict({"mean": mean})
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3, 3\)"):
        moments.load_state_dict({"count": 3, "mean": mean, "scatter": torch.eye(3)})
