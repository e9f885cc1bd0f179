"""Everything on the process of flow matching, from t = 1 where alpha = 0, against exact values."""

import math

import pytest
import torch
from support import f64, seeded

from diffusionkit import (
    DDIM,
    EDMSDE,
    NELBO,
    VPSDE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    BrownianPath,
    DDPMChain,
    EpsModel,
    Euler,
    EulerMaruyama,
    ExactDivergence,
    FlowMatchingSDE,
    GaussianMixtureModel,
    Heun,
    ImportanceTimes,
    Inpainting,
    KarrasGrid,
    Langevin,
    LikelihoodWeighting,
    LogSNRGrid,
    ODELikelihood,
    PCSampler,
    Prediction,
    ProbabilityFlow,
    ScheduleTransformedModel,
    ScoreMatching,
    ScoreModel,
    StableTarget,
    TimeTravel,
    UniformTimes,
    VelocityModel,
    VelocityWeighting,
    X0Model,
    ddim_encode,
)
from diffusionkit._log_snr import FAINTEST
from diffusionkit.testing import check_score_model

SDE = FlowMatchingSDE()
CHAIN = DDPMChain.linear(1000).zero_terminal_snr()
MIXTURE = {"means": [[-1.0, 0.5], [1.0, -0.5]], "stds": [0.3, 0.2], "weights": [0.4, 0.6]}
EXACT = GaussianMixtureModel(SDE, **MIXTURE)


def velocity(x, t):
    prediction = EXACT.predict(x, t)
    return prediction.eps - prediction.x0


MODEL = VelocityModel(velocity, SDE, label=lambda sde, t: t)


def noise(n, seed=0):
    return torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64)


def test_a_velocity_determines_the_score():
    """score = -(x + (1 - t) u) / t for this path."""
    x, t = noise(7), torch.linspace(0.1, 1.0, 7, dtype=torch.float64)
    u = velocity(x, t)
    score = -(x + (1 - t)[:, None] * u) / t[:, None]
    torch.testing.assert_close(EXACT(x, t), score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(MODEL(x, t), score, rtol=1e-9, atol=1e-9)
    check_score_model(MODEL, (4, 2), exact=True)


def test_likelihoods_are_exact():
    x = EXACT.sample(32, generator=seeded(), dtype=torch.float64)
    right = EXACT.log_prob(x, torch.full((32,), SDE.t_min, dtype=torch.float64))
    found = ODELikelihood(MODEL, divergence=ExactDivergence(), rtol=1e-6, atol=1e-6)(x)
    torch.testing.assert_close(found.log_prob, right, rtol=0, atol=1e-4)
    back = ProbabilityFlow(MODEL, rtol=1e-6, atol=1e-6).decode(found.latent)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)


def gaussian_flow(mean, std, x, sde, t):
    """The flow from T, where x is N(0, 1), keeps the number of standard deviations."""
    alpha, sigma = (float(c) for c in sde.marginal(f64(t)))
    return alpha * mean + math.hypot(alpha * std, sigma) * x


@pytest.mark.parametrize("sde", [SDE, CHAIN], ids=["flow", "chain"])
@pytest.mark.parametrize(
    ("predictor", "order"), [(Euler(), 1), (Heun(), 2), (Heun(alpha=0.5), 2), (DDIM(), 1)], ids=str
)
def test_the_order_of_solvers_of_the_flow_from_pure_noise(sde, predictor, order):
    model = GaussianMixtureModel(sde, [[0.7]], [0.4])
    x, right = f64(-1.5, 0.3, 2.0)[:, None], []
    for steps in (20, 40):
        grid = torch.linspace(1.0, 0.1, steps + 1, dtype=torch.float64)
        found = PCSampler(model, predictor, grid=grid, denoise=False)(x)
        right.append(float((found - gaussian_flow(0.7, 0.4, x, sde, 0.1)).abs().max()))
    # The chain's schedule has kinks.
    assert math.log2(right[0] / right[1]) > order - (0.25 if sde is SDE else 0.6)
    assert right[1] < 0.06


