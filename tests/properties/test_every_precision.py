"""Every sampler, likelihood, bound and objective with networks and data in every precision."""

import itertools

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    LMS,
    NELBO,
    VLB,
    VPSDE,
    AdaptiveProjection,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Autoguidance,
    BrownianPath,
    ChainNELBO,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Clip,
    DDPMChain,
    DenoisedModel,
    DiscreteNELBO,
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
    ExactDivergence,
    GaussianDecoder,
    GradientGuidance,
    Heun,
    Hutchinson,
    HybridLoss,
    Inpainting,
    Langevin,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    LogSNRSDE,
    NoiseClassifier,
    ODELikelihood,
    PCSampler,
    ProbabilityFlow,
    PseudoinverseGuidance,
    RawScoreModel,
    ReverseDiffusion,
    SASolver,
    ScaledScoreModel,
    ScheduleTransformedModel,
    ScoreMatching,
    StableTarget,
    StochasticHeun,
    TimeTravel,
    UniPC,
    VModel,
    X0Model,
    classifier_loss,
    ddim_encode,
    evaluate_bits_per_dim,
    held_out_loss,
)
from diffusionkit.networks import MLP

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
PAIRS = list(itertools.product(DTYPES, DTYPES))
SOME = [PAIRS[k] for k in (0, 6, 9, 11, 14)]
MODELS = [EpsModel, X0Model, VModel, EDMModel, RawScoreModel, ScaledScoreModel]
PREDICTORS = [
    Ancestral(),
    ReverseDiffusion(),
    EulerMaruyama(),
    DDIM(),
    DDIM(0.5),
    Euler(),
    Heun(),
    Heun(churn=5.0),
    StochasticHeun(),
    DEIS(),
    LMS(),
    UniPC(),
    DPMSolver2M(),
    DPMSolver2S(),
    DPMSolver3M(),
    DPMSolver2MSDE(),
    DPMSolver3MSDE(),
    DPMSolver2SAncestral(),
    SASolver(),
    AdaptiveSDE(rtol=0.1, atol=0.1),
]
SDE, LABELS = VPSDE(), torch.tensor([0, 1, 2])
IMAGES = torch.randint(256, (3, 4), generator=seeded())


class Network(nn.Module):
    """A network that computes in its own dtype, as released ones do, and checks what it gets."""

    def __init__(self, dtype: torch.dtype, outputs: int = 4) -> None:
        super().__init__()
        g = seeded(1)
        self.linear = nn.Linear(4, outputs, dtype=torch.float64)
        for p in self.linear.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
        self.to(torch.bfloat16).to(dtype)  # the same weights in every dtype

    def forward(self, x, noise_label, shift=None):
        assert noise_label.dtype.itemsize >= 4
        y = torch.tanh(self.linear(x))
        return y if shift is None else y + shift.to(y.dtype).view(-1, 1)


def wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def data(dtype: torch.dtype) -> torch.Tensor:
    """Numbers that all dtypes hold."""
    x = torch.tensor([[-1.5, 0.5, 0.25, 1.0], [0.0, -0.5, 2.0, 0.75], [1.0, 1.0, -1.0, -0.25]])
    return x.to(dtype)


def check(found, wanted, *dtypes) -> None:
    """Compare with a run in which everything is in float64."""
    tolerance = 400 * max(ULP.get(dtype, 0.0) for dtype in dtypes) + 1e-9
    assert bool(torch.isfinite(found).all())
    found, wanted = found.detach(), wanted.detach()
    size = float(wanted.abs().max()) + 1.0
    assert float((found.double() - wanted).abs().max()) < min(tolerance, 0.5) * size


@pytest.mark.parametrize(("net", "dtype"), PAIRS)
@pytest.mark.parametrize("kind", MODELS)
def test_predictions(kind, net, dtype) -> None:
    x, t = data(dtype), torch.tensor([0.1, 0.5, 0.9])
    found = kind(Network(net), SDE).predict(x, t)
    wanted = kind(Network(torch.float64), SDE).predict(x.double(), t.double())
    for name in ("x0", "eps", "score", "v"):
        part = getattr(found, name)
        assert part.dtype == wide(dtype)
        check(part, getattr(wanted, name), net, torch.float32 if dtype.itemsize < 4 else dtype)


def model_of(net: torch.dtype) -> VModel:
    return VModel(Network(net), SDE)


