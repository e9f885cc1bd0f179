"""Parts of one's own get tensors (B,) from every caller, and work with every generator."""

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    DEIS,
    IPNDM,
    LMS,
    NELBO,
    VPSDE,
    AdaptiveSDE,
    AnalyticFirstStep,
    Ancestral,
    AnnealedLangevin,
    BrownianPath,
    ClassifierFreeGuidance,
    Constraint,
    Corrector,
    DDPMChain,
    DenoisingTarget,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver2SAncestral,
    DPMSolver3M,
    DPMSolver3MSDE,
    EDMModel,
    EpsModel,
    Euler,
    EulerMaruyama,
    GaussianMixtureModel,
    Heun,
    Langevin,
    LogSNRGrid,
    NetworkModel,
    ODELikelihood,
    PCSampler,
    Predictor,
    ProbabilityFlow,
    ReverseDiffusion,
    SASolver,
    ScheduleTransformedModel,
    ScoreMatching,
    StochasticHeun,
    TimeSampler,
    UniformTimes,
    UniPC,
    VelocityAdams,
    Weighting,
    ddim_encode,
    expand,
)
from diffusionkit._coefficients import add_noise
from diffusionkit.random import NoisePath, rand, randn_like, step_noise
from diffusionkit.sampling import (
    LinearPredictor,
    StageCoefficients,
    StepCoefficients,
    TwoStagePredictor,
)
from diffusionkit.testing import check_score_model
from diffusionkit.values import Step

PREDICTORS = [
    DDIM(), Ancestral(), EulerMaruyama(), ReverseDiffusion(), Euler(), Heun(), Heun(churn=2.0),
    StochasticHeun(), DPMSolver2M(), DPMSolver2S(), DPMSolver3M(lower_order_final=True),
    DPMSolver2MSDE(), UniPC(lower_order_final=True), DEIS(), LMS(), IPNDM(), VelocityAdams(),
    VelocityAdams(corrected=True),
    AdaptiveSDE(rtol=0.1), DPMSolver3MSDE(), DPMSolver2SAncestral(), SASolver(),
    SASolver(lambda log_snr: torch.sigmoid(log_snr), 3, 3), AnalyticFirstStep(DEIS()),
]  # fmt: skip
CORRECTORS = [Langevin(), AnnealedLangevin()]
X = torch.linspace(-1, 1, 8).view(4, 2)


def check(batch, *values):
    for value in values:
        assert isinstance(value, torch.Tensor), type(value)
        assert value.ndim == 1
        if batch is not None:
            assert len(value) == batch


class Process(VPSDE):
    def marginal(self, t):
        check(None, t)
        return super().marginal(t)


class Model(NetworkModel):
    """Predicts x0 from a normalized input, with functions that take tensors only."""

    def parameterization(self, alpha, sigma):
        check(None, alpha, sigma)
        return torch.cos(0.1 * alpha), -torch.sin(0.1 * sigma)

    def scale_input(self, x, alpha, sigma):
        check(len(x), alpha, sigma)
        return x * expand(torch.rsqrt(alpha**2 + sigma**2), x).to(x.dtype)


def noise_label(sde, t):
    check(None, t)
    return torch.log(t)


class Known(Constraint):
    def __call__(self, x, alpha, sigma, *, generator=None):
        check(len(x), alpha, sigma)
        noise = randn_like(x, generator)
        x = x.clone()
        x[:, 0] = (expand(alpha, x) * 0.5 + expand(sigma, x) * noise)[:, 0]
        return x


def model() -> Model:
    return Model(lambda x, noise_label: 0.5 * x, Process(), label=noise_label)


@pytest.mark.parametrize("predictor", [None, *PREDICTORS], ids=str)
@pytest.mark.parametrize("corrector", [None, *CORRECTORS], ids=str)
def test_samplers_pass_tensors(predictor, corrector):
    if predictor is None and corrector is None:
        pytest.skip("nothing to do")
    sampler = PCSampler(
        model(), predictor, corrector, steps=4, grid=LogSNRGrid(t_end=0.05), constraint=Known()
    )
    for state in sampler.iterate(X, generator=seeded()):
        assert bool(torch.isfinite(state.x).all())
    if predictor is not None:
        sampler.edit(X, 0.5, generator=seeded())


