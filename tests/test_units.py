"""Weights that are 1 of a model's own output, and subclasses of which that is not true."""

from dataclasses import dataclass

import pytest
import torch
from support import seeded

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EDMModel,
    EDMWeighting,
    EpsModel,
    FlowMatchingSDE,
    ImportanceTimes,
    LikelihoodWeighting,
    LogNormalTimes,
    LogSigmaLabel,
    ScaledScoreModel,
    ScoreMatching,
    SimpleWeighting,
    UniformTimes,
    VelocityModel,
    VelocityWeighting,
    Weighting,
)

X = torch.randn(6, 3, 2, dtype=torch.float64, generator=seeded())
T = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


def network(x, noise_label):
    return 0.3 * x + noise_label.view(-1, 1, 1)


def losses(weighting, model, t=T):
    return ScoreMatching(weighting)(model, X, t=t, generator=seeded(1))


class Computed(Weighting):
    """The weights of another weighting, computed."""

    def __init__(self, weighting):
        self.weighting = weighting

    def __call__(self, sde, t):
        return self.weighting(sde, t)


PAIRS = [
    (SimpleWeighting(), EpsModel(network, VPSDE())),
    (SimpleWeighting(), ScaledScoreModel(network, VESDE())),
    (EDMWeighting(), EDMModel(network, EDMSDE())),
    (EDMWeighting(0.7), EDMModel(network, VPSDE(), 0.7)),
    (EDMWeighting([0.4, 0.5, 0.9]), EDMModel(network, VPSDE(), [0.4, 0.5, 0.9])),
    (VelocityWeighting(), VelocityModel(network, FlowMatchingSDE())),
]


@pytest.mark.parametrize(("weighting", "model"), PAIRS)
def test_a_weight_of_1_is_the_weight_that_is_computed(weighting, model) -> None:
    found, computed = losses(weighting, model), losses(Computed(weighting), model)
    if isinstance(getattr(weighting, "sigma_data", None), tuple):  # `Computed` has no channels
        computed = losses(Weighted(weighting.sigma_data), model)
    torch.testing.assert_close(found, computed, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("weighting", "model"), PAIRS)
def test_a_weight_of_1_is_not_computed(weighting, model, monkeypatch) -> None:
    monkeypatch.setattr(type(weighting), "__call__", None)
    assert bool(losses(weighting, model).isfinite().all())


class Weighted(EDMWeighting):
    """EDM's weights, computed in a subclass."""

    def __call__(self, sde, t):
        return super().__call__(sde, t)


class Twice:
    def __call__(self, sde, t):
        return 2 * super().__call__(sde, t)


@pytest.mark.parametrize(("weighting", "model"), PAIRS)
def test_a_subclass_has_its_own_weights(weighting, model) -> None:
    class Own(type(weighting)):
        def __call__(self, sde, t):
            return 2 * super().__call__(sde, t)

    class Mixed(Twice, type(weighting)):
        pass

    class Inherited(Mixed):
        pass

    arguments = vars(weighting)
    for kind in (Own, Mixed, Inherited):
        torch.testing.assert_close(
            losses(kind(**arguments), model), 2 * losses(weighting, model), rtol=1e-12, atol=0.0
        )


def test_a_subclass_that_keeps_the_weights_is_not_computed_either(monkeypatch) -> None:
    @dataclass(frozen=True)
    class Named(EDMWeighting):
        name: str = ""

    model = EDMModel(network, VPSDE())
    expected = losses(EDMWeighting(), model)
    monkeypatch.setattr(EDMWeighting, "__call__", None)
    torch.testing.assert_close(losses(Named(name="a"), model), expected, rtol=0, atol=0)


