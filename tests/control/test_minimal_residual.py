"""The solver of guidance by measurements, with covariances that are none: those of networks."""

import math

import pytest
import torch
from support.gaussian_oracle import DOUBLE, randn64
from torch import nn

from diffusionkit import (
    VESDE,
    VPSDE,
    Clip,
    DenoisedModel,
    EpsModel,
    GaussianMixtureModel,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    PseudoinverseGuidance,
    ScoreModel,
    X0Model,
)
from diffusionkit.control._minimal_residual import minimal_residual

N = 8


def covariance():
    root = randn64(N, N, seed=1)
    return root @ root.T + 0.01 * torch.eye(N, dtype=DOUBLE)


def graded():
    basis = torch.linalg.qr(randn64(N, N, seed=2))[0]
    return basis @ torch.diag(torch.logspace(-5, 3, N, dtype=DOUBLE)) @ basis.T


def indefinite():
    basis = torch.linalg.qr(randn64(N, N, seed=3))[0]
    signs = torch.tensor([1.0, -1.0] * (N // 2), dtype=DOUBLE)
    return basis @ torch.diag(signs * torch.linspace(0.1, 2.0, N, dtype=DOUBLE)) @ basis.T


def clipped():
    """Half of the rows are those of saturated pixels."""
    saturated = torch.arange(N) % 2 == 0
    return 1e-4 * torch.eye(N, dtype=DOUBLE) + torch.where(saturated[:, None], 0.0, covariance())


def skew():
    """Every vector is orthogonal to its product, so that the first iteration gains nothing."""
    root = randn64(N, N, seed=4)
    return root - root.T


SYMMETRIC = [covariance, graded, indefinite]
MATRICES = [*SYMMETRIC, clipped, skew, lambda: randn64(N, N, seed=5), lambda: -covariance()]
IDS = ["covariance", "graded", "indefinite", "clipped", "skew", "any", "negative"]


def residual(matrix, v, b):
    return (b - v @ matrix.T).norm(dim=1) / b.norm(dim=1)


@pytest.mark.parametrize("make", MATRICES, ids=IDS)
def test_residuals_are_the_smallest_in_the_krylov_space(make) -> None:
    """By a dense least-squares fit on an orthogonal basis of b, S b, ..., S^(k-1) b."""
    matrix, b = make(), randn64(2, N, seed=6)
    for k in range(1, N + 1):
        v, shares = minimal_residual(lambda v: v @ matrix.T, b, iterations=k, tolerance=1e-10)
        torch.testing.assert_close(residual(matrix, v, b), shares[-1], rtol=1e-5, atol=1e-9)
        assert bool((shares.diff(dim=0) <= 1e-12).all())
        for row in range(len(b)):
            columns = [b[row] / b[row].norm()]
            for _ in range(k - 1):
                column = matrix @ columns[-1]
                for _ in range(2):
                    column = column - sum((c @ column) * c for c in columns)
                columns.append(column / column.norm())
            basis = matrix @ torch.stack(columns, 1)
            fit = torch.linalg.lstsq(basis, b[row, :, None], driver="gelsd").solution[:, 0]
            smallest = (b[row] - basis @ fit).norm() / b[row].norm()
            torch.testing.assert_close(shares[-1, row], smallest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", SYMMETRIC, ids=IDS[: len(SYMMETRIC)])
def test_two_directions_are_enough_for_symmetric_matrices(make) -> None:
    matrix, b = make(), randn64(3, N, seed=6)
    options = {"iterations": 5, "tolerance": 1e-10}
    v, _ = minimal_residual(lambda v: v @ matrix, b, **options)
    short, _ = minimal_residual(lambda v: v @ matrix, b, **options, symmetric=True)
    torch.testing.assert_close(short, v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", MATRICES, ids=IDS)
def test_reported_residuals_hold_in_single_precision(make) -> None:
    matrix, b = make().float(), randn64(2, N, seed=6).float()
    v, shares = minimal_residual(lambda v: v @ matrix.T, b, iterations=20, tolerance=1e-6)
    assert float(shares[-1].max()) <= 1.0
    true = residual(matrix.double(), v.double(), b.double())
    rounding = 1e-6 * matrix.norm() * v.norm(dim=1) / b.norm(dim=1)
    assert bool(((true - shares[-1]).abs() <= 1e-4 + rounding).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_systems(dtype) -> None:
    """What can be solved is solved, and nothing grows: zero, a projection, a nilpotent shift."""
    half = torch.diag((torch.arange(N) < N // 2).to(dtype))
    shift = torch.diag(torch.ones(N - 1, dtype=dtype), 1)
    b = torch.ones(1, N, dtype=dtype)
    for matrix, left in ((torch.zeros(N, N, dtype=dtype), 1.0), (half, math.sqrt(0.5)),
                         (shift, None)):  # fmt: skip
        v, shares = minimal_residual(lambda v, m=matrix: v @ m.T, b, iterations=20, tolerance=1e-6)
        assert bool(v.isfinite().all())
        assert float(shares[-1]) == pytest.approx(float(residual(matrix, v, b)), abs=1e-5)
        assert left is None or float(shares[-1]) == pytest.approx(left)


def test_an_impossible_variance_is_not_fitted() -> None:
    """An error of the covariance that nearly cancels the noise has a solution of any size."""
    floor, b = 1e-4, torch.ones(1, 2, dtype=DOUBLE)
    for second in (-1.001e-4, -1.2e-4, -1e-3, -1.0):
        s = torch.tensor([1.0, second], dtype=DOUBLE) + floor
        options = {"iterations": 5, "tolerance": 1e-10}
        free, _ = minimal_residual(lambda v, s=s: s * v, b, **options)
        torch.testing.assert_close(free, b / s)
        v, shares = minimal_residual(lambda v, s=s: s * v, b, **options, floor=floor)
        assert float((v * s * v).sum()) >= 0.5 * floor * float(v.square().sum())
        assert float(v.norm()) < 3.0
        assert float(shares[-1]) == pytest.approx(float(residual(s.diag(), v, b)))


@pytest.mark.parametrize("floor", [0.0, 1e-4, torch.logspace(-6, 3, N, dtype=DOUBLE)])
def test_every_covariance_is_possible(floor) -> None:
    for c in (covariance(), graded(), torch.zeros(N, N, dtype=DOUBLE)):
        matrix = torch.as_tensor(floor, dtype=DOUBLE).expand(N).diag() + c
        b = randn64(3, N, seed=6)
        options = {"iterations": 6, "tolerance": 1e-9}
        wanted, _ = minimal_residual(lambda v, m=matrix: v @ m, b, **options)
        found, _ = minimal_residual(lambda v, m=matrix: v @ m, b, **options, floor=floor)
        assert torch.equal(found, wanted)


class Untrained(nn.Module):
    """A network of no training, whose Jacobian is no covariance: not symmetric, not positive."""

    def __init__(self, size=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 1, 3, padding=1)
        )

    def forward(self, x, noise_label):
        scale = (1 + x.square().mean((1, 2, 3), keepdim=True)).sqrt()
        return 3 * self.layers(x / scale)


def models(sde):
    net = EpsModel(Untrained().double(), sde)
    exact = GaussianMixtureModel(sde, torch.zeros(1, 1, 8, 8), [0.4])
    return {
        "network": net,
        "clipped network": DenoisedModel(net, Clip(-1.0, 1.0)),
        "clipped exact model": DenoisedModel(exact, Clip(-0.2, 0.2)),
    }


def left_half(x0):
    return x0[..., :4]


@pytest.mark.parametrize("kind", [LinearGaussianGuidance, LinearizedGaussianGuidance])
@pytest.mark.parametrize("name", ["network", "clipped network", "clipped exact model"])
@pytest.mark.parametrize("sde", [VESDE(0.01, 50.0), VPSDE()], ids=["VE", "VP"])
def test_no_iteration_takes_predictions_away_from_a_measurement(sde, name, kind) -> None:
    """For every model and noise: y - A x0 of the guided data is the residual of the system."""
    model, y = models(sde)[name], 0.8 * randn64(1, 1, 8, 4, seed=7).sign()
    t = torch.linspace(0.02, 1.0, 12, dtype=DOUBLE)
    x = sde.perturb(0.3 * randn64(12, 1, 8, 8, seed=8), t, eps=randn64(12, 1, 8, 8, seed=9)).x
    before = (y - left_half(model.predict(x, t).x0)).flatten(1).norm(dim=1)
    last = before
    for iterations in (1, 2, 3, 8):
        guided = kind(model, left_half, y, 0.0, iterations=iterations)
        with torch.no_grad():
            off = (y - left_half(guided.predict(x, t).x0)).flatten(1).norm(dim=1)
        assert bool((off <= last * (1 + 1e-6)).all())
        shares = guided.residuals(x, t)
        torch.testing.assert_close(off / before, shares[-1], rtol=1e-5, atol=1e-7)
        last = off


def test_residuals_are_reported_for_every_iteration() -> None:
    """With conditions, and padded where a system is solved in fewer."""
    model = GaussianMixtureModel(VPSDE(), torch.zeros(1, 1, 8, 8), [0.4])
    x, t = randn64(3, 1, 8, 8), torch.tensor([0.1, 0.5, 1.0], dtype=DOUBLE)
    for kind in (LinearGaussianGuidance, PseudoinverseGuidance):
        guided = kind(model, left_half, torch.ones(1, 1, 8, 4).double(), 0.1, iterations=4)
        shares = guided.residuals(x, t)
        assert shares.shape == (5, 3)
        assert torch.equal(shares[0], torch.ones(3, dtype=DOUBLE))
        assert float(shares[1:].max()) < 1e-10  # a covariance of one number
        assert not shares.requires_grad

    class Shifted(ScoreModel):
        sde = VPSDE()

        def predict(self, x, t, /, *, shift):
            return model.predict(x - shift, t)

    guided = LinearGaussianGuidance(Shifted(), left_half, torch.ones(1, 1, 8, 4).double(), 0.1)
    assert guided.residuals(x, t, shift=0.5).shape == (guided.iterations + 1, 3)


@pytest.mark.parametrize("kind", [LinearGaussianGuidance, LinearizedGaussianGuidance])
@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
def test_guidance_does_not_fit_an_impossible_variance(kind, each) -> None:
    """A network whose second datum has a variance that nearly cancels the noise of its measurement.

    Fitting it moves the third one, which is correlated, by 10^4 times the residual.
    """
    noise, t = 0.01, torch.tensor([0.5], dtype=DOUBLE)
    sigma = float(VESDE().marginal(t)[1])
    of_second = torch.tensor([0.0, -1.001 * noise**2, 0.001])
    jacobian = torch.stack([torch.eye(3)[0], of_second, torch.zeros(3)]).double() / sigma**2
    model = X0Model(lambda x, noise_label: x @ jacobian.T, VESDE())
    y = torch.ones(1, 2, dtype=DOUBLE)
    std = noise * torch.ones(2, dtype=DOUBLE) if each else noise
    found = kind(model, lambda x0: x0[:, :2], y, std).predict(torch.zeros(1, 3, dtype=DOUBLE), t).x0
    assert float(found.detach()[0, 0]) == pytest.approx(1 / (1 + noise**2), rel=1e-3)
    assert float(found.detach().abs().max()) < 2.0
