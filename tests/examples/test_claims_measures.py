"""What the claims measure: evaluations, noise and variances are those that the papers mean."""

from types import SimpleNamespace

import pytest
import torch

import diffusionkit as dk


def exact(sde, low=-0.5, high=0.5):
    """Stand for a run: an exact model of two points."""
    return SimpleNamespace(model=dk.GaussianMixtureModel(sde, [[low], [high]], [0.05, 0.05]))


@pytest.mark.parametrize("scale", ["small", "full"])
def test_samplers_of_a_budget_have_equal_evaluations_and_initial_noise(claims, scale):
    """P2000, PC1000 and C2000 of table 1: as many evaluations, and one to denoise at the end."""
    module = claims("correctors_at_equal_cost")
    run = exact(dk.VESDE(sigma_min=0.01, sigma_max=15.0))
    for predictor, _, _ in module.BUDGETS[scale]:
        first = []
        for kind in module.kinds(predictor):
            sampler = module.sampler(run, predictor, kind, 20)
            states = list(sampler.iterate((3, 1), generator=torch.Generator().manual_seed(0)))
            assert sampler.nfe == states[-1].nfe == 21, (predictor, kind)
            assert len(states) == (12 if kind == "PC" else 22)
            first.append(states[0].x)
        assert all(torch.equal(x, first[0]) for x in first)


def test_correctors_have_the_ratio_of_the_paper(claims):
    module = claims("correctors_at_equal_cost")
    run = exact(dk.VESDE(sigma_min=0.01, sigma_max=15.0))
    corrector = module.sampler(run, "reverse diffusion", "PC", 20).corrector
    assert (corrector.snr, corrector.norm, corrector.steps) == (0.16, "batch", 1)
    assert module.sampler(run, "reverse diffusion", "P", 20).corrector is None
