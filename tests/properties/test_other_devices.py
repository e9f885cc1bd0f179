"""All parts on a GPU and on an Apple device: no float64 there, and no waiting in a step."""

import pytest
import torch
from support.pretend_device import PretendDevice

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    LMS,
    NELBO,
    VESDE,
    VLB,
    VPSDE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    BrownianPath,
    ChainGrid,
    ChainNELBO,
    DDPMChain,
    DiscreteNELBO,
    DiscreteTimes,
    DPMSolver2M,
    DPMSolver3M,
    DPMSolver3MSDE,
    EDMWeighting,
    EmpiricalModel,
    EpsModel,
    Euler,
    EulerMaruyama,
    GaussianDecoder,
    GaussianMixtureModel,
    Heun,
    HybridLoss,
    ImportanceTimes,
    IndexLabel,
    KarrasGrid,
    Langevin,
    LearnedSDE,
    LikelihoodWeighting,
    LogNormalTimes,
    LogSNRGrid,
    LogSNRSDE,
    LossSecondMomentTimes,
    MinSNRWeighting,
    ODELikelihood,
    PCSampler,
    ProbabilityFlow,
    QuadraticGrid,
    ReverseDiffusion,
    SASolver,
    ScoreMatching,
    SMLDChain,
    StableTarget,
    StochasticHeun,
    StratifiedTimes,
    SubVPSDE,
    UniformDequantizer,
    UniPC,
    VModel,
    clipped_step,
)
from diffusionkit.interfaces import ForwardSDE
from diffusionkit.networks import MLP, NCSNpp, NCSNv2

KINDS = ("cuda", "mps")


class UserSDE(ForwardSDE, torch.nn.Module):
    """A user's process with a parameter and nothing but its marginals."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(3.0))

    def marginal(self, t):
        decay = self.rate.to(t.dtype) * t
        return torch.exp(-decay), torch.sqrt(-torch.expm1(-2 * decay))


class Doubled(torch.nn.Module):
    """A network with a learned variance."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(6, width=8, depth=1, out_features=12)

    def forward(self, x, noise_label, class_labels=None):
        out = self.inner(x.flatten(1), noise_label)
        return out.view(len(x), 2 * x.shape[1], *x.shape[2:])


PROCESSES = {
    "VP": VPSDE,
    "VE": VESDE,
    "subVP": SubVPSDE,
    "EDM": EDMSDE,
    "DDPM": lambda: DDPMChain.linear(50),
    "zero SNR": lambda: DDPMChain.cosine(50).zero_terminal_snr(),
    "SMLD": lambda: SMLDChain.geometric(50),
    "logSNR": LogSNRSDE,
    "learned": LearnedSDE,
    "user": UserSDE,
}
OBJECTIVES = {
    "uniform": ScoreMatching,
    "stratified": lambda: ScoreMatching(times=StratifiedTimes()),
    "importance": lambda: ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes()),
    "independent": lambda: ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes(False)),
    "EDM": lambda: ScoreMatching(EDMWeighting(), times=LogNormalTimes()),
    "min SNR": lambda: ScoreMatching(MinSNRWeighting()),
}
STEPS = {
    "EulerMaruyama": (EulerMaruyama(), None),
    "ReverseDiffusion": (ReverseDiffusion(), None),
    "Ancestral": (Ancestral(), None),
    "DDIM": (DDIM(), None),
    "Euler": (Euler(), None),
    "Heun": (Heun(churn=2.0), None),
    "StochasticHeun": (StochasticHeun(), None),
    "DPMSolver2M": (DPMSolver2M(), None),
    "DPMSolver3M": (DPMSolver3M(), None),
    "UniPC": (UniPC(), None),
    "DEIS": (DEIS(), None),
    "SASolver": (SASolver(s_min=0.1), None),
    "DPMSolver3MSDE": (DPMSolver3MSDE(), None),
    "LMS": (LMS(), None),
    "Langevin": (DDIM(), Langevin()),
    "AnnealedLangevin": (None, AnnealedLangevin()),
}