@pytest.mark.parametrize(
    "run",
    [
        lambda m: ProbabilityFlow(m, method="euler").encode(X),
        lambda m: ODELikelihood(m, method="euler")(X),
        lambda m: NELBO(m)(X),
        lambda m: ScoreMatching()(m, X),
        lambda m: ddim_encode(m, X, steps=3),
        lambda m: check_score_model(m, (4, 2)),
        lambda m: m(X, torch.full((4,), 0.5)),
        lambda m: PCSampler(ScheduleTransformedModel(m, VPSDE()), DDIM(), steps=3)(X),
    ],
)
def test_likelihoods_objectives_and_wrappers_pass_tensors(run):
    run(model())


@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_every_predictor_returns_the_prediction_it_used(predictor):
    made = []

    class Recorded(EpsModel):
        def predict(self, x, t, **cond):
            made.append(super().predict(x, t, **cond))
            return made[-1]

    recorded = Recorded(lambda x, noise_label: 0.5 * x, VPSDE())
    t, s = torch.full((4,), 0.5), torch.full((4,), 0.4)
    if predictor == Heun(churn=2.0):
        predictor = Heun()  # new noise needs a sampler
    step = predictor.step(recorded, X, t, s, generator=seeded())
    assert step.prediction is made[-1]
    for corrector in CORRECTORS:
        assert corrector.step(recorded, X, t, generator=seeded()).prediction is made[-1]


def test_labels_weightings_and_time_samplers_get_tensors_and_objects():
    class Weights(Weighting):
        def __call__(self, sde, t):
            check(4, t)
            return torch.ones_like(t)

    class Target(DenoisingTarget):
        def __call__(self, sample, reference=None, **cond):
            check(4, sample.t, sample.alpha, sample.sigma)
            return super().__call__(sample, reference, **cond)

    class Times(UniformTimes):
        def update(self, t, loss):
            check(4, t, loss)

    loss = ScoreMatching(Weights(), times=Times(), target=Target())(model(), X)
    assert loss.shape == (4,)


# --- draws that respect generators, one for each sample, and paths ------------------------------


class LateTimes(TimeSampler):
    def sample(self, sde, n, *, generator=None, device=None, dtype=None):
        u = rand(n, generator=generator, device=device, dtype=dtype or torch.float64)
        t = torch.sqrt(sde.t_min**2 + u * (sde.T**2 - sde.t_min**2))
        return t, 0.5 * (sde.T + sde.t_min) / t


class OwnCorrector(Corrector):
    def step(self, model, x, t, *, generator=None, **cond):
        _, sigma = model.sde.perturbation_kernel(x, t)
        prediction = model.predict(x, t, **cond)
        mean = x + expand(0.01 * sigma**2, x) * prediction.score
        noise = randn_like(x, generator)
        return Step(add_noise(mean, 0.02**0.5 * sigma, noise), mean, prediction=prediction)


class OwnAncestral(LinearPredictor):
    def coefficients(self, sde, t, s):
        (alpha_s, sigma_s), (_, sigma_t) = sde.marginal(s), sde.marginal(t)
        scale, std = sde.transition(s, t)
        kept, removed = (sigma_s / sigma_t) ** 2, (std / sigma_t) ** 2
        return StepCoefficients(scale * kept, alpha_s * removed, std * sigma_s / sigma_t)


class OwnEuler(Predictor):
    """Written from the interface alone."""

    def __init__(self, draw):
        self.draw = draw

    def step(self, model, x, t, s, state=None, *, generator=None, **cond):
        mean = DDIM().step(model, x, t, s, **cond).mean
        noise = self.draw(x, model.sde, t, s, generator)
        return Step(mean + 0.1 * noise, mean)


def followed(x, sde, t, s, generator):
    return step_noise(x, sde, t, s, generator=generator)


def ignored(x, sde, t, s, generator):
    return randn_like(x, generator)


def of_the_global_state(x, sde, t, s, generator):
    return torch.randn_like(x)


def each(n=4):
    return [torch.Generator().manual_seed(k) for k in range(n)]


