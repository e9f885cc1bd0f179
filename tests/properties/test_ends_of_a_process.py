"""Losses where alpha or sigma is 0: the finite limits of weight times error."""

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    NELBO,
    VLB,
    VPSDE,
    DDPMChain,
    DiscreteTimes,
    EDMModel,
    EDMWeighting,
    EmpiricalModel,
    EpsModel,
    FlowMatchingSDE,
    ForwardSDE,
    GaussianDecoder,
    GaussianMixtureModel,
    Hutchinson,
    HybridLoss,
    ImportanceTimes,
    KarrasGrid,
    LikelihoodWeighting,
    LogSNRGrid,
    MinSNRWeighting,
    ODELikelihood,
    PCSampler,
    Prediction,
    RawScoreModel,
    ScaledScoreModel,
    ScheduleTransformedModel,
    ScoreMatching,
    SimpleWeighting,
    SubVPSDE,
    TargetEstimator,
    TimeLabel,
    VelocityWeighting,
    VModel,
    X0Model,
)
from diffusionkit.testing import check_sde

FLOW = FlowMatchingSDE()


class Trigonometric(ForwardSDE):
    def marginal(self, t):
        return torch.sin(0.5 * torch.pi * (1 - t)), torch.sin(0.5 * torch.pi * t)


TO_NOISE = {
    "chain": DDPMChain.linear(1000).zero_terminal_snr(),
    "short chain": DDPMChain.cosine(10).zero_terminal_snr(),
    "flow matching": FLOW,
    "trigonometric": Trigonometric(),
}
# The limit of w alpha^2 at alpha = 0, sigma = 1: the weight of the squared error of x0.
WEIGHTS = [
    (SimpleWeighting(), 0.0),
    (LikelihoodWeighting(), 0.0),
    (MinSNRWeighting(), 0.0),
    (EDMWeighting(0.5), 4.0),
    (EDMWeighting(1.0), 1.0),
    (VelocityWeighting(), 1.0),
]
X0, F = (torch.randn(3, 5, generator=seeded(i), dtype=torch.float64) for i in range(2))


def network(x, noise_label):
    return F.to(x.dtype)


def loss(model, weighting, t, dtype=torch.float64):
    times = torch.full((3,), t, dtype=dtype)
    return ScoreMatching(weighting)(model, X0.to(dtype), t=times, generator=seeded(2)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TO_NOISE)
@pytest.mark.parametrize(("weighting", "limit"), WEIGHTS, ids=[str(w) for w, _ in WEIGHTS])
def test_losses_at_zero_signal(weighting, limit, name, dtype):
    """There x = eps: a model predicts x0 as F, -F or sigma_data F."""
    sde = TO_NOISE[name]
    for model, x0 in (
        (X0Model(network, sde), F),
        (VModel(network, sde), -F),
        (EDMModel(network, sde, 0.7, label=TimeLabel()), 0.7 * F),
    ):
        right = limit * (x0 - X0).square().mean(1)
        got = loss(model, weighting, sde.T, dtype)
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TO_NOISE)
def test_the_noises_own_loss_at_zero_signal(name):
    sde = TO_NOISE[name]
    model = EpsModel(network, sde)
    eps = sde.perturb(X0, torch.ones(3), generator=seeded(2)).eps
    right = (F - eps).square().mean(1)
    torch.testing.assert_close(loss(model, SimpleWeighting(), sde.T), right)
    for weighting in (EDMWeighting(), LikelihoodWeighting(), VelocityWeighting()):
        with pytest.raises(ValueError, match="weighting: expected a finite loss, got an infinite"):
            loss(model, weighting, sde.T)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), FLOW, DDPMChain.linear(100)])