def made(process, kind, model=EpsModel):
    return model(MLP(3, width=8, depth=1), process()).to(kind)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_training_step_waits_once_and_copies_nothing(process, objective) -> None:
    if process == "zero SNR" and objective in ("importance", "independent"):
        pytest.skip("its log-SNR is infinite at T")
    for kind in KINDS:
        with PretendDevice(kind) as device:
            model, loss = made(PROCESSES[process], kind, VModel), OBJECTIVES[objective]()
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            x0 = torch.rand(4, 3, device=kind)
            for _ in range(2):
                with device.watched() as events:
                    loss(model, x0).mean().backward()
                    clipped_step(optimizer)
        assert [(k, "optim" in line) for k, _, line in events] == [("read", True)], events
        assert sum(events.values()) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["VLB", "HybridLoss", "discrete", "second moment", "StableTarget", "IndexLabel"]
)
def test_other_objectives_neither_wait_nor_copy(name, kind) -> None:
    with PretendDevice(kind) as device:
        chain = DDPMChain.linear(50)
        x0, options = torch.rand(4, 3, device=kind), {}
        model = made(lambda: chain, kind)
        losses = {
            "VLB": VLB(),
            "HybridLoss": HybridLoss(),
            "StableTarget": ScoreMatching(target=StableTarget()),
            "second moment": ScoreMatching(times=LossSecondMomentTimes(history=1)),
        }
        loss = losses.get(name, ScoreMatching(times=DiscreteTimes()))
        if name in ("VLB", "HybridLoss"):
            model = EpsModel(Doubled(), chain, variance="learned_range").to(kind)
            x0 = GaussianDecoder().encode(torch.randint(256, (4, 3, 2))).to(kind)
        if name == "StableTarget":
            model, options = made(VPSDE, kind), {"reference": x0}
        if name == "IndexLabel":
            label = IndexLabel(torch.linspace(5, 0.01, 9))
            model = EpsModel(MLP(3, width=8), VPSDE(), label=label).to(kind)
            loss = ScoreMatching()
        for _ in range(2):
            with device.watched() as events:
                loss(model, x0, **options).mean().backward()
    assert not events


@pytest.mark.slow
@pytest.mark.parametrize("process", ["VP", "EDM", "SMLD", "learned", "user"])
@pytest.mark.parametrize("name", STEPS)
def test_a_sampling_step_neither_waits_nor_copies(name, process) -> None:
    """A run of ten steps has no more events than one of five."""
    predictor, corrector = STEPS[name]
    for kind in KINDS:
        with PretendDevice(kind) as device:
            model, counts = made(PROCESSES[process], kind), []
            for steps in (5, 10):
                sampler = PCSampler(model, predictor, corrector, steps=steps)
                with device.watched() as events:
                    x = sampler((2, 3), device=kind)
                counts.append(sum(events.values()))
            assert x.device == device.device
        # The first run copies the tables of a chain once.
        assert counts[1] <= counts[0], events


# Churn needs a grid, and StochasticHeun asks whether its step ends without noise.
@pytest.mark.parametrize("process", ["VP", "user"])
@pytest.mark.parametrize("name", [n for n in STEPS if n not in ("Heun", "StochasticHeun")])
def test_a_step_between_given_times_fits_a_cuda_graph(name, process) -> None:
    """As recorded for benchmarks/gpu.py: it neither waits nor copies from the host."""
    predictor, corrector = STEPS[name]
    with PretendDevice("cuda") as device, torch.no_grad():
        model = made(PROCESSES[process], "cuda")
        x, t = torch.rand(2, 3, device="cuda"), torch.full((2,), 0.5, device="cuda")
        for _ in range(2):
            with device.watched() as events:
                if predictor is not None:
                    predictor.step(model, x, t, 0.8 * t)
                if corrector is not None:
                    corrector.step(model, x, t)
    assert not events


@pytest.mark.parametrize("process", PROCESSES)
def test_grids_priors_and_likelihoods_need_no_float64(process) -> None:
    with PretendDevice("mps"):
        model = made(PROCESSES[process], "mps", VModel)
        x = torch.rand(2, 3, device="mps")
        ChainGrid(DDPMChain.linear(50))(model.sde, 3)
        grids = [None, QuadraticGrid(), x.new_tensor([model.sde.T, model.sde.T / 2])]
        if process != "zero SNR":
            grids += [LogSNRGrid(), KarrasGrid()]
            NELBO(model)(x)
        for grid in grids:
            PCSampler(model, DDIM(), grid=grid, steps=3)((2, 3), device="mps")
        assert model.sde.prior_std > 0
        model.sde.prior_log_prob(model.sde.prior_sample((2, 3), device="mps"))
        t = torch.tensor([0.3, 0.6], device="mps")
        model.sde.transition(t / 2, t)
        model.sde.drift(x, t)
        model.sde.time_at_log_snr(model.sde.log_snr(t))