@pytest.mark.parametrize("sde", [SDE, CHAIN], ids=["flow", "chain"])
@pytest.mark.parametrize(
    ("predictor", "grid"),
    [(Euler(), LogSNRGrid()), (Heun(), KarrasGrid()), (EulerMaruyama(), LogSNRGrid()),
     (EulerMaruyama(), KarrasGrid()), (AdaptiveSDE(0.1, 0.1), torch.tensor([1.0, 1e-3]))],
    ids=["euler", "heun", "log-snr", "karras", "adaptive"],
)  # fmt: skip
def test_samples_from_pure_noise(predictor, grid, sde):
    """The mean and deviation of one Gaussian, of which four standard errors are .057 and .04."""
    model = GaussianMixtureModel(sde, [[0.7]], [0.4])
    x = PCSampler(model, predictor, steps=80, grid=grid)((800, 1), generator=seeded())
    assert float(x.mean()) == pytest.approx(0.7, abs=0.07)
    assert float(x.std()) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("sde", [SDE, CHAIN], ids=["flow", "chain"])
def test_the_first_step_of_the_reverse_sde_is_an_exact_transition(sde):
    """x_s = alpha_s x0 + sigma_s z, given the predicted data, of AdaptiveSDE's first too."""
    data = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    model = X0Model(lambda x, noise_label: data.expand_as(x), sde)
    x, t, s = noise(5), torch.ones(5).double(), torch.full((5,), 0.6).double()
    alpha, sigma = (c[:, None] for c in sde.marginal(s))
    step = EulerMaruyama().step(model, x, t, s, generator=seeded(4))
    torch.testing.assert_close(step.mean, alpha * data.expand(5, 2))
    torch.testing.assert_close(step.x, step.mean + sigma * noise(5, seed=4))
    s = torch.full((5,), 0.995).double()  # within the length of the first step
    path = BrownianPath(range(5))
    step = AdaptiveSDE().step(model, x, t, s, generator=path)
    alpha, sigma = (c[:, None] for c in sde.marginal(s))
    torch.testing.assert_close(step.mean, alpha * data.expand(5, 2))
    increment = BrownianPath(range(5)).increment(x, sde, t, s)
    torch.testing.assert_close(step.x, step.mean + sigma * increment)


@pytest.mark.parametrize("corrector", [AnnealedLangevin(), Langevin(0.1)], ids=str)
def test_correctors_constraints_and_time_travel_at_pure_noise(corrector):
    model = GaussianMixtureModel(SDE, [[0.7, -0.2]], [0.4])
    known = torch.tensor([0.9, 0.0])
    sampler = PCSampler(
        model, Heun(), corrector, steps=20, time_travel=TimeTravel(5, 2),
        constraint=Inpainting(known, torch.tensor([1, 0])),
    )  # fmt: skip
    x = sampler((3000, 2), generator=seeded())
    assert bool((x[:, 0] == 0.9).all())
    assert float(x[:, 1].mean()) == pytest.approx(-0.2, abs=0.04)
    assert float(x[:, 1].std()) == pytest.approx(0.4, rel=0.1)


def test_codes_of_ddim_and_edits():
    x = EXACT.sample(6, generator=seeded(), dtype=torch.float64)
    code = ddim_encode(MODEL, x, steps=800)
    exact = ProbabilityFlow(MODEL, rtol=1e-8, atol=1e-8).encode(x)
    torch.testing.assert_close(code, exact, rtol=0, atol=0.02)
    sampler = PCSampler(MODEL, Ancestral(), steps=50)
    edited = sampler.edit(x, 1.0, generator=seeded())  # all of it is noise
    assert bool(edited.isfinite().all())


OTHERS = {"VP": VPSDE(), "EDM": EDMSDE()}


