"""Runs of samplers: every predictor, corrector and grid, and what else steers a sampler."""

import torch
from run_parts import (
    PROCESSES,
    fill,
    mixture_on,
    model_on,
    network,
    randint,
    randn,
    seeded,
    several,
)

from diffusionkit import (
    DDIM,
    DEIS,
    LMS,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    BrownianPath,
    ChainGrid,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Clip,
    Colorization,
    DenoisedModel,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver3M,
    DynamicThreshold,
    EpsModel,
    Euler,
    EulerMaruyama,
    GradientGuidance,
    Heun,
    Inpainting,
    KarrasGrid,
    Langevin,
    LinearGaussianGuidance,
    LinearMeasurement,
    LogSNRGrid,
    NoiseClassifier,
    PCSampler,
    ProbabilityFlow,
    QuadraticGrid,
    ReverseDiffusion,
    StochasticHeun,
    TimeTravel,
    UniformGrid,
    UniPC,
    ddim_encode,
    slerp,
)
from diffusionkit.control import AveragePool, Blur, Gray, Mask, Matrix
from diffusionkit.networks import MLP

SHAPE = (4, 2)
ANY = ("vp", "subvp", "ve", "edm", "ddpm", "smld")


def _sample(model, predictor, corrector=None, generator=None, **options):
    sampler = PCSampler(model, predictor, corrector, **{"steps": 5} | options)
    return sampler(SHAPE, generator=seeded() if generator is None else generator)


def _table(kinds, processes, **options):
    """Return samples of predictors on processes: of a network, and of an exact model."""
    return {
        f"{name} {process}": torch.cat(
            [_sample(model(process), kind, **options) for model in (model_on, mixture_on)]
        )
        for name, kind in kinds.items()
        for process in processes
    }


def grids():
    """The times of every grid."""
    kinds = {
        "uniform": UniformGrid(to_zero=True),
        "quadratic": QuadraticGrid(),
        "log-SNR": LogSNRGrid(t_end=0.1),
        "Karras": KarrasGrid(rho=5.0),
    }
    found = {
        f"{name} {process}": grid(PROCESSES[process], 6)
        for name, grid in kinds.items()
        for process in ("vp", "edm")
    }
    chain = PROCESSES["ddpm"]
    return {**found, "chain": ChainGrid(chain, to_zero=True)(chain, 7)}


def stochastic_predictors():
    """The predictors that add noise."""
    kinds = {
        "Euler-Maruyama": EulerMaruyama(),
        "reverse diffusion": ReverseDiffusion(),
        "ancestral": Ancestral(),
        "ancestral forward": Ancestral("forward"),
    }
    return _table(kinds, ANY, grid=UniformGrid())


def deterministic_predictors():
    """DDIM of any eta, and Euler's steps."""
    kinds = {"DDIM": DDIM(), "DDIM half": DDIM(0.5), "DDIM one": DDIM(1.0), "Euler": Euler()}
    return _table(kinds, ("vp", "ve", "edm", "ddpm"), grid=UniformGrid())


def learned_variances():
    """The ancestral predictor with a variance that the network predicts."""
    return {
        kind: _sample(model_on("ddpm", variance=kind), Ancestral("model"))
        for kind in ("learned", "learned_range")
    }


def heun_predictors():
    """Heun's steps, with churn and without, and the stochastic ones."""
    kinds = {
        "Heun": Heun(),
        "alpha": Heun(alpha=0.5),
        "churn": Heun(churn=2.0, s_min=0.05, s_max=10.0, s_noise=1.01),
        "stochastic": StochasticHeun(),
    }
    return _table(kinds, ("vp", "edm"), grid=UniformGrid())


def adams_predictors():
    """The solvers of Adams type."""
    kinds = {"DEIS": DEIS(), "DEIS 2": DEIS(2), "LMS": LMS(), "UniPC": UniPC()}
    kinds |= {"UniPC 3": UniPC(3, "B1"), "DPM 2M": DPMSolver2M(), "DPM 2S": DPMSolver2S()}
    return _table(kinds, ("vp", "ve"), grid=LogSNRGrid())


def other_multistep_predictors():
    """The other solvers of DPM type."""
    kinds = {
        "3M": DPMSolver3M(),
        "3M published": DPMSolver3M("published"),
        "2M SDE": DPMSolver2MSDE(),
        "2M SDE heun": DPMSolver2MSDE(0.5, "heun"),
    }
    return _table(kinds, ("vp", "edm"), grid=LogSNRGrid())


