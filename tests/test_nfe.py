"""Counts of evaluations: every definition of `predict`, guidance, and threads."""

import threading

import pytest
import torch
from torch import nn

from diffusionkit import (
    DDIM,
    VPSDE,
    ClassifierFreeGuidance,
    EpsModel,
    GaussianMixtureModel,
    Heun,
    ODELikelihood,
    PCSampler,
    Prediction,
    ScoreModel,
)


class ZeroNoise:
    """A mixin that does not derive from ScoreModel."""

    def predict(self, x, t, **cond):
        return Prediction.from_eps(x, torch.zeros_like(x), *self.sde.marginal(t))


class Zero(ScoreModel):
    def __init__(self):
        super().__init__()
        self.sde = VPSDE()

    predict = ZeroNoise.predict


class FromMixin(ZeroNoise, ScoreModel):
    def __init__(self):
        super().__init__()
        self.sde = VPSDE()


class Inherited(Zero):
    """A class that inherits predict."""


class CallsSuper(Zero):
    def predict(self, x, t, **cond):
        return super().predict(x, t, **cond)


class MixedOver(ZeroNoise, CallsSuper):
    """A mixin in front of a class that counts."""


class Decorated(ScoreModel):
    def __init__(self):
        super().__init__()
        self.sde = VPSDE()

    @torch.no_grad()
    def predict(self, x, t, **cond):
        return ZeroNoise.predict(self, x, t)


MODELS = [Zero, FromMixin, Inherited, CallsSuper, MixedOver, Decorated]


@pytest.mark.parametrize("model", MODELS)
def test_every_definition_of_predict_counts_once(model):
    sampler = PCSampler(model(), DDIM(), steps=5)
    sampler((2, 1))
    assert sampler.nfe == 6  # and one to denoise
    states = list(sampler.iterate((2, 1)))
    assert [state.nfe for state in states] == [0, 1, 2, 3, 4, 5, 6]
    assert all(state.x0 is not None for state in states[1:])
    assert ODELikelihood(model(), method="euler")(torch.zeros(1, 1)).nfe > 10


def test_abstract_models_stay_abstract():
    class Abstract(ScoreModel):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Abstract()


def test_guidance_counts_as_the_evaluations_it_makes():
    model = EpsModel(lambda x, noise_label, class_labels=None: 0 * x, VPSDE())
    sampler = PCSampler(ClassifierFreeGuidance(model, 2.0), Heun(), steps=3)
    sampler((2, 1), class_labels=torch.tensor([0, 1]))
    assert sampler.nfe == 2 * (2 * 3 + 1)


def test_threads_that_share_a_model_count_their_own_evaluations():
    barrier = threading.Barrier(2, timeout=60)

    class Network(nn.Module):
        def forward(self, x, noise_label):
            barrier.wait()  # evaluations of both threads alternate
            return 0 * x

    model = EpsModel(Network(), VPSDE()).eval()
    samplers = [PCSampler(model, DDIM(), steps=steps, denoise=False) for steps in (4, 4)]
    inner = PCSampler(GaussianMixtureModel(VPSDE(), [[0.0]], [1.0]), DDIM(), steps=7)

    def second():
        inner((1, 1))
        samplers[1]((2, 1))

    threads = [
        threading.Thread(target=samplers[0], args=((2, 1),)),
        threading.Thread(target=second),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [sampler.nfe for sampler in (*samplers, inner)] == [4, 4, 8]