def test_own_parts_with_one_generator_for_each_sample():
    exact = GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.3])
    times = [ScoreMatching(times=LateTimes())(exact, X[:n], generator=each(n)) for n in (4, 2)]
    assert torch.equal(times[0][:2], times[1])
    for predictor in (OwnAncestral(), OwnEuler(followed)):
        sampler = PCSampler(exact, predictor, OwnCorrector(), steps=5)
        assert torch.equal(sampler(X, generator=each())[:2], sampler(X[:2], generator=each(2)))


def test_own_predictors_follow_a_path_or_are_refused():
    exact = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [0.5])
    for predictor in (OwnAncestral(), OwnEuler(followed)):
        sampler = PCSampler(exact, predictor, steps=5)
        one, two = (sampler(X, generator=BrownianPath(range(4))) for _ in "ab")
        assert torch.equal(one, two)
    for draw in (ignored, of_the_global_state):
        sampler = PCSampler(exact, OwnEuler(draw), steps=5)
        sampler(X, generator=seeded())
        with pytest.raises(ValueError, match=r"OwnEuler: expected noise from .*step_noise"):
            sampler(X, generator=BrownianPath(range(4)))


@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_the_librarys_predictors_accept_a_path(predictor):
    exact = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [0.5])
    PCSampler(exact, predictor, steps=4, grid=LogSNRGrid())(X, generator=BrownianPath(range(4)))


def test_a_path_of_ones_own():
    class Constant(NoisePath):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return each()[index]

        def increment(self, x, sde, t, s):
            return torch.ones_like(x)

    exact = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [0.5])
    x = PCSampler(exact, OwnEuler(followed), steps=5)(X, generator=Constant())
    assert bool(torch.isfinite(x).all())


# --- a two-stage solver in a few lines ----------------------------------------------------------


class OwnMidpoint(TwoStagePredictor):
    """The midpoint rule for dx/dt = p x + q x0 in the process's own time."""

    def coefficients(self, sde, t, s):
        def slope(at):
            alpha, sigma = sde.marginal(at)
            pull = 0.5 * (sde.diffusion(at) / sigma) ** 2
            return sde.drift_coefficient(at) + pull, -pull * alpha

        h, middle = s - t, 0.5 * (t + s)
        (p, q), (p_middle, q_middle) = slope(t), slope(middle)
        return StageCoefficients(
            middle,
            inner=StepCoefficients(1 + 0.5 * h * p, 0.5 * h * q),
            first=StepCoefficients(1.0, 0.0),
            second=StepCoefficients(h * p_middle, h * q_middle),
        )


def test_a_two_stage_predictor_of_ones_own_has_order_two():
    exact = GaussianMixtureModel(VPSDE(), [[-1.0], [1.0]], [0.4, 0.6])
    x = torch.tensor([[-1.3], [0.2], [0.9]], dtype=torch.float64)
    finest = torch.linspace(0.9, 0.1, 1281, dtype=torch.float64)
    reference = PCSampler(exact, Heun(), grid=finest, denoise=False)(x)
    errors = []
    for steps in (40, 80, 160):
        grid = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        sampler = PCSampler(exact, OwnMidpoint(), grid=grid, denoise=False)
        fine = PCSampler(exact, Heun(alpha=0.5), grid=grid, denoise=False)
        out = sampler(x)
        torch.testing.assert_close(out, fine(x), rtol=1e-12, atol=1e-12)
        errors.append(float((out - reference).abs().max()))
        assert sampler.nfe == 2 * steps
    assert 3.6 < errors[0] / errors[1] < 4.4
    assert 3.6 < errors[1] / errors[2] < 4.4


def test_parts_of_every_kind_work_together():
    network = EDMModel(lambda x, noise_label, class_labels=None: 0.3 * x, DDPMChain.linear(100))
    guided = ClassifierFreeGuidance(network, 2.0)
    sampler = PCSampler(guided, OwnMidpoint(), OwnCorrector(), steps=4, constraint=Known())
    x = sampler((3, 2), generator=each(3), class_labels=torch.tensor([0, 1, 2]))
    assert bool(torch.isfinite(x).all())
