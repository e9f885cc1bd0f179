"""Gradients through the probability flow."""

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EpsModel,
    ExactDivergence,
    Hutchinson,
    ODELikelihood,
    ProbabilityFlow,
    SubVPSDE,
)


class Gaussian(nn.Module):
    """The exact noise predictor of N(0, s^2), with dropout that is off in evaluation mode."""

    def __init__(self, sde, s=0.7):
        super().__init__()
        self.sde, self.s = sde, nn.Parameter(torch.tensor(s, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t):
        alpha, sigma = self.sde.marginal(t.double())
        return self.dropout((sigma / ((alpha * self.s) ** 2 + sigma**2)).view(-1, 1) * x)


SDES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()]
X = torch.tensor([[0.4, -0.1], [-1.2, 0.3], [2.0, 1.0]], dtype=torch.float64)


def model_of(sde):
    return EpsModel(Gaussian(sde), sde, label=lambda sde, t: t)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "divergence", [ExactDivergence(), Hutchinson()], ids=["exact", "hutchinson"]
)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_of_a_log_likelihood(sde, divergence, method):
    """log N(x; 0, V), V = alpha^2 s^2 + sigma^2 at t_min: -x / V, and by s in closed form."""
    model, x = model_of(sde), X.clone().requires_grad_()
    flow = ODELikelihood(
        model, divergence=divergence, method=method, rtol=1e-7, atol=1e-7, differentiable=True
    )
    value = flow(x, generator=seeded()).log_prob
    alpha, sigma = (float(c) for c in sde.marginal(torch.tensor([sde.t_min], dtype=torch.float64)))
    s = 0.7
    variance = (alpha * s) ** 2 + sigma**2
    by_x, by_s = torch.autograd.grad(value.sum(), [x, model.network.s])
    tolerance = {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(by_x, -X / variance, **tolerance)
    right = (X.square() / variance**2 - 1 / variance).sum() * alpha**2 * s
    # Of the prior N(0, prior_std^2), which is not exactly the model's distribution at T.
    torch.testing.assert_close(by_s, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_gradients_of_codes_and_samples(sde):
    """The flow is linear: z = c x, c the ratio of the standard deviations at both ends."""
    model = model_of(sde)
    flow = ProbabilityFlow(model, rtol=1e-8, atol=1e-8, differentiable=True, denoise=False)
    x = X.clone().requires_grad_()

    def std(t):
        alpha, sigma = sde.marginal(torch.tensor([t], dtype=torch.float64))
        return torch.sqrt((alpha * model.network.s) ** 2 + sigma**2)

    ratio = (std(sde.t_min) / std(sde.T)).squeeze()
    (right,) = torch.autograd.grad(ratio, model.network.s)
    for run in (flow.decode, flow.sample):
        y = run(x)
        by_x, by_s = torch.autograd.grad(y.sum(), [x, model.network.s])
        torch.testing.assert_close(by_x, ratio.detach().expand_as(by_x), rtol=1e-4, atol=0)
        torch.testing.assert_close(by_s, right * X.sum(), rtol=1e-4, atol=1e-9)
    (by_x,) = torch.autograd.grad(flow.encode(x).sum(), [x])
    torch.testing.assert_close(by_x, (1 / ratio).detach().expand_as(by_x), rtol=1e-4, atol=0)
    assert model.training


def test_without_the_option_nothing_is_recorded():
    model = model_of(VPSDE())
    x = X.clone().requires_grad_()
    assert not ODELikelihood(model)(x, generator=seeded()).log_prob.requires_grad
    assert not ProbabilityFlow(model).encode(x).requires_grad
    with torch.no_grad():
        found = ODELikelihood(model, differentiable=True)(x, generator=seeded())
    assert not found.log_prob.requires_grad
