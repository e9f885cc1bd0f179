"""Predictors around another one have its set-up, tables, grid and name, and keep its tables."""

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, ClassModel
from support.pretend_device import PretendDevice

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    VPSDE,
    AnalyticFirstStep,
    ClassifierFreeGuidance,
    DDPMChain,
    EpsModel,
    GuidanceMomentum,
    Heun,
    LogSNRSDE,
    PCSampler,
    SMLDChain,
    TangentGrid,
    UniPC,
    VelocityAdams,
)
from diffusionkit._grid_times import Grid
from diffusionkit.sampling import WrappedPredictor

WRAPPERS = {
    "first step": AnalyticFirstStep,
    "mean": lambda part: AnalyticFirstStep(part, torch.tensor([0.5, -1.0], dtype=DOUBLE)),
    "momentum": GuidanceMomentum,
    "both": lambda part: AnalyticFirstStep(GuidanceMomentum(part, 0.25), 0.5),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


@pytest.fixture
def builds(monkeypatch):
    """Return a list that grows with every table that is made."""
    made, keep = [], Grid.keep

    def counting(self, owner, name, make):
        return keep(self, owner, name, lambda: (made.append(name), make())[1])

    monkeypatch.setattr(Grid, "keep", counting)
    return made


def guided(sde):
    return ClassifierFreeGuidance(ClassModel(sde), 2.0, null={"class_labels": 2})


def samples(sampler, n=3):
    labels = torch.arange(n) % 2
    return sampler(torch.ones(n, 2, dtype=DOUBLE), generator=seeded(), class_labels=labels)


@pytest.mark.parametrize("part", [DEIS(), UniPC(), VelocityAdams(corrected=True), Heun()], ids=str)
def test_tables_are_made_once(wrap, part, builds):
    sampler = PCSampler(guided(VPSDE()), wrap(part), steps=6)
    assert builds
    builds.clear()
    first = samples(sampler)
    assert torch.equal(samples(sampler), first)
    samples(sampler, 5)  # other time tensors, the same coefficients
    assert not builds
    fresh = PCSampler(guided(VPSDE()), wrap(part), steps=6)
    assert torch.equal(samples(fresh), first)


@pytest.mark.parametrize(
    "sde", [DDPMChain.cosine(20), SMLDChain.geometric(20), LogSNRSDE(), EDMSDE()], ids=repr
)
def test_every_process_that_cannot_change_keeps_its_tables(sde, builds):
    model = EpsModel(lambda x, noise_label: 0.1 * x, sde)
    sampler = PCSampler(model, DEIS(), steps=6)
    assert builds
    builds.clear()
    for _ in range(2):
        sampler(torch.ones(3, 2))
    assert not builds


def test_a_chain_that_is_learned_keeps_none(builds):
    class Own(DDPMChain):
        """A subclass, whose schedule may change."""

    model = EpsModel(lambda x, noise_label: 0.1 * x, Own.cosine(20))
    sampler = PCSampler(model, DEIS(), steps=6)
    builds.clear()
    sampler(torch.ones(3, 2))
    assert builds


def test_where_a_chain_stops_may_change():
    model = EpsModel(lambda x, noise_label: 0.1 * x, DDPMChain.cosine(20))
    sampler = PCSampler(model, DDIM(), steps=6)
    sampler(torch.ones(3, 2))
    model.sde.t_min = 0.3
    assert sampler.times[-1].item() == pytest.approx(0.3)


def test_tables_of_a_predictor_that_may_change_are_made_anew(wrap):
    class Own(DEIS):
        share = 1.0

        def correction(self, *args):
            return [self.share * w for w in super().correction(*args)]

    part = Own()
    sampler = PCSampler(guided(VPSDE()), wrap(part), steps=6)
    before = samples(sampler)
    Own.share = 0.5
    assert not torch.equal(samples(sampler), before)
    sampler.predictor = wrap(DEIS())
    fresh = PCSampler(guided(VPSDE()), wrap(DEIS()), steps=6)
    assert torch.equal(samples(sampler), samples(fresh))


def test_the_grid_and_the_checks_are_those_of_the_predictor(wrap):
    assert torch.equal(PCSampler(guided(VPSDE()), wrap(DEIS()), steps=6).times,
                       TangentGrid()(VPSDE(), 6))  # fmt: skip
    assert wrap(DDIM()).default_grid(VPSDE(), 6) is None
    with pytest.raises(ValueError, match="grid: expected at least 2 steps for DEIS"):
        PCSampler(guided(VPSDE()), wrap(DEIS()), steps=1)
    with pytest.raises(TypeError, match="predictor: expected a Predictor, got"):
        wrap("DEIS")


def test_names():
    inner = GuidanceMomentum(DDIM(), 0.25)
    assert repr(inner) == "GuidanceMomentum(DDIM(eta=0.0), factor=0.25)"
    assert repr(AnalyticFirstStep(inner)) == f"AnalyticFirstStep({inner!r}, x0=0.0)"
    assert inner == GuidanceMomentum(DDIM(), 0.25)
    assert inner != GuidanceMomentum(DDIM(), 0.5)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("x0", [0.5, torch.tensor([0.5, -1.0], dtype=DOUBLE)], ids=["c", "mean"])
def test_a_mean_is_copied_to_a_device_once(kind, x0):
    predictor, part = DEIS(), AnalyticFirstStep(DEIS(), x0)
    with PretendDevice(kind) as device:
        model, counts = EpsModel(lambda x, noise_label: 0.1 * x, VPSDE()), []
        x = torch.ones(3, 2).to(kind)
        for one in (predictor, part):
            sampler = PCSampler(model, one, steps=4)
            sampler(x)
            with device.watched() as events:
                found = sampler(x)
            counts.append(sum(events.values()))
        assert found.device.type == kind
    assert counts[1] == counts[0]


def test_a_wrapper_of_ones_own(builds):
    """A base for extension: a frozen dataclass with a step."""
    import dataclasses

    @dataclasses.dataclass(frozen=True, repr=False)
    class Shrunk(WrappedPredictor):
        factor: float = 0.5

        def step(self, model, x, t, s, state=None, /, *, generator=None, **cond):
            step = self.predictor.step(model, x, t, s, state, generator=generator, **cond)
            return dataclasses.replace(step, x=self.factor * step.x)

    model = EpsModel(lambda x, noise_label: 0.1 * x, VPSDE())
    x = torch.ones(2, 2)
    plain, shrunk = (PCSampler(model, p, steps=2, denoise=False) for p in (DDIM(), Shrunk(DDIM())))
    builds.clear()
    torch.testing.assert_close(shrunk(x), 0.25 * plain(x))
    assert not builds
    assert repr(Shrunk(DDIM())) == "Shrunk(DDIM(eta=0.0), factor=0.5)"
