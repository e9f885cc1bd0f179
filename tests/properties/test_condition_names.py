"""A condition may have any name that is no option of the call: x, t, shape, model, ..."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typing_extensions import override

import diffusionkit
from diffusionkit import (
    DDIM,
    DEIS,
    NELBO,
    VLB,
    VPSDE,
    AdaptiveSDE,
    AnnealedLangevin,
    Autoguidance,
    ChainNELBO,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Clip,
    DDPMChain,
    DenoisedModel,
    DiscreteNELBO,
    EpsModel,
    GaussianDecoder,
    GradientGuidance,
    Heun,
    Langevin,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    LogSNRSDE,
    ODELikelihood,
    PCSampler,
    Prediction,
    ProbabilityFlow,
    PseudoinverseGuidance,
    ScheduleTransformedModel,
    ScoreMatching,
    ScoreModel,
    StochasticHeun,
    ddim_encode,
)
from diffusionkit.control import Matrix
from diffusionkit.testing import check_score_model

NAMES = (
    "x", "t", "s", "x0", "z", "y", "eps", "state", "start", "shape", "model", "self", "sample",
    "images", "network", "noise_label", "args", "kwargs", "cond", "n", "predict", "value",
)  # fmt: skip
N = 3
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randint(0, 256, (N, 2))
TIMES = torch.full((N,), 0.4)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def received(seen: dict[str, Tensor]):
    """Return a network that adds up its conditions, and keeps them."""

    def network(x: Tensor, noise_label: Tensor, /, **cond: Tensor) -> Tensor:
        seen.update(cond)
        return 0.3 * x + 1e-3 * sum(value.mean() for value in cond.values())

    return network


def classifier(x: Tensor, t: Tensor) -> Tensor:
    return x


class Wrapped(ScoreModel):
    """A user's model around another."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model, self.sde = model, model.sde

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Tensor) -> Prediction:
        return self.model.predict(x, t, **cond)


def flow(model):
    return ProbabilityFlow(model, "euler", options={"step_size": 0.5})


def sample(*parts):
    return lambda m, c: PCSampler(m, *parts, steps=3)(X, generator=seeded(), **c)


def wrapped(make):
    return lambda m, c: make(m).predict(X, TIMES, **c)


RUNS = {
    "predict": lambda m, c: m.predict(X, TIMES, **c),
    "sampler": sample(DDIM(), Langevin()),
    "annealed": sample(DDIM(), AnnealedLangevin()),
    "Heun": sample(Heun()),
    "StochasticHeun": sample(StochasticHeun()),
    "DEIS": sample(DEIS()),
    "AdaptiveSDE": sample(AdaptiveSDE()),
    "iterate": lambda m, c: list(PCSampler(m, DDIM(), steps=2).iterate(X, **c)),
    "edit": lambda m, c: PCSampler(m, DDIM(), steps=2).edit(X, 0.9, generator=seeded(), **c),
    "flow": lambda m, c: flow(m).sample((N, 2), generator=seeded(), **c),
    "flow encode": lambda m, c: flow(m).encode(X, **c),
    "flow decode": lambda m, c: flow(m).decode(X, **c),
    "interpolate": lambda m, c: flow(m).interpolate(X, -X, **c),
    "ddim_encode": lambda m, c: ddim_encode(m, X, steps=2, **c),
    "ODELikelihood": lambda m, c: ODELikelihood(m, rtol=0.5, atol=0.5)(X, **c),
    "NELBO": lambda m, c: NELBO(m)(X, **c),
    "ChainNELBO": lambda m, c: ChainNELBO(
        EpsModel(m.network, DDPMChain.linear(25))
    )(IMAGES, **c),
    "DiscreteNELBO": lambda m, c: DiscreteNELBO(EpsModel(m.network, LogSNRSDE()))(IMAGES, **c),
    "objective": lambda m, c: ScoreMatching()(m, X, generator=seeded(), **c),
    "VLB": lambda m, c: VLB()(
        EpsModel(m.network, DDPMChain.linear(25)), GaussianDecoder().encode(IMAGES), **c
    ),
    "check_score_model": lambda m, c: check_score_model(m, (N, 2), **c),
    "ClassifierFreeGuidance": wrapped(lambda m: ClassifierFreeGuidance(m, 2.0)),
    "Autoguidance": wrapped(lambda m: Autoguidance(m, m, 2.0)),
    "ClassifierGuidance": lambda m, c: ClassifierGuidance(m, classifier).predict(
        X, TIMES, class_labels=torch.tensor(1), **c
    ),
    "GradientGuidance": wrapped(lambda m: GradientGuidance(m, lambda x0: x0.sum(1))),
    "LinearGaussianGuidance": wrapped(
        lambda m: LinearGaussianGuidance(m, Matrix(torch.eye(2)), torch.zeros(N, 2), 0.1)
    ),
    "LinearizedGaussianGuidance": wrapped(
        lambda m: LinearizedGaussianGuidance(m, Matrix(torch.eye(2)), torch.zeros(N, 2), 0.1)
    ),
    "PseudoinverseGuidance": wrapped(
        lambda m: PseudoinverseGuidance(m, Matrix(torch.eye(2)), torch.zeros(N, 2), 0.1)
    ),
    "DenoisedModel": wrapped(lambda m: DenoisedModel(m, Clip())),
    "ScheduleTransformedModel": wrapped(lambda m: ScheduleTransformedModel(m, VPSDE(0.2, 10.0))),
    "a user's wrapper": wrapped(Wrapped),
}  # fmt: skip


# Times and noise of a loss are options, as generator is; torch's call of a module takes self.
TAKEN = {"objective": ("t", "eps"), "VLB": ("t",), "check_score_model": ("self",)}


@pytest.mark.parametrize("run", RUNS)
def test_conditions_of_any_name_reach_the_network(run: str) -> None:
    names = [name for name in NAMES if name not in TAKEN.get(run, ())]
    seen: dict[str, Tensor] = {}
    cond = {name: torch.full((N, 2), float(k)) for k, name in enumerate(names)}
    RUNS[run](EpsModel(received(seen), VPSDE()), cond)
    assert set(seen) == set(names)
    assert all(bool((seen[name] == k).all()) for k, name in enumerate(names))


def test_every_signature_with_conditions_is_positional_only() -> None:
    """Also of what no run above calls: each parameter before the conditions has no name."""
    found = 0
    for path in Path(diffusionkit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            rest = node.args.kwarg
            if rest is None or rest.arg != "cond" or path.name == "unet_adapter.py":
                continue  # a U-Net of diffusers is called with the names of its parameters
            found += 1
            required = len(node.args.args) - len(node.args.defaults)
            assert required <= 0, f"{path.name}: {node.name}"
    assert found > 30


class Named(Wrapped):
    """A user's model whose parameters can be passed by name."""

    @override
    def predict(self, x: Tensor, t: Tensor, **cond: Tensor) -> Prediction:
        return self.model.predict(x, t, **cond)


def test_a_user_s_model_with_named_parameters_is_told_how_to_write_them() -> None:
    model = Named(EpsModel(received({}), VPSDE()))
    assert PCSampler(model, DDIM(), steps=2)(X, y=X).shape == X.shape
    with pytest.raises(TypeError, match=r"Named.predict: .*'x'.* write def predict\(self, x, t, /"):
        PCSampler(model, DDIM(), steps=2)(X, x=X)