def adaptive_predictor():
    """Steps of adaptive size, and how many evaluations they take."""
    found = {}
    # Where float32 rounding would choose the steps, another machine takes other ones.
    for process, dtype, tolerance in (
        ("vp", torch.float64, 0.05),
        ("ve", torch.float64, 0.05),
        ("ve", torch.float32, 1e6),
    ):
        sampler = PCSampler(mixture_on(process), AdaptiveSDE(tolerance, tolerance), steps=2)
        x = sampler(SHAPE, generator=several(4), dtype=dtype)
        found[f"{process} {dtype}"] = x, sampler.nfe
    return found


def correctors():
    """The correctors, alone, before and after a predictor."""
    kinds = {
        "Langevin": Langevin(),
        "batch": Langevin(snr=0.1, steps=2, norm="batch"),
        "annealed": AnnealedLangevin(steps=2),
    }
    found = {}
    for process in ("vp", "ve", "ddpm", "smld"):
        for name, kind in kinds.items():
            model = model_on(process)
            runs = [_sample(model, None, kind), _sample(model, ReverseDiffusion(), kind)]
            runs += [_sample(model, DDIM(), kind, corrector_first=False, denoise=False)]
            found[f"{name} {process}"] = torch.cat(runs)
    return found


def generators():
    """Sources of randomness: none, one, one for each sample and paths."""
    model = model_on("vp")
    torch.manual_seed(3)
    found = {"none": PCSampler(model, Ancestral(), steps=4)(SHAPE)}
    for name, kind in (("ancestral", Ancestral()), ("DDIM", DDIM(1.0)), ("Euler", EulerMaruyama())):
        found[f"{name} each"] = _sample(model, kind, generator=several(4))
        for process in ("vp", "ve"):
            path = BrownianPath(range(4))
            found[f"{name} path {process}"] = _sample(mixture_on(process), kind, generator=path)
    x, sde = randn(3, 5), PROCESSES["vp"]
    t, s = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.4, 0.49, 0.001])
    return {**found, "increments": BrownianPath([0, 7, 2**40]).increment(x, sde, t, s)}


def precisions():
    """Samples in double and half precision, and of a model in training mode."""
    found = {}
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        model = model_on("vp").to(dtype).train()
        found[str(dtype)] = _sample(model, Ancestral()), _sample(model, DPMSolver2M())
    return found


def constraints():
    """Data of which a part is known."""
    known, image = randn(2), randn(4, 3, 2, 2)
    kinds = {
        "colorization": Colorization(image.mean(1, keepdim=True)),
        "pool": LinearMeasurement(AveragePool(2), image.mean((2, 3), keepdim=True)),
    }
    pictures = EpsModel(lambda x, label: 0.5 * x, PROCESSES["ve"])
    found = {
        name: PCSampler(pictures, Ancestral(), steps=4, constraint=kind)(
            image.shape, generator=several(4)
        )
        for name, kind in kinds.items()
    }
    masked = Inpainting(known, torch.tensor([1.0, 0.0]))
    for process in ("vp", "ve"):
        for name, kind in (("ancestral", Ancestral()), ("DDIM", DDIM()), ("2M", DPMSolver2M())):
            model = model_on(process)
            found[f"{name} {process}"] = _sample(model, kind, Langevin(), constraint=masked)
    return found


def operators():
    """Linear measurements of data, and their inverses."""
    x, kernel = randn(2, 3, 4, 4), torch.tensor([[1.0, 2.0, 1.0]]) / 4
    kinds = {
        "mask": Mask(torch.arange(16).reshape(4, 4) % 3 == 0),
        "pool": AveragePool(2),
        "gray": Gray(),
        "blur": Blur(kernel.T @ kernel, (4, 4)),
        "matrix": Matrix(randn(5, 3, 4, 4, seed=2)),
    }
    return {name: (a(x), a.inverse(a(x))) for name, a in kinds.items()}