@pytest.mark.parametrize(
    "method", ["dopri5", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bosh3", "rk4"))]
)
def test_the_probability_flow_needs_no_float64(method) -> None:
    with PretendDevice("mps"):
        model, x = made(VPSDE, "mps"), torch.rand(2, 3, device="mps")
        options = {"method": method, "rtol": 1e-2, "atol": 1e-2}
        assert ProbabilityFlow(model, **options).sample((2, 3), device="mps").device.type == "mps"
        ProbabilityFlow(model, **options).encode(x)
        ODELikelihood(model, **options)(x)


def test_adaptive_steps_need_no_float64() -> None:
    """A tree of float32 clock readings would have nodes without a distance."""
    t, s = torch.tensor([0.5, 0.9]), torch.tensor([0.499, 0.2])
    wanted = BrownianPath([1, 2]).increment(torch.zeros(2, 3), VPSDE(), t, s)
    with PretendDevice("mps"):
        x, there = torch.zeros(2, 3).to("mps"), [time.to("mps") for time in (t, s)]
        got = BrownianPath([1, 2]).increment(x, VPSDE(), *there)
        assert (torch.tensor(got.tolist()) - wanted).abs().max() < 1e-2
        adaptive = AdaptiveSDE(rtol=0.3, atol=0.3)
        PCSampler(made(VPSDE, "mps"), adaptive, steps=1)((2, 3), device="mps")


def test_bounds_need_no_float64() -> None:
    with PretendDevice("mps"):
        pixels = torch.randint(256, (2, 3, 2)).to("mps")
        flat = Flattened()
        ChainNELBO(EpsModel(flat, DDPMChain.linear(25)).to("mps"))(pixels)
        DiscreteNELBO(EpsModel(flat, LearnedSDE()).to("mps"))(pixels)
        UniformDequantizer()(pixels)


class Flattened(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(6, width=8, depth=1)

    def forward(self, x, noise_label, class_labels=None):
        return self.inner(x.flatten(1), noise_label).view(x.shape)


def test_exact_models_are_made_on_and_moved_to_any_device() -> None:
    means, data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.randn(5, 2)
    x, t = torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    for make, tensor in (
        (lambda m: GaussianMixtureModel(VPSDE(), means=m, stds=[0.3, 0.2]), means),
        (lambda d: EmpiricalModel(VPSDE(), d), data),
    ):
        expected = make(tensor).predict(x, t).x0
        for kind in KINDS:
            with PretendDevice(kind):
                for model in (make(tensor.to(kind)), make(tensor).to(kind)):
                    assert {b.device.type for b in model.buffers()} == {kind}
                    got = model.predict(x.to(kind), t.to(kind)).x0
                    assert (got.cpu() - expected).abs().max() < 1e-5
                    if isinstance(model, GaussianMixtureModel):
                        assert model.sample(4).device.type == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["NCSNpp", "NCSNv2"])
def test_networks_neither_wait_nor_copy(name, kind) -> None:
    with PretendDevice(kind) as device:
        net = (
            NCSNpp(2, width=8, multipliers=(1, 1), blocks=1)
            if name == "NCSNpp"
            else NCSNv2(2, width=8, sigmas=(3.0, 1.0, 0.1))
        ).to(kind)
        x, t = torch.rand(2, 2, 8, 8, device=kind), torch.ones(2, device=kind)
        for _ in range(2):
            with device.watched() as events:
                net(x, t)
    assert not events


def test_the_pretended_device_notices() -> None:
    with PretendDevice("mps") as device:
        x = torch.ones(3, device="mps")
        with device.watched() as events:
            float(x.sum())
            x[x > 0]
            x + torch.tensor([1.0, 2.0, 3.0]).to("mps")
            x.cpu()
        assert [kind for kind, *_ in events.elements()] == ["read", "read", "upload", "read"]
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            x + torch.ones(3)
