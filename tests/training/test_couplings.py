"""Couplings of data and noise, against all permutations, and losses with given noise."""

import itertools

import pytest
import torch
from support import seeded

from diffusionkit import (
    VPSDE,
    FlowMatchingSDE,
    ScoreMatching,
    VelocityModel,
    VelocityWeighting,
    optimal_coupling,
)


def pair(n, *shape, dtype=torch.float64):
    return (torch.randn(n, *shape, generator=seeded(k), dtype=dtype) for k in range(2))


@pytest.mark.parametrize("shape", [(), (2,), (3, 2, 2)])
def test_the_best_of_all_permutations(shape):
    x0, eps = pair(6, *shape)
    cost = {
        order: float((x0 - eps[list(order)]).square().sum())
        for order in itertools.permutations(range(6))
    }
    found = optimal_coupling(x0, eps)
    assert float((x0 - found).square().sum()) == pytest.approx(min(cost.values()), rel=1e-12)
    assert torch.equal(found.flatten().sort().values, eps.flatten().sort().values)


def test_on_the_line_pairs_are_sorted():
    x0, eps = pair(200, 1, dtype=torch.float32)
    found = optimal_coupling(x0, eps)
    assert torch.equal(x0.argsort(0), found.argsort(0))


def test_pairs_are_made_within_classes():
    x0, eps = pair(60, 2)
    labels = torch.randint(0, 3, (60,), generator=seeded())
    found = optimal_coupling(x0, eps, class_labels=labels)
    for k in range(3):
        rows = labels == k
        assert torch.equal(found[rows], optimal_coupling(x0[rows], eps[rows]))


def test_a_loss_of_given_noise():
    sde, (x0, eps) = FlowMatchingSDE(), pair(5, 3)
    output, t = torch.randn(5, 3, generator=seeded(3), dtype=torch.float64), torch.rand(5).double()
    model = VelocityModel(lambda x, noise_label: output, sde)
    loss = ScoreMatching(VelocityWeighting())(model, x0, t=t, eps=eps)
    right = (output - (eps - x0)).square().mean(1)
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
    sample = sde.perturb(x0, t, eps=eps)
    assert torch.equal(sample.eps, eps)
    torch.testing.assert_close(sample.x, (1 - t)[:, None] * x0 + t[:, None] * eps)


def test_noise_is_widened_like_the_data():
    x0, eps = (x.to(torch.bfloat16) for x in pair(4, 2))
    sample = VPSDE().perturb(x0, torch.full((4,), 0.5), eps=eps)
    assert sample.eps.dtype == torch.float32
    assert torch.equal(sample.eps, eps.float())


@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [
        (torch.zeros(3, 2), ValueError, r"eps: expected the shape of x0, \(4, 2\), got \(3, 2\)"),
        (torch.zeros(4, 2).double(), ValueError, "eps: expected the dtype of x0"),
        (torch.full((4, 2), torch.nan), ValueError, "eps: expected finite values, got 8"),
        ([1.0], TypeError, "eps: expected a tensor"),
    ],
)
def test_other_noise_raises(eps, error, message):
    x0, model = torch.ones(4, 2), VelocityModel(lambda x, noise_label: x, FlowMatchingSDE())
    with pytest.raises(error, match=message):
        ScoreMatching()(model, x0, eps=eps)
    with pytest.raises(error, match=message):
        optimal_coupling(x0, eps)


def test_wrong_class_labels_raise():
    x0, eps = pair(4, 2)
    with pytest.raises(TypeError, match="class_labels: expected a tensor of integers, got list"):
        optimal_coupling(x0, eps, class_labels=[0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"class_labels: expected shape \(4,\), got \(3,\)"):
        optimal_coupling(x0, eps, class_labels=torch.zeros(3, dtype=torch.int64))
