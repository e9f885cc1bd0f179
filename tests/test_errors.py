"""Invalid arguments raise a ValueError or TypeError that states what was expected and received."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import seeded
from torch import nn

import diffusionkit
from diffusionkit import (
    DDIM,
    EDMSDE,
    EMA,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    EDMModel,
    EDMWeighting,
    EmpiricalModel,
    EpsModel,
    EulerMaruyama,
    ForwardSDE,
    GaussianMixtureModel,
    IndexLabel,
    KarrasGrid,
    Langevin,
    LikelihoodWeighting,
    LogNormalTimes,
    LogSNRGrid,
    MinSNRWeighting,
    PCSampler,
    ProbabilityFlow,
    QuadraticGrid,
    RawScoreModel,
    ReverseDiffusion,
    ScoreMatching,
    SimpleWeighting,
    StratifiedTimes,
    SubVPSDE,
    UniformGrid,
    UniformTimes,
    VModel,
    X0Model,
    clipped_step,
    linear_warmup,
    suggest_sigma_max,
)
from diffusionkit.testing import check_score_model, check_sde

VP, VE, EDM, SUBVP = VPSDE(), VESDE(), EDMSDE(), SubVPSDE()
SDES = {"vp": VP, "subvp": SUBVP, "ve": VE, "edm": EDM}
MIXTURE = GaussianMixtureModel(VP, means=[[-1.0, 0.0], [1.0, 0.0]], stds=[0.1, 0.1])
EMPIRICAL = EmpiricalModel(VP, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
X = torch.zeros(3, 2)
T = torch.full((3,), 0.5)
S = torch.full((3,), 0.25)
NAN = torch.tensor([[0.0, math.nan]] * 3)
INF = torch.tensor([[0.0, math.inf]] * 3)


class MarginalOnly(ForwardSDE):
    """A user-defined SDE, whose `marginal` validates nothing."""

    def marginal(self, t):
        return torch.exp(-t), torch.sqrt(-torch.expm1(-2 * t))


USER = MarginalOnly()


def zero(x, label, **cond):
    return torch.zeros_like(x)


MODEL = EpsModel(zero, VP)


def returning(output: Callable[[torch.Tensor], Any]) -> EpsModel:
    return EpsModel(lambda x, noise_label: output(x), VP)


def sample(model: Any = MODEL, start: Any = (3, 2), **options: Any) -> Any:
    call = {k: options.pop(k) for k in ("generator", "device", "dtype") if k in options}
    options.setdefault("steps", 2)
    return PCSampler(model, EulerMaruyama(), **options)(start, **call)


def generators(n: int) -> list[torch.Generator]:
    return [seeded(i) for i in range(n)]


def build(part: str, name: str, value: Any) -> Any:
    return getattr(diffusionkit, part)(**{name: value})


CASES: list[Any] = []


def bad(name: str, error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    """Add a case."""
    CASES.append(pytest.param(call, error, match, id=name))


# Times. Every public function validates times alike.
BAD_TIMES = {
    "scalar": (torch.tensor(0.5), ValueError, r"expected one time for each sample.*got \(\)"),
    "column": (T[:, None], ValueError, r"expected one time for each sample.*got \(3, 1\)"),
    "integer": (torch.ones(3, dtype=torch.long), TypeError, r"floating-point.*got torch\.int64"),
    "nan": (torch.tensor([0.5, math.nan, 0.5]), ValueError, r"within \[0, T\].*got .*nan"),
    "negative": (torch.tensor([0.5, -0.1, 0.5]), ValueError, r"within \[0, T\].*from -0\.1 to"),
    "late": (torch.tensor([0.5, 200.0, 0.5]), ValueError, r"within \[0, T\].*to 200"),
    "number": (0.5, TypeError, r"expected a tensor of shape \(B,\), got float"),
}
OTHER_BATCH = {
    "one": (T[:1], ValueError, r"shape \(3,\), got \(1,\)"),
    "four": (torch.full((4,), 0.5), ValueError, r"shape \(3,\), got \(4,\)"),
    "device": (T.to("meta"), ValueError, r"expected the device of x, cpu, got meta"),
}
ALONE = {
    **{f"{name}.marginal": sde.marginal for name, sde in SDES.items()},
    **{f"{name}.diffusion": sde.diffusion for name, sde in SDES.items()},
    **{f"{name}.drift_coefficient": sde.drift_coefficient for name, sde in SDES.items()},
    **{f"{name}.log_snr": sde.log_snr for name, sde in SDES.items()},
    **{
        f"{name}.transition-t": lambda t, sde=sde: sde.transition(S, t)
        for name, sde in SDES.items()
    },
    **{
        f"{name}.transition-s": lambda s, sde=sde: sde.transition(s, T)
        for name, sde in SDES.items()
    },
    "user.transition": lambda t: USER.transition(S, t),
    "LikelihoodWeighting": lambda t: LikelihoodWeighting()(VP, t),
    "EDMWeighting": lambda t: EDMWeighting()(VP, t),
    "MinSNRWeighting": lambda t: MinSNRWeighting()(VP, t),
}
WITH_STATE = {
    **{f"{name}.drift": lambda t, sde=sde: sde.drift(X, t) for name, sde in SDES.items()},
    **{f"{name}.perturb": lambda t, sde=sde: sde.perturb(X, t) for name, sde in SDES.items()},
    "user.drift": lambda t: USER.drift(X, t),
    "user.perturb": lambda t: USER.perturb(X, t),
    **{
        f"{kind.__name__}.predict": lambda t, kind=kind: kind(zero, VP).predict(X, t)
        for kind in (EpsModel, X0Model, VModel, RawScoreModel, EDMModel)
    },
    "EpsModel.forward": lambda t: MODEL(X, t),
    "user.predict": lambda t: EpsModel(zero, USER).predict(X, t),
    "GaussianMixtureModel": lambda t: MIXTURE.predict(X, t),
    "GaussianMixtureModel.log_prob": lambda t: MIXTURE.log_prob(X, t),
    "EmpiricalModel": lambda t: EMPIRICAL.predict(X, t),
    "ScoreMatching": lambda t: ScoreMatching()(MODEL, X, t=t),
    **{
        f"{type(p).__name__}-{which}": lambda t, p=p, which=which: (
            p.step(MODEL, X, t, S) if which == "t" else p.step(MODEL, X, T, t)
        )
        for p in (EulerMaruyama(), ReverseDiffusion(), Ancestral(), DDIM())
        for which in "ts"
    },
    "Langevin": lambda t: Langevin().step(MODEL, X, t),
    "AnnealedLangevin": lambda t: AnnealedLangevin().step(MODEL, X, t),
}
for where, call in ALONE.items():
    for name, (t, error, match) in BAD_TIMES.items():
        bad(f"times-{where}-{name}", error, match, lambda call=call, t=t: call(t))
for where, call in WITH_STATE.items():
    for name, (t, error, match) in {**BAD_TIMES, **OTHER_BATCH}.items():
        bad(f"times-{where}-{name}", error, match, lambda call=call, t=t: call(t))

# Steps and transitions.
for name, sde in {**SDES, "user": USER}.items():
    bad(f"{name}.transition-backwards", ValueError, r"expected s <= t, got s = .*0\.5.*t = .*0\.25",
        lambda sde=sde: sde.transition(T, S))  # fmt: skip
    bad(f"{name}.transition-batches", ValueError, r"shape \(3,\), got \(2,\)",
        lambda sde=sde: sde.transition(S, T[:2]))  # fmt: skip
for predictor in (EulerMaruyama(), ReverseDiffusion(), Ancestral(), DDIM()):
    for name, s in {"same": T, "later": torch.full((3,), 0.75)}.items():
        bad(f"{type(predictor).__name__}-{name}", ValueError, r"expected s < t, got s = .* t = ",
            lambda p=predictor, s=s: p.step(MODEL, X, T, s))  # fmt: skip

# States and data.
STATES = {
    "nothing": (None, TypeError, r"expected a tensor of shape \(B, \*D\), got NoneType"),
    "list": ([[0.0]], TypeError, r"expected a tensor of shape \(B, \*D\), got list"),
    "integer": (X.long(), TypeError, r"expected a floating-point tensor, got torch\.int64"),
    "complex": (X + 0j, TypeError, r"expected a floating-point tensor, got torch\.complex64"),
    "scalar": (torch.tensor(1.0), ValueError, r"expected shape \(B, \*D\), got"),
    "empty": (torch.zeros(0, 2), ValueError, r"expected a non-empty batch, got shape \(0, 2\)"),
    "hollow": (torch.zeros(3, 0), ValueError, r"expected a non-empty batch, got shape \(3, 0\)"),
}
TAKES_STATE = {
    "ScoreMatching": lambda x: ScoreMatching()(MODEL, x),
    "perturb": lambda x: VP.perturb(x, T),
    "drift": lambda x: VP.drift(x, T),
    "prior_log_prob": VP.prior_log_prob,
    "predict": lambda x: MODEL.predict(x, T),
    "mixture": lambda x: MIXTURE.predict(x, T),
    "empirical": lambda x: EMPIRICAL.predict(x, T),
    "EmpiricalModel": lambda x: EmpiricalModel(VP, x),
    "suggest_sigma_max": suggest_sigma_max,
    "encode": lambda x: ProbabilityFlow(MODEL).encode(x),
    "decode": lambda x: ProbabilityFlow(MODEL).decode(x),
}
NOT_FINITE = ("ScoreMatching", "EmpiricalModel", "suggest_sigma_max", "encode", "decode")
for where, call in TAKES_STATE.items():
    for name, (x, error, match) in STATES.items():
        bad(f"state-{where}-{name}", error, match, lambda call=call, x=x: call(x))
    if where in NOT_FINITE:
        for name, x in (("nan", NAN), ("inf", INF)):
            bad(f"state-{where}-{name}", ValueError, r"expected finite values, got 3 that are NaN",
                lambda call=call, x=x: call(x))  # fmt: skip
for name in ("integer", "scalar", "empty"):
    x, error, match = STATES[name]
    bad(f"start-PCSampler-{name}", error, match, lambda x=x: sample(start=x))
    bad(f"start-ProbabilityFlow-{name}", error, match, lambda x=x: ProbabilityFlow(MODEL).sample(x))
for name, call in {
    "PCSampler": lambda x: sample(start=x),
    "iterate": lambda x: PCSampler(MODEL, DDIM(), steps=2).iterate(x),
    "ProbabilityFlow": lambda x: ProbabilityFlow(MODEL).sample(x),
}.items():
    bad(f"start-{name}-nan", ValueError, r"expected finite values, got 3", lambda c=call: c(NAN))
    for shape in ((), (0, 2), (3, -1), (3, 2.0), (True, 2)):
        bad(f"start-{name}-shape{shape}", ValueError, r"shape: expected positive integers.*got \(",
            lambda c=call, shape=shape: c(shape))  # fmt: skip
bad("prior_sample-shape", ValueError, r"expected positive integers.*got \(3, 0\)",
    lambda: VP.prior_sample((3, 0)))  # fmt: skip
bad("start-dtype", ValueError, r"float64, got cpu, torch\.float32",
    lambda: sample(start=X, dtype=torch.float64))  # fmt: skip
bad("start-device", ValueError, r"state on meta.*got cpu",
    lambda: sample(start=X, device="meta"))  # fmt: skip
bad("suggest_sigma_max-one", ValueError, r"at least two points, got 1",
    lambda: suggest_sigma_max(X[:1]))  # fmt: skip
bad("suggest_sigma_max-equal", ValueError, r"at least two different points",
    lambda: suggest_sigma_max(X))  # fmt: skip
bad("suggest_sigma_max-block", ValueError, r"block: expected an integer >= 1, got 0",
    lambda: suggest_sigma_max(torch.randn(3, 2), block=0))  # fmt: skip
bad("mixture-state", ValueError, r"expected shape \(B, \*\(2,\)\), got \(3, 3\)",
    lambda: MIXTURE.predict(torch.zeros(3, 3), T))  # fmt: skip
bad("empirical-state", ValueError, r"expected shape \(B, \*\(2,\)\), got \(3, 2, 1\)",
    lambda: EMPIRICAL.predict(X[..., None], T))  # fmt: skip

# Reference data.
for name, (reference, error, match) in {
    "shape": (
        torch.zeros(5, 3),
        ValueError,
        r"reference: expected shape \(n, \*\(2,\)\).*\(5, 3\)",
    ),
    "rank": (torch.zeros(5), ValueError, r"reference: expected shape \(n, \*\(2,\)\).*\(5,\)"),
    "dtype": (
        X.double(),
        ValueError,
        r"reference: expected the dtype of x0.*float32, got.*float64",
    ),
    "device": (X.to("meta"), ValueError, r"reference: expected the device of x0, cpu, got meta"),
    "nan": (NAN, ValueError, r"reference: expected finite values, got 3"),
    "empty": (X[:0], ValueError, r"reference: expected a non-empty batch, got shape \(0, 2\)"),
    "integer": (X.long(), TypeError, r"reference: expected a floating-point tensor, got"),
    "list": ([1.0], TypeError, r"reference: expected a tensor.*got list"),
}.items():
    bad(f"reference-{name}", error, match,
        lambda r=reference: ScoreMatching()(MODEL, X, reference=r))  # fmt: skip

# Networks.
for name, (output, error, match) in {
    "shape": (lambda x: x[:, :1], ValueError, r"network: .*shape \(3, 2\), got \(3, 1\)"),
    "flat": (lambda x: x.sum(1), ValueError, r"network: .*shape \(3, 2\), got \(3,\)"),
    "batch": (lambda x: x[:1], ValueError, r"network: .*shape \(3, 2\), got \(1, 2\)"),
    "tuple": (lambda x: (x, x), TypeError, r"network: .*shape \(3, 2\), got tuple"),
    "none": (lambda x: None, TypeError, r"network: .*shape \(3, 2\), got NoneType"),
}.items():
    bad(f"network-{name}-predict", error, match, lambda o=output: returning(o).predict(X, T))
    bad(f"network-{name}-loss", error, match, lambda o=output: ScoreMatching()(returning(o), X))
    bad(f"network-{name}-PCSampler", error, match, lambda o=output: sample(returning(o)))
    bad(f"network-{name}-ProbabilityFlow", error, match,
        lambda o=output: ProbabilityFlow(returning(o)).sample((3, 2)))  # fmt: skip

# Parameters of processes.
for kind in (VESDE, EDMSDE):
    for low, high in ((1.0, 1.0), (2.0, 1.0)):
        bad(f"{kind.__name__}-{low}-{high}", ValueError, rf"sigma_min < sigma_max, got {low} and",
            lambda kind=kind, low=low, high=high: kind(low, high))  # fmt: skip
    bad(f"{kind.__name__}-name", ValueError, r"sigma_max: expected a finite number > 0, got inf",
        lambda kind=kind: kind(sigma_max=math.inf))  # fmt: skip
for kind in (VPSDE, SubVPSDE):
    bad(f"{kind.__name__}-order", ValueError, r"beta_min <= beta_max, got 2\.0 and 1\.0",
        lambda kind=kind: kind(2.0, 1.0))  # fmt: skip
for part, name in {
    "VESDE": "sigma_min", "EDMSDE": "sigma_min", "VPSDE": "beta_min", "SubVPSDE": "beta_max",
    "EDMWeighting": "sigma_data", "MinSNRWeighting": "gamma", "LogNormalTimes": "std",
    "Langevin": "snr", "AnnealedLangevin": "snr", "KarrasGrid": "rho", "TimeLabel": "scale",
    "ReverseTimeLabel": "scale",
    "LogSigmaLabel": "scale",
}.items():  # fmt: skip
    for value in (0.0, -0.5, math.nan, math.inf):
        bad(f"{part}-{value}", ValueError, rf"{name}: expected a finite number > 0, got {value}",
            lambda part=part, name=name, value=value: build(part, name, value))  # fmt: skip
    for value in ("1", None, True):
        bad(f"{part}-{value!r}", TypeError, rf"{name}: expected a number, got",
            lambda part=part, name=name, value=value: build(part, name, value))  # fmt: skip
bad("LogNormalTimes-mean", ValueError, r"mean: expected a finite number, got nan",
    lambda: LogNormalTimes(mean=math.nan))  # fmt: skip
bad("LogNormalTimes-mean-type", TypeError, r"mean: expected a number, got str",
    lambda: LogNormalTimes(mean="0"))  # fmt: skip

# Parameters of samplers.
COUNTS = {
    "PCSampler": ("steps", lambda n: PCSampler(MODEL, DDIM(), steps=n)),
    "UniformGrid": ("steps", lambda n: UniformGrid()(VP, n)),
    "KarrasGrid": ("steps", lambda n: KarrasGrid()(VP, n)),
    "Langevin": ("steps", lambda n: Langevin(steps=n)),
    "AnnealedLangevin": ("steps", lambda n: AnnealedLangevin(steps=n)),
    "linear_warmup": (
        "steps", lambda n: linear_warmup(torch.optim.SGD([torch.ones(1)], lr=1.0), n)
    ),
    "UniformTimes": ("n", lambda n: UniformTimes().sample(VP, n)),
    "StratifiedTimes": ("n", lambda n: StratifiedTimes().sample(VP, n)),
    "LogNormalTimes": ("n", lambda n: LogNormalTimes().sample(VP, n)),
    "mixture.sample": ("n", lambda n: MIXTURE.sample(n)),
    "EmpiricalModel": ("block", lambda n: EmpiricalModel(VP, X, block=n)),
}  # fmt: skip
for where, (name, call) in COUNTS.items():
    for n in (0, -3):
        bad(f"count-{where}-{n}", ValueError, rf"{name}: expected an integer >= 1, got {n}",
            lambda call=call, n=n: call(n))  # fmt: skip
    for n in (True, 2.0, None, "2"):
        bad(f"count-{where}-{n!r}", TypeError,
            rf"{name}: expected an integer, got {type(n).__name__}",
            lambda call=call, n=n: call(n))  # fmt: skip
bad("to_zero-steps", ValueError, r"steps: expected an integer >= 2, got 1",
    lambda: KarrasGrid(to_zero=True)(EDM, 1))  # fmt: skip
for eta in (-0.1, 1.5, math.nan):
    bad(f"DDIM-{eta}", ValueError, rf"eta: expected a number in \[0, 1\], got {eta}",
        lambda eta=eta: DDIM(eta=eta))  # fmt: skip
bad("DDIM-type", TypeError, r"eta: expected a number, got str", lambda: DDIM(eta="0"))
bad("Ancestral-variance", ValueError, r"variance: expected one of 'posterior', .*, got 'learned'",
    lambda: Ancestral(variance="learned"))  # fmt: skip
bad("Langevin-norm", ValueError, r"norm: expected one of 'sample', 'batch', got 'layer'",
    lambda: Langevin(norm="layer"))  # fmt: skip
bad("PCSampler-empty", ValueError, r"expected a predictor, a corrector or both, got neither",
    lambda: PCSampler(MODEL, None))  # fmt: skip
for t_end in (0.0, 1.0, 2.0, -0.1, math.nan):
    bad(f"ProbabilityFlow-t_end-{t_end}", ValueError, rf"t_end: expected .*\(0, 1\), got {t_end}",
        lambda t_end=t_end: ProbabilityFlow(MODEL, t_end=t_end))  # fmt: skip
for name in ("rtol", "atol"):
    bad(f"ProbabilityFlow-{name}", ValueError, rf"{name}: expected a finite number > 0, got 0",
        lambda name=name: ProbabilityFlow(MODEL, **{name: 0.0}))  # fmt: skip
bad("ProbabilityFlow-method", ValueError, r"method: expected one of 'dopri8', .*got 'magic'",
    lambda: ProbabilityFlow(MODEL, method="magic"))  # fmt: skip

# Grids.
for name, (grid, match) in {
    "increasing": ([0.1, 0.5, 1.0], r"strictly decreasing times, got \[0\.1"),
    "constant": ([1.0, 0.5, 0.5], r"strictly decreasing times, got \[1\.0, 0\.5, 0\.5\]"),
    "not-monotone": ([1.0, 0.5, 0.7], r"strictly decreasing times, got"),
    "nan": ([1.0, math.nan, 0.1], r"strictly decreasing times, got .*nan"),
    "late": ([1.5, 0.5], r"within \[0, T\] = \[0, 1\], got 1\.5 to 0\.5"),
    "infinite": ([math.inf, 0.5], r"within \[0, T\] = \[0, 1\], got inf to 0\.5"),
    "negative": ([1.0, -0.5], r"within \[0, T\] = \[0, 1\], got 1 to -0\.5"),
    "single": ([1.0], r"at least two times \(N \+ 1,\), got \(1,\)"),
    "none": ([], r"at least two times \(N \+ 1,\), got \(0,\)"),
    "square": ([[1.0, 0.5]], r"at least two times \(N \+ 1,\), got \(1, 2\)"),
}.items():
    tensor = torch.tensor(grid)
    bad(f"grid-{name}", ValueError, match, lambda grid=tensor: sample(grid=grid))
    bad(f"grid-callable-{name}", ValueError, match,
        lambda grid=tensor: sample(grid=lambda sde, steps: grid))  # fmt: skip
bad("grid-list", TypeError, r"grid: expected a callable or a tensor, got list",
    lambda: sample(grid=[1.0, 0.5]))  # fmt: skip
bad("grid-returns-list", TypeError, r"grid: expected a Tensor, got list",
    lambda: sample(grid=lambda sde, steps: [1.0, 0.5]))  # fmt: skip
for kind in (UniformGrid, QuadraticGrid, LogSNRGrid, KarrasGrid):
    for t_end in (1.0, 2.0, -0.5, math.nan):
        bad(f"{kind.__name__}-{t_end}", ValueError, rf"t_end: expected a .*time .*, got {t_end}",
            lambda kind=kind, t_end=t_end: kind(t_end=t_end)(VP, 4))  # fmt: skip
bad("LogSNRGrid-zero", ValueError, r"t_end: expected a time with noise for LogSNRGrid, got 0",
    lambda: LogSNRGrid(t_end=0.0)(VP, 4))  # fmt: skip

# Generators.
for name, call in {
    "PCSampler": lambda g: sample(generator=g),
    "PCSampler-start": lambda g: sample(start=X, generator=g),
    "ProbabilityFlow": lambda g: ProbabilityFlow(MODEL).sample((3, 2), generator=g),
    "ScoreMatching": lambda g: ScoreMatching()(MODEL, X, generator=g),
    "perturb": lambda g: VP.perturb(X, T, generator=g),
    "prior_sample": lambda g: VP.prior_sample((3, 2), generator=g),
    "UniformTimes": lambda g: UniformTimes().sample(VP, 3, generator=g),
    "LogNormalTimes": lambda g: LogNormalTimes().sample(VP, 3, generator=g),
    "mixture.sample": lambda g: MIXTURE.sample(3, generator=g),
    "ReverseDiffusion": lambda g: ReverseDiffusion().step(MODEL, X, T, S, generator=g),
    "Langevin": lambda g: Langevin().step(MODEL, X, T, generator=g),
    "AnnealedLangevin": lambda g: AnnealedLangevin().step(MODEL, X, T, generator=g),
}.items():
    bad(f"generator-{name}-count", ValueError, r"one generator for each of the 3 samples, got 2",
        lambda call=call: call(generators(2)))  # fmt: skip
    bad(f"generator-{name}-seed", TypeError, r"expected a torch\.Generator.*got int",
        lambda call=call: call(0))  # fmt: skip
    bad(f"generator-{name}-seeds", TypeError, r"expected a torch\.Generator.*got list",
        lambda call=call: call([0, 1, 2]))  # fmt: skip
bad("generator-StratifiedTimes", ValueError, r"expected a torch\.Generator or None, got list",
    lambda: StratifiedTimes().sample(VP, 3, generator=generators(3)))  # fmt: skip

# Arguments of the wrong type: a network for a model, a class for an instance.
NET = nn.Linear(2, 2)
for name, (match, call) in {
    "sampler-predictor-class": (
        "predictor: expected a Predictor, got the class ReverseDiffusion",
        lambda: PCSampler(MODEL, ReverseDiffusion),
    ),
    "sampler-corrector-class": (
        "corrector: expected a Corrector, got the class Langevin",
        lambda: PCSampler(MODEL, DDIM(), Langevin),
    ),
    "sampler-swapped": (
        "predictor: expected a Predictor, got Langevin", lambda: PCSampler(MODEL, Langevin())
    ),
    "sampler-network": (
        "model: expected a ScoreModel, got Linear", lambda: PCSampler(NET, DDIM())
    ),
    "sampler-sde": ("model: expected a ScoreModel, got VPSDE", lambda: PCSampler(VP, DDIM())),
    "flow-network": ("model: expected a ScoreModel, got Linear", lambda: ProbabilityFlow(NET)),
    "loss-network": (
        r"model: expected a ScoreModel, got Linear; make one of a network: EpsModel\(network",
        lambda: ScoreMatching()(NET, X),
    ),
    "loss-weighting-class": (
        "weighting: expected a Weighting, got the class SimpleWeighting",
        lambda: ScoreMatching(SimpleWeighting),
    ),
    "loss-weighting-name": (
        "weighting: expected a Weighting, got the string 'likelihood'",
        lambda: ScoreMatching("likelihood"),
    ),
    "loss-times-class": (
        "times: expected a TimeSampler, got the class UniformTimes",
        lambda: ScoreMatching(times=UniformTimes),
    ),
    "loss-target": (
        "target: expected a TargetEstimator, got UniformTimes",
        lambda: ScoreMatching(target=UniformTimes()),
    ),
    "model-sde-class": (
        "sde: expected a ForwardSDE, got the class VPSDE", lambda: EpsModel(NET, VPSDE)
    ),
    "model-swapped": ("sde: expected a ForwardSDE, got Linear", lambda: EpsModel(VP, NET)),
    "model-network": ("network: expected a callable, got int", lambda: EpsModel(3, VP)),
    "model-label": ("label: expected a callable, got str", lambda: EpsModel(NET, VP, label="t")),
    "mixture-sde": (
        "sde: expected a ForwardSDE, got list", lambda: GaussianMixtureModel([[0.0]], [[0.0]], [1])
    ),
    "empirical-sde": ("sde: expected a ForwardSDE, got Tensor", lambda: EmpiricalModel(X, VP)),
    "check_sde-class": (
        "sde: expected a ForwardSDE, got the class VPSDE", lambda: check_sde(VPSDE)
    ),
    "check_score_model": (
        "model: expected a ScoreModel, got Linear", lambda: check_score_model(NET, (2, 2))
    ),
    "EMA-sde": ("model: expected a Module, got VPSDE", lambda: EMA(VP)),
}.items():  # fmt: skip
    bad(f"type-{name}", TypeError, match, call)

# Oracles, labels, EMA, optimizer steps.
for name, (means, stds, weights, match) in {
    "flat": ([0.0, 1.0], [1.0, 1.0], None, r"means, .*\(K, \*D\).*got \(2,\), \(2,\) and \(2,\)"),
    "stds": ([[0.0], [1.0]], [1.0], None, r"stds, .*\(K,\).*got \(2, 1\), \(1,\) and"),
    "weights": ([[0.0], [1.0]], [1.0, 1.0], [1.0], r"weights: .*\(K,\).*and \(1,\)"),
    "negative-std": ([[0.0]], [-1.0], None, r"expected stds >= 0 .*got \[-1\.0\]"),
    "negative-weight": ([[0.0], [1.0]], [1.0, 1.0], [2.0, -1.0], r"weights >= 0.*-1\.0"),
    "zero-weights": ([[0.0]], [1.0], [0.0], r"not all 0.*\[0\.0\]"),
    "nan-mean": ([[math.nan]], [1.0], None, r"means: expected finite values, got 1"),
    "nan-std": ([[0.0]], [math.nan], None, r"stds: expected finite values, got 1"),
    "nan-weight": ([[0.0]], [1.0], [math.nan], r"weights: expected finite values, got 1"),
    "empty": (torch.zeros(0, 1), [], None, r"got \(0, 1\), \(0,\)|not all 0"),
}.items():
    bad(f"mixture-{name}", ValueError, match,
        lambda m=means, s=stds, w=weights: GaussianMixtureModel(VP, m, s, w))  # fmt: skip
bad("empirical-vector", ValueError, r"data: expected shape \(N, \*D\), got \(3,\)",
    lambda: EmpiricalModel(VP, torch.ones(3)))  # fmt: skip
for value in (0.0, -1.0, math.nan):
    bad(f"EDMModel-{value}", ValueError, rf"sigma_data: expected a finite number > 0, got {value}",
        lambda value=value: EDMModel(zero, EDM, sigma_data=value))  # fmt: skip
for table in ([1.0], [1.0, 1.0], [2.0, 1.0, 3.0], [1.0, -1.0], [1.0, math.nan], []):
    bad(f"IndexLabel-{table}", ValueError, r"sigmas: expected at least two positive.*got \[",
        lambda table=table: IndexLabel(table))  # fmt: skip
for decay in (1.0, -0.1, math.nan):
    bad(f"EMA-{decay}", ValueError, rf"decay: expected a number in \[0, 1\), got {decay}",
        lambda decay=decay: EMA(NET, decay))  # fmt: skip
bad("clipped_step-norm", ValueError, r"max_norm: expected a finite number > 0, got 0",
    lambda: clipped_step(torch.optim.SGD([torch.ones(1)], lr=1.0), 0.0))  # fmt: skip
bad("check_score_model-shape", ValueError, r"shape: expected positive integers.*got \(0, 2\)",
    lambda: check_score_model(MODEL, (0, 2)))  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), CASES)
def test_invalid_arguments_raise(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