@pytest.mark.parametrize("name", OTHERS)
def test_equal_samples_on_other_processes(name):
    """DDIM at equal ratios sigma / alpha: from the flow's model to the other, and back."""
    other = OTHERS[name]
    theirs = GaussianMixtureModel(other, **MIXTURE)
    levels = torch.linspace(-8.0, 8.0, 25, dtype=torch.float64)
    z = noise(10)

    def samples(model):
        times = model.sde.time_at_log_snr(levels)
        scale = torch.hypot(*model.sde.marginal(times[:1]))
        return PCSampler(model, DDIM(), grid=times)(z * scale)

    own = samples(EXACT)
    for model in (
        MODEL,
        theirs,
        ScheduleTransformedModel(MODEL, other),
        ScheduleTransformedModel(theirs, SDE),
        ScheduleTransformedModel(ScheduleTransformedModel(MODEL, other), SDE),
    ):
        torch.testing.assert_close(samples(model), own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_process_starts_from_pure_noise(name):
    """Above its largest noise it is evaluated there, at sigma / alpha = 152 and 80."""
    other = OTHERS[name]
    model = ScheduleTransformedModel(GaussianMixtureModel(other, **MIXTURE), SDE)
    x, t = noise(8), torch.ones(8, dtype=torch.float64)
    prediction = model.predict(x, t)
    torch.testing.assert_close(prediction.eps, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.x0, EXACT.predict(x, t).x0, rtol=0, atol=0.06)
    data = EXACT.sample(16, generator=seeded(), dtype=torch.float64)
    right = EXACT.log_prob(data, torch.full((16,), SDE.t_min, dtype=torch.float64))
    found = ODELikelihood(model, divergence=ExactDivergence())(data).log_prob
    torch.testing.assert_close(found, right, rtol=0, atol=0.02)
    ours, exact = (PCSampler(m, DDIM(), steps=30)(noise(50)) for m in (model, EXACT))
    assert float((ours - exact).abs().mean()) < 0.02
    with pytest.raises(ValueError, match="sde: expected sigma / alpha within that of the model"):
        ScheduleTransformedModel(GaussianMixtureModel(VPSDE(), **MIXTURE), EDMSDE(sigma_max=200.0))


class Peeking(ScoreModel):
    """Predicts from the data, with a mean squared error of the noise of snr / (1 + snr)."""

    def __init__(self, sde, x0):
        super().__init__()
        self.sde, self.x0 = sde, x0

    def predict(self, x, t, **cond):
        alpha, sigma = (c[:, None] for c in self.sde.marginal(t))
        snr = self.sde.log_snr(t).exp()[:, None]
        eps = (x - alpha * self.x0) / sigma + torch.sqrt(snr / (1 + snr))
        return Prediction(x, self.x0 - 1 / torch.sqrt(1 + snr), eps, alpha[:, 0], sigma[:, 0])


@pytest.mark.parametrize("sde", [SDE, CHAIN, VPSDE()], ids=["flow", "chain", "VP"])
def test_a_bound_in_closed_form(sde):
    """The integral of snr / (1 + snr) over log-SNR is log(1 + snr); the rest is known."""
    d, x = 3, noise(4)[:, :1].expand(4, 3)
    bound = NELBO(Peeking(sde, x), samples=800)(x, generator=seeded())
    (a, b), (s, r) = (c.tolist() for c in sde.marginal(f64(sde.t_min, sde.T)))
    snr, rest = (a / s) ** 2, (b / r) ** 2
    prior = 0.5 * (b**2 * x.square().sum(1) + d * r**2) + 0.5 * d * math.log(2 * math.pi)
    path = 0.5 * d * (math.log1p(snr) - math.log1p(rest)) + d * math.log(s / r)
    small = 0.5 * d * (snr / (1 + snr) - 1) - d * math.log(a)
    torch.testing.assert_close(bound.nats, prior + path + small, rtol=0, atol=2e-2)
    assert bool(torch.isfinite(bound.path).all() & torch.isfinite(bound.drift).all())


class Lost(Peeking):
    """Knows the data where sigma / alpha < 160, and is wrong by 160 beyond."""

    def predict(self, x, t, **cond):
        alpha, sigma = (c[:, None] for c in self.sde.marginal(t))
        wrong = torch.where(self.sde.log_snr(t)[:, None] < FAINTEST, 160.0, 0.0)
        eps = (x - alpha * (self.x0 - wrong)) / sigma
        return Prediction(x, self.x0 - wrong + 0 * x, eps, alpha[:, 0], sigma[:, 0])


@pytest.mark.parametrize("sde", [SDE, CHAIN], ids=["flow", "chain"])
def test_errors_without_signal_count_in_the_bound(sde):
    """Half the integral of 160^2 snr over log-SNR below that of sigma / alpha = 160 is 1/2."""
    x = torch.zeros(4, 3, dtype=torch.float64)
    bound = NELBO(Lost(sde, x), samples=800)(x, generator=seeded())
    span = float(sde.log_snr(f64(sde.t_min))) - FAINTEST
    expected = torch.full((4,), 3 * 0.5 * (1 - span), dtype=torch.float64)
    torch.testing.assert_close(bound.path, expected, rtol=0, atol=0.03)


def test_importance_times_keep_the_expected_loss():
    """Of the likelihood weight, with far less variance than uniform times; of a bounded one."""
    x0 = EXACT.sample(4000, generator=seeded(), dtype=torch.float64)
    model = VelocityModel(lambda x, noise_label: 0.3 * x - 0.1, SDE)
    means, spread = [], []
    for times in (UniformTimes(), ImportanceTimes()):
        loss = ScoreMatching(LikelihoodWeighting(), times=times)(model, x0, generator=seeded(1))
        means.append(float(loss.mean()))
        spread.append(float(loss.std()) / 4000**0.5)
    assert means[0] == pytest.approx(means[1], abs=4 * math.hypot(*spread))
    assert spread[1] < 0.4 * spread[0]
    t, weight = ImportanceTimes().sample(SDE, 20_000, generator=seeded())
    span = 1 - SDE.t_min  # the mean of t^2 over [t_min, 1]
    assert float((weight * t**2).mean()) == pytest.approx((1 - SDE.t_min**3) / 3 / span, rel=0.01)
    beyond = t > 160 / 161
    assert 0.07 < float(beyond.double().mean()) < 0.084  # 2 / (13.8 + 10.15 + 2)
    u = f64(0.0, 0.5, 1.0)
    at = ImportanceTimes().quantile(SDE, u)
    assert float(at[0]) == pytest.approx(SDE.t_min, rel=1e-9)
    assert float(at[2]) == 1.0


def test_stable_targets_at_pure_noise():
    """There all reference data have the same weight: the target is their mean."""
    reference = noise(50, seed=5)
    objective = ScoreMatching(VelocityWeighting(), target=StableTarget())
    x0, t = reference[:4], torch.ones(4, dtype=torch.float64)
    model = X0Model(lambda x, noise_label: 0 * x, SDE)
    loss = objective(model, x0, reference=reference, t=t, generator=seeded())
    right = reference.mean(0).square().mean().expand(4)
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=1e-9)


def test_a_noise_model_is_told_what_to_do():
    model = EpsModel(lambda x, noise_label: x, SDE)
    with pytest.raises(ValueError, match=r"model: .*VelocityModel, VModel.*start a little before"):
        PCSampler(model, Heun(), steps=5)((2, 2))
    grid = torch.linspace(0.99 * SDE.T, SDE.t_stop, 6)  # as the error suggests
    assert bool(PCSampler(model, Heun(), grid=grid)((2, 2)).isfinite().all())
