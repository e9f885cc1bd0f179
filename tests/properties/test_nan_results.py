"""A run that ends in NaN or infinity says so, whichever part makes it."""

import math

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    DDIM,
    NELBO,
    VESDE,
    VPSDE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    ChainNELBO,
    Clip,
    DDPMChain,
    DenoisedModel,
    DiscreteNELBO,
    DPMSolver2M,
    EDMModel,
    EpsModel,
    Heun,
    Hutchinson,
    Langevin,
    ODELikelihood,
    PCSampler,
    ProbabilityFlow,
    RawScoreModel,
    ReverseDiffusion,
    ScoreMatching,
    TimeTravel,
    VModel,
    X0Model,
    clipped_step,
    ddim_encode,
)

X, IMAGES = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)


class Broken(nn.Module):
    """A network with some outputs that are not finite, at small times only."""

    def __init__(self, value: float, until: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.value, self.until = value, until

    def forward(self, x, noise_label):
        bad = torch.zeros_like(x)
        bad[-1] = torch.where(noise_label[-1] < 1000 * self.until, self.value, 0.0)
        return self.scale * 0.5 * x + bad


RUNS = {
    "ancestral": lambda m: PCSampler(m, Ancestral(), steps=4)((2, 3)),
    "state": lambda m: PCSampler(m, DDIM(), steps=4)(X),
    "no denoising": lambda m: PCSampler(m, DDIM(), steps=4, denoise=False)(X),
    "half": lambda m: PCSampler(m, DDIM(), steps=4)(X.half()),
    "multistep": lambda m: PCSampler(m, DPMSolver2M(), steps=4)(X),
    "two stages": lambda m: PCSampler(m, Heun(), steps=4)(X),
    "adaptive": lambda m: PCSampler(m, AdaptiveSDE(rtol=0.5, atol=0.5), steps=1)(X),
    "corrector": lambda m: PCSampler(m, ReverseDiffusion(), Langevin(norm="batch"), steps=4)(X),
    "annealed": lambda m: PCSampler(m, None, AnnealedLangevin(), steps=4)(X),
    "clipped": lambda m: PCSampler(DenoisedModel(m, Clip()), DDIM(), steps=4)(X),
    "edit": lambda m: PCSampler(m, DDIM(), steps=4).edit(X, 0.6),
    "travel": lambda m: PCSampler(m, Ancestral(), steps=4, time_travel=TimeTravel(2, 2))(X),
    "iterate": lambda m: list(PCSampler(m, DDIM(), steps=4).iterate(X)),
    "iterate without denoising": lambda m: list(
        PCSampler(m, DDIM(), steps=4, denoise=False).iterate(X)
    ),
    "flow": lambda m: ProbabilityFlow(m, rtol=0.1, atol=0.1).sample((2, 3)),
    "encode": lambda m: ProbabilityFlow(m, rtol=0.1, atol=0.1).encode(X),
    "decode": lambda m: ProbabilityFlow(m, rtol=0.1, atol=0.1).decode(X),
    "ddim_encode": lambda m: ddim_encode(m, X, steps=4),
    "likelihood": lambda m: ODELikelihood(m, rtol=0.1, atol=0.1)(X),
    "bound": lambda m: NELBO(m, samples=4)(X),
    "bound with a divergence": lambda m: NELBO(m, samples=4, divergence=Hutchinson())(X),
    "discrete bound": lambda m: DiscreteNELBO(m)(IMAGES),
}
EARLY = [name for name in RUNS if "bound" not in name and name not in ("edit", "corrector")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", RUNS)
def test_a_broken_network_is_noticed(name, value) -> None:
    if name == "clipped" and value == math.inf:
        value = math.nan  # an infinity can be clipped
    with pytest.raises(ValueError, match=r": expected .*finite .*NaN or infinity"):
        RUNS[name](EpsModel(Broken(value), VPSDE()))


@pytest.mark.parametrize("name", EARLY)
def test_a_network_that_is_broken_near_the_data_only_is_noticed(name) -> None:
    model = EpsModel(Broken(math.nan, 0.3), VPSDE())
    with pytest.raises(ValueError, match=r": expected .*finite .*NaN or infinity"):
        RUNS[name](model)


def test_a_broken_network_of_a_chain_is_noticed() -> None:
    with pytest.raises(ValueError, match="model: expected a finite prediction"):
        ChainNELBO(EpsModel(Broken(math.nan), DDPMChain.linear(30)))(IMAGES)


def test_a_loss_that_is_not_finite_is_skipped_by_the_optimizer_step() -> None:
    model = EpsModel(Broken(math.nan), VPSDE())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ScoreMatching()(model, X).mean().backward()
    assert clipped_step(optimizer).skipped
    assert float(model.network.scale.detach()) == 1.0


@pytest.mark.parametrize("kind", [EpsModel, X0Model, VModel, RawScoreModel])
def test_a_state_that_float16_does_not_hold_is_refused(kind) -> None:
    """In sampling and in training; with bfloat16, or a scaled input, it is right."""
    sde, x0 = VESDE(sigma_max=1e6), torch.zeros(64, 3)

    def asks(model):
        yield lambda: PCSampler(model, Ancestral(), steps=3)((64, 3), generator=seeded())
        yield lambda: ScoreMatching()(model, x0, generator=seeded(), t=torch.ones(64))

    for ask in asks(kind(Broken(0.0).half(), sde)):
        with pytest.raises(ValueError, match="x: expected numbers that float16 holds"):
            ask()
    for model in (kind(Broken(0.0).bfloat16(), sde), EDMModel(Broken(0.0).half(), sde)):
        for ask in asks(model):
            assert bool(torch.isfinite(ask()).all())


def test_results_that_float16_does_not_hold_are_refused() -> None:
    sde = VESDE(sigma_max=1e6)
    model = EDMModel(Broken(0.0), sde)
    for ask in (
        lambda: sde.prior_sample((64, 3), dtype=torch.float16),
        lambda: ProbabilityFlow(model, rtol=0.1, atol=0.1).encode(10 + X.half()),
        lambda: ddim_encode(model, 10 + X.half(), steps=3),
    ):
        with pytest.raises(ValueError, match=r": expected numbers that float16 holds, .*got"):
            ask()
    samples = PCSampler(model, Ancestral(), steps=3)((64, 3), dtype=torch.float16)
    assert samples.dtype == torch.float16  # the state at T is not