def deterministic(net: torch.dtype, x: torch.Tensor):
    """Results without randomness."""
    model, flow = model_of(net), ProbabilityFlow(model_of(net), rtol=1e-3, atol=1e-3)
    guided = {
        "gradient": GradientGuidance(model, lambda x0: -0.1 * x0.square().sum(1)),
        "linear": LinearGaussianGuidance(model, lambda x0: x0[:, :1], torch.ones(1, 1), 0.5),
        "linearized": LinearizedGaussianGuidance(
            model, lambda x0: torch.tanh(x0[:, :1]), torch.ones(1, 1), 0.5
        ),
        "pseudoinverse": PseudoinverseGuidance(
            model, lambda x0: x0[:, :1], torch.ones(1, 1), torch.full((1,), 0.5)
        ),
        "classifier": ClassifierGuidance(model, NoiseClassifier(Network(net), SDE)),
        "free": ClassifierFreeGuidance(model, 2.0),
        "auto": Autoguidance(model, model_of(net), 2.0, projection=AdaptiveProjection(0.5, 1.0)),
        "clipped": DenoisedModel(model, Clip()),
        "transformed": ScheduleTransformedModel(model, EDMSDE()),
    }
    cond = {"classifier": {"class_labels": LABELS}, "free": {"shift": torch.ones(3).double()}}
    for name, wrapped in guided.items():
        yield name, PCSampler(wrapped, DDIM(), steps=3)(x, **cond.get(name, {}))
    for predictor in PREDICTORS:
        if repr(predictor) in DETERMINISTIC:
            yield repr(predictor), PCSampler(model, predictor, steps=4)(x)
    yield "sample", flow.sample(x)
    yield "encode", flow.encode(x)
    yield "decode", flow.decode(x)
    yield "interpolate", flow.interpolate(x, -x, 3)
    yield "ddim_encode", ddim_encode(model, x, steps=3)
    likelihood = ODELikelihood(model, divergence=ExactDivergence(), rtol=1e-3, atol=1e-3)(x)
    yield "latent", likelihood.latent
    yield "log_prob", likelihood.log_prob


DETERMINISTIC = {
    repr(p)
    for p in PREDICTORS
    if isinstance(p, (Euler, DEIS, LMS, UniPC, DPMSolver2M, DPMSolver2S, DPMSolver3M))
    or p in (DDIM(), Heun())
}


@pytest.fixture(scope="module")
def exact() -> dict[str, torch.Tensor]:
    return dict(deterministic(torch.float64, data(torch.float64)))


@pytest.mark.parametrize(("net", "dtype"), SOME)
def test_deterministic_results(net, dtype, exact) -> None:
    """The state is in float32 or float64 whatever the network and the data are in."""
    for name, found in deterministic(net, data(dtype)):
        expected = {"latent": wide(dtype), "log_prob": torch.float64}.get(name, dtype)
        assert (name, found.dtype) == (name, expected)
        check(found, exact[name], net, dtype if found.dtype == dtype else wide(dtype))


@pytest.mark.parametrize(("net", "dtype"), SOME)
def test_stochastic_samplers(net, dtype) -> None:
    """From a state and from a shape; single steps keep a state of at least float32."""
    x, t, s = data(dtype), torch.full((3,), 0.5), torch.full((3,), 0.4)
    model, known = model_of(net), torch.tensor([True, False, True, True])
    for predictor, corrector in [
        *[(p, None) for p in PREDICTORS],
        (Ancestral(), Langevin()),
        (None, Langevin(norm="batch")),
        (None, AnnealedLangevin()),
    ]:
        sampler = PCSampler(model, predictor, corrector, steps=4)
        found = sampler(x, generator=seeded()), sampler((3, 4), dtype=dtype)
        assert {one.dtype for one in found} == {dtype}, predictor
        assert all(bool(torch.isfinite(one).all()) for one in found), predictor
        if predictor is None:
            stepped = corrector.step(model, x, t)
        elif getattr(predictor, "churn", 0.0) == 0.0:
            stepped = predictor.step(model, x, t, s)
        assert stepped.x.dtype == stepped.mean.dtype == wide(dtype), (predictor, corrector)
    sampler = PCSampler(model, Ancestral(), constraint=Inpainting(x, known), steps=4)
    *_, last = sampler.iterate(x, generator=BrownianPath(range(3)))
    assert last.x.dtype == wide(dtype)
    travel = TimeTravel(2, 2)
    assert PCSampler(model, Ancestral(), time_travel=travel, steps=4)(x).dtype == dtype
    assert PCSampler(model, DDIM(), steps=4).edit(x, 0.5).dtype == dtype
    assert PCSampler(model, DDIM(), steps=4)((3, 4)).dtype == wide(net)
    assert ProbabilityFlow(model, rtol=1e-2, atol=1e-2).sample((3, 4)).dtype == wide(net)


