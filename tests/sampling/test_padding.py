"""Sampling padded data: what is known of the padding, that it is 0, keeps the rest right."""

import pytest
import torch

from diffusionkit import (
    DDIM,
    VESDE,
    VPSDE,
    Ancestral,
    DenoisedModel,
    FlowMatchingSDE,
    Heun,
    Langevin,
    PCSampler,
    Prediction,
    ScoreModel,
)

KEPT, ALL, STD = 10, 210, 0.5
MASK = torch.arange(ALL) < KEPT


class Padded(ScoreModel):
    """N(0, STD^2 I) in the first numbers, and no noise predicted in the padding."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde

    def predict(self, x, t, /, **cond):
        alpha, sigma = (c.view(-1, 1).to(x.dtype) for c in self.sde.marginal(t.double()))
        x0 = alpha * STD**2 * x / (alpha**2 * STD**2 + sigma**2)
        noise = sigma * x / (alpha**2 * STD**2 + sigma**2)
        eps = torch.where(MASK, noise, torch.zeros_like(x))
        x0 = torch.where(MASK, x0, x)
        return Prediction(x, x0, eps, alpha.flatten(), sigma.flatten())


def wrapped(sde):
    return DenoisedModel(Padded(sde), lambda x0: x0.masked_fill(~MASK, 0.0))


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=20.0), FlowMatchingSDE()])
def test_langevin_steps_keep_the_distribution_beside_padding(sde):
    """Without the wrapper its norms miss the padding, and its steps are too long."""
    draw = torch.Generator().manual_seed(0)
    t = torch.full((400,), 0.3)
    alpha, sigma = (float(c[0]) for c in sde.marginal(t.double()))
    right = (alpha**2 * STD**2 + sigma**2) ** 0.5
    found = []
    for model in (wrapped(sde), Padded(sde)):
        x = right * torch.randn(400, ALL, generator=draw)
        x[:, KEPT:] *= sigma / right
        x = Langevin(snr=0.16, steps=150).step(model, x, t, generator=draw).x
        found.append((float(x[:, :KEPT].std()), float(x[:, KEPT:].std())))
    assert found[0][0] == pytest.approx(right, rel=0.05)
    assert found[0][1] == pytest.approx(sigma, rel=0.05)
    assert found[1][0] > 1.2 * right


@pytest.mark.parametrize("sde", [VPSDE(), FlowMatchingSDE()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("predictor", [DDIM(), Heun(), Ancestral()], ids=lambda p: type(p).__name__)
def test_samples_are_0_in_the_padding_and_right_beside_it(predictor, sde):
    grid = torch.linspace(0.999 * sde.T, sde.t_stop, 161)
    sampler = PCSampler(wrapped(sde), predictor, grid=grid)
    x = sampler((300, ALL), generator=torch.Generator().manual_seed(0))
    assert bool((x[:, KEPT:] == 0).all())
    assert float(x[:, :KEPT].std()) == pytest.approx(STD, rel=0.1)
