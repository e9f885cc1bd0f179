"""The probability flow of networks that jump between numbered noise levels, integrated exactly."""

import itertools
import math

import pytest
import torch

from diffusionkit import (
    EDMSDE,
    VESDE,
    DenoisedModel,
    EpsModel,
    ExactDivergence,
    IndexLabel,
    ODELikelihood,
    ProbabilityFlow,
    ScheduleTransformedModel,
    SubVPSDE,
)

LEVELS = torch.exp(torch.linspace(math.log(50.0), math.log(0.01), 10, dtype=torch.float64))
SLOPES = LEVELS / (1 + LEVELS**2)
DATA = torch.tensor([[0.3], [-1.0], [2.0]])
SDES = [VESDE(), EDMSDE(), SubVPSDE()]


def network(x, noise_label):
    """The noise at the nearest level, if the data are N(0, 1): linear in x in each level."""
    return x * SLOPES.to(x.dtype)[noise_label.long()].view(-1, 1)


def closed_form(sde):
    """Return alpha and sigma at both ends, and the integral of the slopes.

    In y = x / alpha and u = sigma / alpha the flow is dy / du = eps(x) = alpha c y. With alpha = 1,
    or a network that gets x / alpha, log y grows by the sum of c du.
    """
    alpha, sigma = sde.marginal(torch.tensor([sde.t_min, sde.T], dtype=torch.float64))
    low, high = (sigma / alpha).tolist()
    middle = torch.sqrt(LEVELS[1:] * LEVELS[:-1]).tolist()
    ends = [low, *sorted(u for u in middle if low < u < high), high]
    total = 0.0
    for first, last in itertools.pairwise(ends):
        log = 0.5 * (math.log(max(first, 1e-9)) + math.log(last))
        level = int((LEVELS.log() - log).abs().argmin())
        total += float(SLOPES[level]) * (last - first)
    return alpha, total


def numbered(sde):
    """A model of any process with the closed form: a VE model with the time changed."""
    inner = EpsModel(network, VESDE(1e-7, 1e3), label=IndexLabel(LEVELS))
    return ScheduleTransformedModel(inner, sde)


def likelihood(sde):
    alpha, total = closed_form(sde)
    latent = DATA.double() * math.exp(total) * alpha[1] / alpha[0]
    return sde.prior_log_prob(latent) + total + math.log(alpha[1] / alpha[0]), latent


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_likelihoods_of_numbered_levels(sde):
    expected, latent = likelihood(sde)
    got = ODELikelihood(numbered(sde), divergence=ExactDivergence())(DATA)
    torch.testing.assert_close(got.log_prob, expected, rtol=0, atol=3e-4)
    torch.testing.assert_close(got.latent.double(), latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dopri8", "rk4"])
def test_every_solver_stops_at_jumps(method):
    # Without stops these are off by .0001 (in 4,096 evaluations) and .1.
    sde, model = VESDE(), EpsModel(network, VESDE(), label=IndexLabel(LEVELS))
    got = ODELikelihood(model, divergence=ExactDivergence(), method=method)(DATA)
    expected, _ = likelihood(sde)
    torch.testing.assert_close(got.log_prob, expected, rtol=0, atol=3e-3)
    assert got.nfe < 600


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_samples_and_codes_of_numbered_levels(sde):
    alpha, total = closed_form(sde)
    flow = ProbabilityFlow(DenoisedModel(numbered(sde), lambda x0: x0))
    code = flow.encode(DATA)
    factor = math.exp(total) * float(alpha[1] / alpha[0])
    torch.testing.assert_close(code, DATA * factor, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(flow.decode(code), DATA, rtol=1e-3, atol=1e-4)