class Autocast(nn.Module):
    """A network that computes under autocast, whatever happens around it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, noise_label):
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x, noise_label)


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, None), (torch.float64, 0)])
@pytest.mark.parametrize("kind", MODELS)
def test_autocast_around_a_step_changes_the_network_alone(kind, dtype, seed) -> None:
    """State and noise keep every bit, with one generator and with torch's own."""
    torch.manual_seed(0)
    network = MLP(4, width=16, depth=1)
    x, t, s = data(dtype), torch.full((3,), 0.5), torch.full((3,), 0.4)
    correctors = [Langevin(), Langevin(norm="batch"), AnnealedLangevin(steps=2)]
    steps = [lambda model, c=c, **how: c.step(model, x, t, **how) for c in correctors]
    for predictor in PREDICTORS:
        if getattr(predictor, "churn", 0.0) == 0.0:
            steps.append(lambda model, p=predictor, **how: p.step(model, x, t, s, **how))
    for step in steps:
        found = []
        for model, around in ((kind(network, SDE), True), (kind(Autocast(network), SDE), False)):
            torch.manual_seed(1)
            generator = None if seed is None else seeded(seed)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=around):
                found.append(step(model, generator=generator))
        for got, wanted in zip(*((one.x, one.mean) for one in found), strict=True):
            assert got.dtype == dtype, step
            assert torch.equal(got, wanted), step


@pytest.mark.parametrize(("net", "dtype"), SOME)
def test_bounds_and_objectives(net, dtype) -> None:
    """Bounds are in float64 and losses in float32 at least, with gradients for every network."""
    x, model = data(dtype).clamp(-1, 1), model_of(net)
    bounds = [
        NELBO(model)(x).nats,
        NELBO(model, divergence=Hutchinson())(x).nats,
        ODELikelihood(model, rtol=1e-2, atol=1e-2)(x).log_prob,
        DiscreteNELBO(EpsModel(Network(net), LogSNRSDE()))(IMAGES).nats,
        ChainNELBO(EpsModel(Network(net), DDPMChain.linear(40)))(IMAGES).nats,
    ]
    assert {bound.dtype for bound in bounds} == {torch.float64}
    chain = EpsModel(Network(net, 8), DDPMChain.linear(40), variance="learned_range")
    levels = torch.ones_like(x)
    for loss in (
        ScoreMatching()(model, x, generator=seeded()),
        ScoreMatching(target=StableTarget())(model, x, reference=x),
        VLB()(chain, levels),
        HybridLoss()(chain, levels),
        classifier_loss(NoiseClassifier(Network(net), SDE), SDE, x, LABELS),
    ):
        assert loss.dtype.itemsize >= 4
        assert bool(torch.isfinite(loss).all())
        loss.mean().backward()
    assert all(bool(torch.isfinite(bound).all()) for bound in bounds)
    for network in (model.network, chain.network):
        for p in network.parameters():
            assert p.grad.dtype == net
            assert bool(torch.isfinite(p.grad).all())


EVALUATIONS = {
    "sampler": lambda m, x: PCSampler(m, DDIM(), steps=2)(x.shape),
    "iterate": lambda m, x: [*PCSampler(m, DDIM(), steps=2).iterate(x.shape)],
    "flow": lambda m, x: ProbabilityFlow(m, rtol=0.1, atol=0.1).sample(x.shape),
    "ODE": lambda m, x: ODELikelihood(m, rtol=0.1, atol=0.1)(x),
    "bound": lambda m, x: NELBO(m)(x),
    "bound by a divergence": lambda m, x: NELBO(m, divergence=Hutchinson())(x),
    "ODE to a target": lambda m, x: ODELikelihood(
        m, rtol=0.1, atol=0.1, divergence=Hutchinson(), target_stderr=0.5, max_probes=2
    )(x),
    "residuals": lambda m, x: LinearGaussianGuidance(
        m, lambda x0: x0[:, :1], torch.zeros(1, 1), 0.1
    ).residuals(x, torch.full((len(x),), 0.5)),
    "bound of a chain": lambda m, x: ChainNELBO(m, GaussianDecoder())(x.long() * 0),
    "held-out loss": lambda m, x: held_out_loss(ScoreMatching(), m, x, progress=False),
    "bits": lambda m, x: evaluate_bits_per_dim(NELBO(m), x, progress=False),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_loss_after_an_evaluation_under_autocast_trains_all_weights(name) -> None:
    """Autocast of torch 2.6 casts weights once in a block, also where gradients are disabled."""
    sde = DDPMChain.linear(40) if "chain" in name else VPSDE()
    model, x = EpsModel(MLP(3, width=8, depth=1), sde), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        EVALUATIONS[name](model, x)
        loss = ScoreMatching()(model, x).mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