def test_a_subclass_has_its_own_parameterization() -> None:
    """A network of x0: the weight of EDM on its error is (s^2 + sd^2) / (s sd)^2."""

    class OfData(EDMModel):
        def parameterization(self, alpha, sigma):
            return 1.0, 0.0

    model = OfData(network, EDMSDE())
    t = 0.5 + T
    sample = EDMSDE().perturb(X, t, generator=seeded(1))
    outputs = model.predict(sample.x, t).output
    weight = (t**2 + 0.25) / (0.5 * t) ** 2
    expected = (outputs - X).square().mean((1, 2)) * weight
    torch.testing.assert_close(losses(EDMWeighting(), model, t), expected, rtol=1e-12, atol=0.0)


def test_the_weight_of_other_data_is_computed() -> None:
    """Of sd' in the weights and sd in the model: (1 + s^2 / sd'^2) / (1 + s^2 / sd^2)."""
    model, t = EDMModel(network, EDMSDE()), 0.5 + T
    ratio = (1 + t**2 / 0.49) / (1 + t**2 / 0.25)
    expected = losses(EDMWeighting(), model, t) * ratio
    torch.testing.assert_close(losses(EDMWeighting(0.7), model, t), expected)


def test_a_weight_of_1_is_one_at_the_end_without_signal() -> None:
    """Where that of the noise is infinite and the error of the noise vanishes."""
    model, end = VelocityModel(network, FlowMatchingSDE()), torch.ones(6, dtype=torch.float64)
    sample = FlowMatchingSDE().perturb(X, end, generator=seeded(1))
    outputs = model.predict(sample.x, end).output
    expected = (outputs - sample.eps + X).square().mean((1, 2))
    torch.testing.assert_close(losses(VelocityWeighting(), model, end), expected)


class Process(VPSDE):
    """VP with a diffusion coefficient of its own."""

    calls = 0

    def diffusion(self, t):
        type(self).calls += 1
        return 2 * super().diffusion(t)


def test_importance_sampling_evaluates_the_diffusion_once() -> None:
    """Its weights are those of the likelihood over their mean: all losses have the same weight."""
    sde = Process()
    model, times = EpsModel(network, sde), ImportanceTimes()
    objective = ScoreMatching(LikelihoodWeighting(), times=times)
    found = objective(model, X, generator=seeded(1))
    before = Process.calls
    torch.testing.assert_close(objective(model, X, generator=seeded(1)), found, rtol=0, atol=0)
    assert Process.calls == before + 1
    plain = ScoreMatching(times=times)(model, X, generator=seeded(1))
    t, weight = times.sample(sde, 6, generator=seeded(1), dtype=torch.float64)
    weighted = weight * LikelihoodWeighting()(sde, t)
    torch.testing.assert_close(found / plain, weighted / weight, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(weighted, weighted[:1].expand(6), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), EDMSDE(), FlowMatchingSDE()])
def test_labels_of_a_loss_are_those_of_its_times(sde) -> None:
    """Computed there from alpha and sigma that are known."""
    seen = []

    def spying(x, noise_label):
        seen.append(noise_label)
        return 0 * x

    label = LogSigmaLabel(0.3, reference=2.0)
    times = torch.linspace(sde.t_min + 0.01, 0.99 * sde.T, 6, dtype=torch.float64)
    ScoreMatching()(EpsModel(spying, sde, label=label), X, t=times)
    expected = -0.5 * 0.3 * sde.log_snr(times) - 0.3 * torch.tensor(2.0).log()
    torch.testing.assert_close(seen[-1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_times_are_those_of_torch(dtype) -> None:
    sde = VPSDE(t_min=0.1)
    t, _ = UniformTimes().sample(sde, 50, generator=seeded(2), dtype=dtype)
    u = torch.rand(50, generator=seeded(2), dtype=dtype)
    torch.testing.assert_close(t, 0.1 + 0.9 * u)
    t, _ = LogNormalTimes().sample(EDMSDE(), 50, generator=seeded(2), dtype=dtype)
    z = torch.randn(50, generator=seeded(2), dtype=dtype)
    torch.testing.assert_close(t, torch.exp(1.2 * z - 1.2).clamp(0.002, 80.0))
