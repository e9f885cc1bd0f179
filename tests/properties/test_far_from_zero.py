"""Digits of data far from zero, and of sums over large dimensions in half precision."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EmpiricalModel,
    GaussianDecoder,
    GaussianMixtureModel,
    LevelDecoder,
    StableTarget,
    SubVPSDE,
    clipped_step,
)
from diffusionkit.diagnostics import dsm_variance, posterior_divergence, stf_variance
from diffusionkit.metrics import (
    FeatureMoments,
    InceptionScore,
    frechet_distance,
    kernel_distance,
    precision_recall,
)

OFFSETS = [1e2, 1e4, 1e6, 1e8]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw numbers that keep all digits when 1e8 is added, multiples of 2^-20."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * 2**20).round() / 2**20


A, B = normal(150, 8), normal(150, 8, seed=1) * 1.2 + 0.5


@pytest.mark.parametrize("offset", [*OFFSETS, -1e8])
def test_neighbors_do_not_change_with_a_common_shift(offset) -> None:
    assert precision_recall(A + offset, B + offset) == precision_recall(A, B)
    assert precision_recall(A - offset, A + offset) == (0.0, 0.0, 0.0, 0.0)
    assert precision_recall(A + offset, A + offset)[:2] == (1.0, 1.0)


@pytest.mark.parametrize("offset", [*OFFSETS, -1e8])
def test_frechet_distances_do_not_change_with_a_common_shift(offset) -> None:
    right = frechet_distance(A, B)
    assert frechet_distance(A + offset, B + offset) == pytest.approx(right, rel=1e-6)
    assert frechet_distance(A + offset, A + offset) < 1e-6
    streamed = FeatureMoments()
    for part in torch.split(A + offset, 7):
        streamed.update(part)
    assert frechet_distance(streamed, B + offset) == pytest.approx(right, rel=1e-6)


def exact_kernel_distance(x: Tensor, y: Tensor) -> float:
    xs, ys = ([[Fraction(v) for v in row] for row in z.tolist()] for z in (x, y))

    def mean(us: list[list[Fraction]], vs: list[list[Fraction]], other: bool) -> Fraction:
        values = [
            (sum((p * q for p, q in zip(u, v, strict=True)), Fraction()) / len(u) + 1) ** 3
            for i, u in enumerate(us)
            for j, v in enumerate(vs)
            if other or i != j
        ]
        return sum(values, Fraction()) / len(values)

    return float(mean(xs, xs, False) + mean(ys, ys, False) - 2 * mean(xs, ys, True))


@pytest.mark.parametrize("offset", [0.0, *OFFSETS, -1e8])
def test_kernel_distances_keep_their_digits(offset) -> None:
    """The kernel is a polynomial, so they grow with the shift; the value in whole numbers."""
    x, y = A[:12, :3] + offset, B[:15, :3] + offset
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(exact_kernel_distance(x, y), rel=1e-12)
    if offset:
        # There the kernel is linear: the error relative to the value does not depend on the shift.
        far = kernel_distance(A[:12, :3] + 1e10, B[:15, :3] + 1e10)
        ratio, expected = found.stderr / found.value, far.stderr / far.value
        assert ratio == pytest.approx(expected, rel=1e-5 + 10 / abs(offset))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_metrics_of_any_precision_are_those_of_the_same_numbers(dtype) -> None:
    x, y = (z.to(dtype) + 100 for z in (A, B))
    for metric in (precision_recall, frechet_distance, kernel_distance):
        assert metric(x, y) == metric(x.double(), y.double())


@pytest.mark.parametrize("sde", [VESDE(), VPSDE(), SubVPSDE(), EDMSDE()], ids=repr)
@pytest.mark.parametrize("offset", [1e5, 1e6, 1e8])
@pytest.mark.parametrize("d", [2, 64])
def test_ideal_denoisers_commute_with_shifts(sde, offset, d) -> None:
    """x0(x + alpha c) = x0(x) + c for data shifted by c, with the same noise."""
    data, eps = normal(40, d), normal(40, d, seed=1)
    mixture = [GaussianMixtureModel(sde, data[:5] + c, [0.5] * 5) for c in (0.0, offset)]
    empirical = [EmpiricalModel(sde, data + c, block=16) for c in (0.0, offset)]
    for u in (0.02, 0.3, 0.7, 1.0):
        t = torch.full((40,), u * sde.T, dtype=torch.float64)
        alpha, sigma = (c.unsqueeze(1) for c in sde.marginal(t))
        x = alpha * data + sigma * eps
        for near, far in (mixture, empirical):
            here, there = near.predict(x, t), far.predict(x + alpha * offset, t)
            # The shifted state is rounded to 1e-16 of the shift.
            noise = 1e-15 * offset * float((1 / sigma + 1).max()) * float((alpha / sigma + 1).max())
            torch.testing.assert_close(there.x0 - offset, here.x0, rtol=0, atol=1e-8 + noise)
            torch.testing.assert_close(there.eps, here.eps, rtol=0, atol=1e-8 + 10 * noise)


@pytest.mark.parametrize("d", [2, 64])
@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_stable_targets_commute_with_shifts(offset, d) -> None:
    data, sde = normal(40, d), VESDE()
    t = torch.full((40,), 0.4, dtype=torch.float64)
    here, there = (
        StableTarget()(sde.perturb(y, t, generator=torch.Generator().manual_seed(1)), y).x0
        for y in (data, data + offset)
    )
    torch.testing.assert_close(there - offset, here, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "variance", [dsm_variance, lambda *a, **k: stf_variance(*a, 8, **k), posterior_divergence]
)
def test_variances_do_not_change_with_a_shift_of_the_data(variance) -> None:
    data, t = normal(60, 20), torch.tensor([0.1, 0.4, 0.7])
    here, there = (
        variance(VESDE(), y, t, samples=20, generator=torch.Generator().manual_seed(0)).value
        for y in (data, data + 1e7)
    )
    torch.testing.assert_close(there, here, rtol=1e-6, atol=0)


HALF = [torch.float16, torch.bfloat16]
SHAPE = (2, 3, 256, 256)  # a log-density of -280,000 nats, where float16 ends at 65,504


@pytest.mark.parametrize("dtype", HALF)
def test_densities_of_large_images_in_half_precision(dtype) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    means, t = torch.zeros(1, *SHAPE[1:]), torch.full((2,), 0.5)
    model = GaussianMixtureModel(VPSDE(), means, [1.0])
    d = math.prod(SHAPE[1:])
    squares = x.double().square().flatten(1).sum(1)
    right = -0.5 * squares - 0.5 * d * math.log(2 * math.pi)  # of N(0, I), which VP keeps
    for found in (VPSDE().prior_log_prob(x), model.log_prob(x, t)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_level_probabilities_of_large_images_in_half_precision(dtype) -> None:
    """All levels are equally likely at infinite noise: -d log 256."""
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)  # 68,000 nats
    z = torch.zeros(images.shape, dtype=dtype)
    found = LevelDecoder().log_prob(images, z, torch.ones(1), torch.full((1,), 1e4))
    assert float(found) == pytest.approx(-images.numel() * math.log(256), rel=1e-5)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("dtype", HALF)
def test_pixel_probabilities_in_half_precision(dtype, cdf) -> None:
    """Those of the levels themselves, which half precision rounds."""
    decoder, levels = GaussianDecoder(cdf=cdf), torch.arange(256).view(1, -1)
    x, mean = decoder.encode(levels), torch.full((1, 256), 0.25)
    log_var = torch.full((1, 256), -4.0)
    found = decoder.log_prob(x.to(dtype), mean.to(dtype), log_var.to(dtype))
    torch.testing.assert_close(found, decoder.log_prob(x, mean, log_var))


@pytest.mark.parametrize("dtype", HALF)
def test_inception_scores_of_half_precision_probabilities(dtype) -> None:
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    scores = [InceptionScore(1), InceptionScore(1)]
    scores[0].update(logits=logits)
    scores[1].update(probs=logits.softmax(1).to(dtype))
    assert scores[1].compute().mean == pytest.approx(scores[0].compute().mean, rel=1e-2)


@pytest.mark.parametrize("dtype", HALF)
def test_the_norm_of_gradients_in_half_precision(dtype) -> None:
    """A norm above 65,504 is not infinite."""
    n = 1_000_000
    p, q = (torch.nn.Parameter(torch.zeros(k, dtype=dtype)) for k in (n, 4))
    r = torch.nn.Parameter(torch.zeros(2))
    for parameter, value in ((p, 100.0), (q, 3.0), (r, 3.0)):
        parameter.grad = torch.full_like(parameter, value)
    report = clipped_step(torch.optim.SGD([p, q, r], lr=1.0), max_norm=100.0)
    assert not report.skipped
    assert report.norm == pytest.approx(math.sqrt(1e4 * n + 54), rel=1e-3)
    assert float(p[0].detach()) == pytest.approx(-100 * 100 / report.norm, rel=1e-2)
