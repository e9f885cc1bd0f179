"""torch.func over parameters and samples, for every model, process, weighting and step."""

import pytest
import torch
from support import seeded
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    DDPMChain,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver2SAncestral,
    EDMModel,
    EDMWeighting,
    EpsModel,
    Euler,
    EulerMaruyama,
    ForwardSDE,
    Heun,
    Langevin,
    LearnedSDE,
    LikelihoodWeighting,
    LogSNRSDE,
    MinSNRWeighting,
    Prediction,
    RawScoreModel,
    ReverseDiffusion,
    SASolver,
    ScaledScoreModel,
    SimpleWeighting,
    StochasticHeun,
    SubVPSDE,
    VModel,
    X0Model,
)


class Own(ForwardSDE):
    """A user's process: drift and diffusion come from automatic differentiation."""

    def marginal(self, t):
        return torch.exp(-2 * t * t), torch.sqrt(-torch.expm1(-4 * t * t))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x, noise_label):
        label = noise_label.to(x.dtype).unsqueeze(1) / 1000
        return self.linear(torch.cat([x, label], 1))


SDES = {
    "VP": VPSDE(), "sub-VP": SubVPSDE(), "VE": VESDE(), "EDM": EDMSDE(), "VDM": LogSNRSDE(),
    "chain": DDPMChain.linear(100), "learned": LearnedSDE(), "own": Own(),
}  # fmt: skip
MODELS = [EpsModel, X0Model, VModel, EDMModel, RawScoreModel, ScaledScoreModel]
X = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)


class Calls(nn.Module):
    """A module that passes its arguments to a function of a model."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        return self.function(self.model, *args)


def ensemble(function, kind, sde, *args, **kwargs):
    """Return the values of three models at once, and one by one."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(Calls(kind(Net(), sde), function))
    parameters, buffers = stack_module_state(models)

    def one(p, b):
        return functional_call(models[0], (p, b), args)

    return vmap(one, **kwargs)(parameters, buffers), torch.stack([m(*args) for m in models])


@pytest.mark.parametrize("name", [name for name in SDES if name != "learned"])
@pytest.mark.parametrize("kind", MODELS)
def test_predictions_of_an_ensemble(kind, name):
    sde = SDES[name]
    t = torch.full((5,), 0.5 * sde.T, dtype=torch.float64)
    for what in ("score", "x0", "eps", "v"):
        got, right = ensemble(
            lambda m, x, t, what=what: getattr(m.predict(x, t), what), kind, sde, X, t
        )
        torch.testing.assert_close(got, right)


STEPS = [
    Ancestral(), DDIM(), DDIM(eta=1.0), ReverseDiffusion(), EulerMaruyama(), Euler(), Heun(),
    DPMSolver2M(), DPMSolver2S(), DPMSolver2MSDE(), StochasticHeun(), DPMSolver2SAncestral(),
    SASolver(),
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_steps_of_an_ensemble(step):
    t, s = torch.full((5,), 0.5), torch.full((5,), 0.4)
    with torch.no_grad():
        got, right = ensemble(
            lambda m, x, t, s: step.step(m, x, t, s).mean, EpsModel, VPSDE(), X, t, s,
            randomness="same",
        )  # fmt: skip
    if not isinstance(step, StochasticHeun):  # its mean depends on the noise
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("corrector", [Langevin(), AnnealedLangevin()], ids=str)
def test_corrections_of_an_ensemble(corrector):
    t = torch.full((5,), 0.5)
    with torch.no_grad():
        got, right = ensemble(
            lambda m, x, t: corrector.step(m, x, t).mean, EpsModel, VPSDE(), X, t,
            randomness="same",
        )  # fmt: skip
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize(
    "weighting",
    [SimpleWeighting(), EDMWeighting(), MinSNRWeighting(), LikelihoodWeighting()],
    ids=lambda w: type(w).__name__,
)
def test_gradients_of_each_samples_loss(weighting, sde):
    """vmap over grad equals one backward pass for each sample."""
    torch.manual_seed(0)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    eps = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)

    def loss(model, x0, eps, t):
        alpha, sigma = sde.marginal(t.view(1))
        x = (alpha * x0 + sigma * eps).unsqueeze(0)
        truth = Prediction(x, x0.unsqueeze(0), eps.unsqueeze(0), alpha, sigma)
        error = model.predict(x, t.view(1)).noise_error(truth)
        return error.square().mean() * weighting(sde, t.view(1))[0]

    module = Calls(EDMModel(Net(), sde), loss)
    p = {name: value for name, value in module.named_parameters() if "network" in name}
    each = vmap(grad(lambda p, *a: functional_call(module, p, a)), in_dims=(None, 0, 0, 0))
    got = each(p, X, eps, t)
    for i in range(5):
        right = torch.autograd.grad(module(X[i], eps[i], t[i]), list(p.values()))
        for name, value in zip(p, right, strict=True):
            torch.testing.assert_close(got[name][i], value)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_drift_and_diffusion_under_transforms_equal_those_outside(sde):
    t = torch.linspace(0.05, 0.9, 7, dtype=torch.float64)
    for method in (sde.drift_coefficient, sde.diffusion):
        right = method(t)
        got = vmap(lambda u, f=method: f(u.view(1))[0])(t)
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)


def test_jacobians_of_a_score():
    model = EpsModel(Net(), VPSDE())
    t = torch.full((1,), 0.5, dtype=torch.float64)

    def score(x):
        return model(x.unsqueeze(0), t)[0]

    rows = jacrev(score)(X[0])
    columns = torch.stack([jvp(score, (X[0],), (e,))[1] for e in torch.eye(3).double()], 1)
    torch.testing.assert_close(rows, columns)
