"""Editing: sampling from data that were perturbed to an intermediate time."""

import itertools
import math

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    GaussianMixtureModel,
    LogSNRGrid,
    PCSampler,
)
from diffusionkit.control.constraints import Inpainting
from diffusionkit.sampling.heun import Heun
from diffusionkit.sampling.time_travel import TimeTravel

DOUBLE = torch.float64
MEAN, STD = 0.7, 0.4


def middle(sde):
    """Return the time of log-SNR 0."""
    return float(sde.time_at_log_snr(torch.zeros(1, dtype=DOUBLE)))


@pytest.mark.parametrize("predictor", [Ancestral(), DDIM(), Heun()], ids=str)
def test_edits_of_gaussian_data_in_closed_form(sde, predictor):
    model = GaussianMixtureModel(sde, [[MEAN]], [STD])
    sampler = PCSampler(model, predictor, steps=200, grid=LogSNRGrid())
    t = middle(sde)
    x0 = torch.full((4000, 1), 2.0, dtype=DOUBLE)
    x = sampler.edit(x0, t, generator=seeded())
    begun = sampler.times[sampler.times <= t][:1]
    alpha, sigma = (float(c) for c in sde.marginal(begun))
    total = (alpha * STD) ** 2 + sigma**2
    if isinstance(predictor, Ancestral):  # a draw from p(x0' | x_t), of gain k
        k = alpha * STD**2 / total
        std = math.sqrt((k * sigma) ** 2 + STD**2 * sigma**2 / total)
    else:  # the flow keeps quantiles
        k = STD / math.sqrt(total)
        std = k * sigma
    assert float(x.mean()) == pytest.approx(MEAN + k * alpha * (2.0 - MEAN), abs=0.03)
    assert float(x.std()) == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize("corrector", [None, AnnealedLangevin()])
def test_an_edit_runs_the_rest_of_the_grid(mixture, corrector):
    times = torch.tensor([0.9, 0.6, 0.4, 0.2], dtype=DOUBLE) * mixture.sde.T
    x0 = torch.randn(3, 2, generator=seeded(5), dtype=DOUBLE)
    sampler = PCSampler(mixture, Ancestral(), corrector, grid=times)
    for t, first in ((1.0, 0), (0.9, 0), (0.89, 1), (0.6, 1), (0.41, 2)):
        x = sampler.edit(x0, t * mixture.sde.T, generator=seeded())
        rest, generator = PCSampler(mixture, Ancestral(), corrector, grid=times[first:]), seeded()
        start = mixture.sde.perturb(x0, times[first].expand(3), generator=generator).x
        torch.testing.assert_close(x, rest(start, generator=generator))
        assert sampler.nfe == rest.nfe == (3 - first) * (1 if corrector is None else 2) + 1


def test_edits_from_small_times_keep_the_data(mixture):
    x0 = mixture.sample(50, generator=seeded(), dtype=DOUBLE)
    ends = mixture.sde.log_snr(torch.tensor([mixture.sde.t_stop], dtype=DOUBLE))
    sampler = PCSampler(mixture, DDIM(), steps=30, grid=LogSNRGrid())
    changes = [
        float((sampler.edit(x0, float(t), generator=seeded()) - x0).square().mean().sqrt())
        for t in mixture.sde.time_at_log_snr(torch.cat([0.9 * ends, ends / 2, -ends / 2]))
    ]
    assert all(a < b for a, b in itertools.pairwise(changes))
    assert changes[0] < 0.1
    assert changes[2] > 0.5


def test_edits_take_constraints_and_time_travel(mixture):
    x0 = torch.randn(3, 2, generator=seeded(5))
    constraint = Inpainting(x0, torch.tensor([1, 0]))
    sampler = PCSampler(
        mixture, Ancestral(), steps=10, constraint=constraint, time_travel=TimeTravel(4, 2)
    )
    x = sampler.edit(x0, 0.55 * mixture.sde.T, generator=seeded())
    assert torch.equal(x[:, 0], x0[:, 0])
    assert not torch.allclose(x[:, 1], x0[:, 1])
    steps = int((sampler.times <= 0.55 * mixture.sde.T).sum()) - 1
    assert sampler.nfe == 2 * steps + 1


def test_an_edit_depends_on_its_own_generator_and_restores_the_mode(mixture):
    x0 = torch.randn(3, 2, generator=seeded(5), requires_grad=True)
    mixture.train()
    sampler, t = PCSampler(mixture, Ancestral(), steps=8), 0.5 * mixture.sde.T
    whole = sampler.edit(x0, t, generator=[seeded(i) for i in range(3)])
    alone = sampler.edit(x0[1:2], t, generator=[seeded(1)])
    assert torch.equal(whole[1:2], alone)
    assert not whole.requires_grad
    assert mixture.training


@pytest.mark.parametrize(
    ("x0", "t", "error", "match"),
    [
        (torch.ones(2, 2), 0.0, ValueError, "t: expected a time of at least .* got 0.0"),
        (torch.ones(2, 2), float("nan"), ValueError, "t: expected .* got nan"),
        (torch.ones(2, 2), 2.0, ValueError, r"t: expected .* at most T"),
        (torch.ones(2, 2), None, TypeError, "t: expected a number"),
        (torch.full((2, 2), float("nan")), 0.5, ValueError, "x0: expected finite"),
        ([1.0], 0.5, TypeError, "x0: expected a tensor"),
    ],
)
def test_invalid_arguments_raise(mixture, x0, t, error, match):
    with pytest.raises(error, match=match):
        PCSampler(mixture, DDIM(), steps=4).edit(x0, t if t is None else t * mixture.sde.T)
