"""Sampling along chains, and the processes that they discretize."""

import itertools

import pytest
import torch
from support import seeded
from support.gaussian_runs import distribution_after

from diffusionkit import DDIM, VESDE, VPSDE, Ancestral, PCSampler, ReverseDiffusion, StepLabel
from diffusionkit.models import EpsModel
from diffusionkit.sde.ddpm_chain import DDPMChain
from diffusionkit.sde.smld_chain import SMLDChain

PREDICTORS = [Ancestral(), Ancestral(variance="model"), DDIM(), DDIM(eta=0.5), DDIM(eta=1.0)]


@pytest.mark.parametrize("spec", ["ddim20", 20, [5, 15]])
@pytest.mark.parametrize("predictor", PREDICTORS, ids=repr)
def test_a_respaced_run_equals_a_chain_of_new_betas(spec, predictor) -> None:
    """A subsequence of the chain, and a chain with betas 1 - abar_i / abar_{i-1}."""
    chain = DDPMChain.cosine(400)
    grid = chain.respaced(spec)
    network = lambda x, noise_label: torch.cat([0.5 * x, torch.tanh(x)], 1)  # noqa: E731
    short = DDPMChain.from_alphas_bar(chain.marginal(grid.flip(0))[0] ** 2)
    x = torch.randn((6, 3), generator=seeded(1), dtype=torch.float64)
    runs = [
        PCSampler(EpsModel(network, sde, variance="learned_range"), predictor, grid=times)(
            x, generator=seeded()
        )
        for sde, times in ((chain, grid), (short, short.respaced(20)))
    ]
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


def test_the_network_gets_the_original_step() -> None:
    chain, steps = DDPMChain.linear(100), []

    def network(x, noise_label):
        steps.append(float(noise_label[0]))
        return x

    model = EpsModel(network, chain, label=StepLabel(100))
    PCSampler(model, Ancestral(), grid=chain.respaced("ddim5"))((1, 2))
    assert steps == pytest.approx([80, 60, 40, 20, 0], abs=1e-9)


PAIRS = {
    "ddpm": (DDPMChain.linear, VPSDE(), 0.05),
    "smld": (SMLDChain.geometric, VESDE(sigma_min=0.01, sigma_max=50.0), 0.5),
}


@pytest.mark.parametrize("predictor", [Ancestral(), ReverseDiffusion(), DDIM(eta=1.0)], ids=repr)
@pytest.mark.parametrize("kind", PAIRS)
def test_samples_of_a_chain_converge_to_those_of_its_limit(kind, predictor) -> None:
    """The difference is of the order of a step."""
    make, limit, end = PAIRS[kind]

    def difference(steps):
        times = torch.arange(steps, steps * end - 1, -1, dtype=torch.float64) / steps
        chain, sde = (distribution_after(sde, predictor, times) for sde in (make(steps), limit))
        return float((chain - sde).abs().max())

    differences = [difference(steps) for steps in (1000, 2000, 4000)]
    assert differences[0] < 0.01
    for coarse, fine in itertools.pairwise(differences):
        assert coarse / fine == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("predictor", [Ancestral(), ReverseDiffusion(), DDIM(eta=0.5)], ids=repr)
def test_smld_equals_ve_on_the_papers_grid(predictor) -> None:
    """Step i of N has the noise of VE at i / (N - 1)."""
    network, chain = torch.nn.Hardtanh(), SMLDChain.geometric(40)
    runs = [
        PCSampler(EpsModel(lambda x, noise_label: network(x / 9), sde), predictor, grid=grid)(
            (5, 3), generator=seeded(), dtype=torch.float64
        )
        for sde, grid in (
            (chain, chain.respaced(40)),
            (VESDE(0.01, 50.0), torch.linspace(1, 0, 40, dtype=torch.float64)),
        )
    ]
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)