def time_travel_and_edits():
    """Stretches that are sampled again, and data that are noised and sampled anew."""
    x0 = randn(4, 2)
    found = {}
    for process in ("vp", "ve"):
        options = {"steps": 8, "constraint": Inpainting(x0, torch.tensor([1.0, 0.0]))}
        model = mixture_on(process)
        sampler = PCSampler(model, Ancestral(), time_travel=TimeTravel(3, 2), **options)
        again = sampler(SHAPE, generator=seeded())
        t = 0.6 * model.sde.T
        edited = sampler.edit(x0, t, generator=seeded()), sampler.nfe
        plain = PCSampler(model_on(process), DDIM(), steps=8).edit(x0, t, generator=several(4))
        found[process] = again, edited, plain
    return found


def iteration():
    """Every state of a run: what it is, the model's estimate and the number of evaluations."""
    found = {}
    for name, kind in (("ancestral", Ancestral()), ("Heun", Heun()), ("2M", DPMSolver2M())):
        sampler = PCSampler(model_on("vp"), kind, Langevin(), steps=4)
        states = list(sampler.iterate(SHAPE, generator=seeded()))
        found[name] = {
            "x": torch.stack([state.x for state in states]),
            "mean": torch.stack([state.mean for state in states]),
            "x0": torch.stack([state.x0 for state in states[1:]]),
            "counts": torch.tensor([(state.step, state.nfe) for state in states]),
            "t": torch.tensor([state.t for state in states], dtype=torch.float64),
        }
    return found


def classifier_free_guidance():
    """A network with classes, guided without a classifier."""
    net = network(num_classes=3)
    model = EpsModel(lambda x, label, kind: net(x, label, kind), PROCESSES["vp"])
    found, kind = {}, torch.tensor([0, 1, 1, 0])
    for name, scale, options in (
        ("all", 2.0, {}),
        ("interval", 2.0, {"interval": (0.3, 3.0)}),
        ("rescaled", 4.0, {"rescale": 0.7}),
        ("without", 0.0, {}),
    ):
        guided = ClassifierFreeGuidance(model, scale, null={"kind": 2}, **options)
        sampler = PCSampler(guided, DDIM(), steps=5)
        found[name] = sampler(SHAPE, generator=seeded(), kind=kind), sampler.nfe
    return found


def guidance():
    """Guidance by a classifier, by a gradient and by a linear measurement."""
    model = model_on("vp")
    classifier = NoiseClassifier(fill(MLP(2, out_features=3, width=8, depth=1)), model.sde)
    sampler = PCSampler(ClassifierGuidance(model, classifier, 2.0), Ancestral(), steps=5)
    pulled = GradientGuidance(model, lambda x0: -(x0 - 1.0).square().sum(1), 0.5)
    measured = LinearGaussianGuidance(model, Matrix(torch.tensor([[1.0, 0.5]])), randn(4, 1), 0.1)
    return {
        "classifier": sampler(SHAPE, generator=seeded(), class_labels=randint(3, 4)),
        "gradient": _sample(pulled, DDIM()),
        "measurement": _sample(measured, Ancestral()),
    }


def denoised_models():
    """Samples whose predicted data are kept within a range."""
    return {
        name: _sample(DenoisedModel(model_on("vp"), fn), Ancestral())
        for name, fn in (("clip", Clip(-0.5, 0.5)), ("threshold", DynamicThreshold(0.6)))
    }


def encoding():
    """Data taken to noise along the deterministic path, and slerp."""
    x = randn(4, 2)
    found = {p: ddim_encode(model_on(p), x, steps=6) for p in ("vp", "ve", "ddpm")}
    return {**found, "slerp": slerp(x, randn(4, 2, seed=2), 0.3)}


def probability_flow():
    """Samples, codes and interpolation along the flow, and the number of evaluations."""
    found = {}
    for process in ("vp", "subvp", "ve", "edm"):
        flow = ProbabilityFlow(mixture_on(process), rtol=1e-3, atol=1e-3)
        drawn = flow.sample(SHAPE, generator=seeded(), temperature=0.9), flow.nfe
        code = flow.encode(randn(4, 2)), flow.nfe
        found[process] = drawn, code, flow.decode(code[0])
    fixed = ProbabilityFlow(model_on("vp"), "rk4", options={"step_size": 0.2}, denoise=False)
    found["fixed"] = fixed.sample(SHAPE, generator=seeded())
    found["way"] = fixed.interpolate(randn(2, 2), randn(2, 2, seed=2), 3)
    return found