def test_losses_without_noise(sde):
    """There x = x0 and v = eps, EDM's F = -eps: only x0's own error has an infinite weight."""
    eps = sde.perturb(X0, torch.ones(3, dtype=torch.float64), generator=seeded(2)).eps
    for model, noise in (
        (EpsModel(network, sde), F),
        (ScaledScoreModel(network, sde, label=TimeLabel()), -F),
        (RawScoreModel(network, sde, label=TimeLabel()), 0 * F),  # -sigma F
        (VModel(network, sde), F),
        (EDMModel(network, sde, label=TimeLabel()), -F),
    ):
        right = (noise - eps).square().mean(1)
        torch.testing.assert_close(loss(model, SimpleWeighting(), 0.0), right)
    right = 5.0 * (F - X0).square().mean(1)  # min(snr, gamma)
    model = X0Model(network, sde)
    torch.testing.assert_close(loss(model, MinSNRWeighting(5.0), 0.0), right, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="weighting: expected a finite loss, got an infinite"):
        loss(model, SimpleWeighting(), 0.0)


@pytest.mark.parametrize("weighting", [w for w, _ in WEIGHTS], ids=str)
def test_training_on_a_chain_without_terminal_signal(weighting):
    chain = DDPMChain.cosine(4).zero_terminal_snr()  # every fourth time has alpha = 0
    for kind in (X0Model, VModel):
        model = kind(lambda x, noise_label: 0.5 * x, chain)
        losses = ScoreMatching(weighting, times=DiscreteTimes())(
            model, torch.randn(256, 2, generator=seeded()), generator=seeded(1)
        )
        assert bool(torch.isfinite(losses).all())


def test_gradients_at_zero_signal_are_finite():
    chain = TO_NOISE["chain"]
    layer = torch.nn.Linear(5, 5).double()
    model = EDMModel(lambda x, noise_label: layer(x), chain, label=TimeLabel())
    loss(model, EDMWeighting(), 1.0).mean().backward()
    assert bool(torch.isfinite(layer.weight.grad).all())
    assert float(layer.weight.grad.abs().sum()) > 0


def test_edm_models_are_sampled_from_zero_signal():
    """With F = 0 the data are c_skip x: 0 at alpha = 0, and the sample x sd^2 / S^2 at its end."""
    chain = DDPMChain.linear(50).zero_terminal_snr()
    model = EDMModel(lambda x, noise_label: 0 * x, chain, 0.5, label=TimeLabel())
    x = PCSampler(model, DDIM(), steps=49)((64, 5), generator=seeded(), dtype=torch.float64)
    # DDIM keeps the scale of a Gaussian of deviation 0.5, up to its discretization.
    assert float(x.std()) == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("name", TO_NOISE)
def test_processes_without_terminal_signal_are_consistent(name):
    assert check_sde(TO_NOISE[name]).ok


def test_errors_name_the_right_end():
    sde = FLOW
    for ask, named in (
        (lambda: NELBO(X0Model(network, sde), divergence=Hutchinson())(X0), "sde: .* T = 1.*alpha"),
        (lambda: ImportanceTimes().normalizer(sde), "sde: .* T = 1.*alpha"),
        (lambda: KarrasGrid(t_end=0.999)(sde, 4), "t_end: expected sigma / alpha < 160"),
        (lambda: LogSNRGrid(t_end=0.999)(sde, 4), "t_end: expected sigma / alpha < 160"),
        (lambda: NELBO(VModel(network, VPSDE()), t_min=0.0)(X0), r"t_min: .*sigma\(0\)"),
        (lambda: NELBO(X0Model(network, sde), t_min=0.0)(X0), r"t_min: .*sigma\(0\)"),
        (lambda: ImportanceTimes().sample(VPSDE(t_min=0.0), 4), r"t_min: .*sigma\(0\)"),
        (lambda: ImportanceTimes().sample(FlowMatchingSDE(t_min=0.0), 4), r"t_min: .*sigma\(0\)"),
        (lambda: LogSNRGrid(t_end=0.0)(VPSDE(), 4), "t_end: .*noise"),
        (lambda: LogSNRGrid(t_end=0.0)(sde, 4), "t_end: .*noise"),
        (lambda: PCSampler(EpsModel(network, sde), DDIM(), steps=4)((3, 5)), "model: .*alpha = 0"),
        (lambda: ODELikelihood(RawScoreModel(network, sde))(X0), "model: .*alpha = 0.*velocity"),
    ):
        with pytest.raises(ValueError, match=named):
            ask()


def test_a_transformed_model_reaches_zero_signal():
    """Of one process as a model of another, both without signal at T."""
    inner = VModel(lambda x, noise_label: 0.3 * x, Trigonometric())
    model = ScheduleTransformedModel(inner, FLOW)
    x = torch.ones(2, 3, dtype=torch.float64)
    at_end = model.predict(x, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(at_end.x0, -0.3 * x)  # v = -x0
    t = torch.full((2,), 0.5, dtype=torch.float64)  # sigma = alpha: the scale is 2^.5
    got = model.predict(x, t)
    torch.testing.assert_close(got.x0, inner.predict(x * 2**0.5, t).x0)


@pytest.mark.parametrize("objective", [VLB(), HybridLoss()], ids=["vlb", "hybrid"])
def test_bounds_of_a_chain_without_terminal_signal(objective):
    chain = DDPMChain.linear(50).zero_terminal_snr()
    model = VModel(lambda x, noise_label: torch.cat([x, 0 * x], 1), chain, variance="learned_range")
    x0 = GaussianDecoder().encode(torch.randint(0, 256, (4, 3, 2, 2), generator=seeded()))
    losses = objective(model, x0, t=torch.tensor([0.02, 0.5, 0.98, 1.0]))
    assert bool(torch.isfinite(losses).all())


@pytest.mark.parametrize(("weighting", "limit"), WEIGHTS, ids=[str(w) for w, _ in WEIGHTS])
@pytest.mark.parametrize("name", TO_NOISE)
def test_losses_of_models_without_a_network_at_zero_signal(name, weighting, limit):
    """Exact models and transformed ones; there the posterior mean is that of the data."""
    sde = TO_NOISE[name]
    data = torch.randn(4, 5, generator=seeded(5), dtype=torch.float64)
    inner = X0Model(network, FLOW)
    for model, x0 in (
        (EmpiricalModel(sde, data), data.mean(0)),
        (GaussianMixtureModel(sde, data, [0.1, 0.2, 0.3, 0.4]), data.mean(0)),
        (ScheduleTransformedModel(inner, sde), F),
    ):
        right = limit * (x0 - X0).square().mean(1)
        torch.testing.assert_close(loss(model, weighting, sde.T), right, rtol=1e-5, atol=1e-6)


class ShortFlow(ForwardSDE):
    """alpha = (1 - (t / T)^2)^.5 with a T that float32 rounds up, where alpha would be NaN."""

    T = 0.1

    def marginal(self, t):
        s = t / self.T
        return torch.sqrt(1 - s * s), s.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_end_that_float32_rounds_up(dtype):
    sde = ShortFlow()
    right = (-F - X0).square().mean(1)
    for weighting, limit in ((EDMWeighting(0.5), 4.0), (LikelihoodWeighting(), 2 / sde.T)):
        got = loss(VModel(network, sde), weighting, sde.T, dtype)
        torch.testing.assert_close(got, limit * right, rtol=1e-5, atol=0)
    t = torch.full((3,), sde.T, dtype=dtype)
    assert bool(VModel(network, sde).predict(X0.to(dtype), t).x0.isfinite().all())


def test_a_target_of_the_noise_alone_at_zero_signal():
    class Noise(TargetEstimator):
        def __call__(self, sample, reference=None, **cond):
            return Prediction.from_eps(sample.x, sample.eps, sample.alpha, sample.sigma)

    objective, t = ScoreMatching(target=Noise()), torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"target: expected finite x0.* return both x0 and eps"):
        objective(VModel(network, FLOW), X0, t=t)
    assert bool(objective(VModel(network, FLOW), X0, t=0.9 * t).isfinite().all())


@pytest.mark.parametrize("objective", [VLB(), HybridLoss()], ids=["vlb", "hybrid"])
def test_bounds_of_noise_predictions_without_signal_raise(objective):
    chain = DDPMChain.linear(50).zero_terminal_snr()
    model = EpsModel(lambda x, noise_label: torch.cat([x, x], 1), chain, variance="learned_range")
    x0 = GaussianDecoder().encode(torch.zeros(2, 3, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"model: expected a finite loss.*alpha = 0.*predict x0"):
        objective(model, x0, t=torch.tensor([0.5, 1.0]))
