"""Constrained sampling against the conditional distribution given the known part."""

import math

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, GaussianOracle, randn64

from diffusionkit import (
    DDIM,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    GaussianMixtureModel,
    LogSNRGrid,
    PCSampler,
    Predictor,
    Step,
    SubVPSDE,
)
from diffusionkit.control.constraints import Colorization, Inpainting, LinearMeasurement
from diffusionkit.control.operators import AveragePool, Gray, Matrix
from diffusionkit.sampling.heun import Heun
from diffusionkit.sampling.time_travel import TimeTravel

PROCESSES = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(sigma_min=0.01, sigma_max=20.0)}


def sampled(model, constraint, n=3000, steps=150, predictor=None, corrector=None, time_travel=None):
    sampler = PCSampler(
        model, predictor or Ancestral(), corrector, steps=steps, grid=LogSNRGrid(),
        constraint=constraint, time_travel=time_travel,
    )  # fmt: skip
    return sampler((n, *constraint.known.shape), generator=seeded(), dtype=DOUBLE)


@pytest.mark.parametrize("predictor", [Ancestral(), DDIM(), Heun()], ids=str)
@pytest.mark.parametrize("process", PROCESSES)
def test_independent_parts_are_exact(process, predictor):
    """The distribution of the unknown coordinates does not depend on the known one."""
    cov = torch.diag(torch.tensor([0.5, 1.0, 0.3]).square())
    cov[1, 2] = cov[2, 1] = 0.2
    model = GaussianOracle(PROCESSES[process], torch.tensor([0.0, 1.0, -0.5]), cov)
    constraint = Inpainting(torch.tensor([4.0, 0.0, 0.0]), torch.tensor([1, 0, 0]))
    # Four standard errors are .09 of the mean and .13 of the variance 1.
    x = sampled(model, constraint, n=2000, steps=100, predictor=predictor)
    torch.testing.assert_close(x.mean(0), torch.tensor([4.0, 1.0, -0.5]).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(x.T)[1:, 1:], cov[1:, 1:].double(), rtol=0, atol=0.15)


RHO, MEAN, Y = 0.8, torch.tensor([0.5, -0.3]), 1.2  # known: 1.5 standard deviations off
PAIR = torch.tensor([[1.0, RHO], [RHO, 1.0]])
TRUE = (0.5 + RHO * 1.5, math.sqrt(1 - RHO**2))
KNOWN = Inpainting(torch.tensor([float("nan"), Y]), torch.tensor([0, 1]))


def mean_and_std(x):
    return float(x[:, 0].mean()), float(x[:, 0].std())


@pytest.mark.parametrize("process", PROCESSES)
def test_bias_is_that_of_the_closed_form(process):
    """Short steps follow the score at a known part of mean alpha y, with its noise.

    With v = sigma^2 / alpha^2 and q = sqrt((1 + v)^2 - rho^2) the reverse SDE of the unknown
    coordinate u is linear, d(u / q)/dv = -rho k / q^3 and d(Var / q^2)/dv = -1 / q^2 from v =
    infinity to 0. For the flow, d(u / sqrt q)/dv = -rho k / (2 q^(5/2)) and Var = q.
    """
    model, q = GaussianOracle(PROCESSES[process], MEAN, PAIR), math.sqrt(1 - RHO**2)
    mean, std = mean_and_std(sampled(model, KNOWN, steps=250))
    assert mean == pytest.approx(0.5 + 1.5 * (1 - q) / RHO, abs=0.05)
    assert std == pytest.approx(q * math.sqrt(math.atanh(RHO) / RHO), rel=0.05)
    v = torch.logspace(-5, 8, 20001, base=10, dtype=DOUBLE)
    half = torch.trapezoid(((1 + v) ** 2 - RHO**2) ** -1.25, v)
    flow = 0.5 * math.sqrt(q) * RHO * 1.5 * float(half)
    for predictor in (DDIM(), Heun()):
        mean, std = mean_and_std(sampled(model, KNOWN, predictor=predictor))
        assert mean == pytest.approx(0.5 + flow, abs=0.06)
        assert std == pytest.approx(math.sqrt(q), rel=0.05)


@pytest.mark.parametrize("process", PROCESSES)
def test_time_travel_and_correctors_reduce_the_bias(process):
    """In standard deviations of the true distribution; without them the error is .77."""
    model = GaussianOracle(PROCESSES[process], MEAN, PAIR)

    def errors(**options):
        mean, std = mean_and_std(sampled(model, KNOWN, n=1500, steps=80, **options))
        return abs(mean - TRUE[0]) / TRUE[1], abs(std / TRUE[1] - 1)

    assert errors()[0] == pytest.approx(0.77, abs=0.08)
    corrected = errors(corrector=AnnealedLangevin(snr=0.16, steps=10))
    assert corrected[0] < 0.4
    travelled = errors(time_travel=TimeTravel(jump=8, repeats=10))
    assert travelled[0] < 0.2
    assert travelled[1] < 0.08


# With the largest error of the mean, in standard deviations, with time travel.
MEASURED = {
    "gray": (Gray(), (3, 1, 2), 0.2),
    "pool": (AveragePool(2), (1, 2, 4), 0.2),
    "matrix": (Matrix(randn64(2, 5)), (5,), 0.55),
}


@pytest.mark.parametrize("name", MEASURED)
def test_linear_measurements_of_correlated_data(name):
    """Without time travel the errors are .23, .44 and 1.6 standard deviations."""
    operator, shape, limit = MEASURED[name]
    size = math.prod(shape)
    factor = randn64(size, size, seed=4) / math.sqrt(size)
    cov = factor @ factor.T + 0.3 * torch.eye(size)
    model = GaussianOracle(VPSDE(), randn64(*shape, seed=5), cov)
    basis = torch.eye(size, dtype=DOUBLE).view(size, *shape)
    rows = operator(basis).flatten(1).T
    truth = (rows @ model.mean.flatten()) + 1.5 * (rows @ cov @ rows.T).diagonal().sqrt()
    posterior = model.posterior(rows, truth)
    y = truth.view(operator(model.mean).shape)
    constraint = Colorization(y) if name == "gray" else LinearMeasurement(operator, y)

    def distance(time_travel):
        """Return the largest errors of mean and covariance along unknown directions."""
        x = sampled(model, constraint, n=1000, steps=80, time_travel=time_travel).flatten(1)
        torch.testing.assert_close(x @ rows.T, truth.expand(1000, -1), rtol=1e-9, atol=1e-9)
        values, vectors = posterior.variances, posterior.axes
        keep = values > 1e-9
        assert int(keep.sum()) == size - len(rows)
        white = (x - posterior.mean.flatten()) @ vectors[:, keep] / values[keep].sqrt()
        off = torch.cov(white.T) - torch.eye(int(keep.sum()), dtype=DOUBLE)
        return float(white.mean(0).abs().max()), float(off.abs().max())

    plain, travelled = distance(None), distance(TimeTravel(jump=8, repeats=10))
    assert travelled[0] < limit
    assert travelled[1] < 0.2
    assert travelled[0] < 0.6 * plain[0]


@pytest.mark.parametrize("process", PROCESSES)
def test_mixture(process):
    """Each component is right; the weights stay close to those without the constraint.

    The component is chosen while noise hides the known part.
    """
    model = GaussianMixtureModel(
        PROCESSES[process], [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7]
    )
    y = 0.2
    logs = [
        math.log(w / s) - (y - m) ** 2 / (2 * s**2) for w, m, s in ((0.3, 0, 0.2), (0.7, 0.5, 0.3))
    ]
    true = 1 / (1 + math.exp(logs[0] - logs[1]))
    assert true == pytest.approx(0.609, abs=1e-3)
    x = sampled(model, Inpainting(torch.tensor([0.0, y]), torch.tensor([0, 1])))
    right = x[:, 0] > 0
    assert true < float(right.double().mean()) < 0.72
    for rows, mean, std in ((right, 1.0, 0.3), (~right, -1.0, 0.2)):
        part = x[rows, 0]
        assert float(part.mean()) == pytest.approx(mean, abs=4 * std / len(part) ** 0.5 + 0.015)
        assert float(part.std()) == pytest.approx(std, rel=0.08)


class Multistep(Predictor):
    """A second-order multistep rule in log-SNR, with the last data estimate as memory."""

    def step(self, model, x, t, s, state=None, *, generator=None, **cond):
        kernels = (model.sde.perturbation_kernel(x, at) for at in (t, s))
        (a, u), (b, v) = ([float(c[0]) for c in kernel] for kernel in kernels)
        h = math.log(b / v) - math.log(a / u)
        x0 = now = model.predict(x, t).x0
        if state is not None:
            x0 = now + (now - state[0]) * h / (2 * state[1])
        x = v / u * x - b * math.expm1(-h) * x0
        return Step(x, x, (now, h))


@pytest.mark.parametrize("steps", [20, 100])
def test_predictors_with_memory(steps):
    """New noise between the steps does not matter; the limit is that of the flow."""
    independent = GaussianOracle(VPSDE(), MEAN, torch.eye(2))
    mean, std = mean_and_std(sampled(independent, KNOWN, steps=steps, predictor=Multistep()))
    assert mean == pytest.approx(0.5, abs=0.08)
    assert std == pytest.approx(1.0, rel=0.05)
    model = GaussianOracle(VPSDE(), MEAN, PAIR)
    own, heun = (
        mean_and_std(sampled(model, KNOWN, steps=n, predictor=p))
        for n, p in ((steps, Multistep()), (200, Heun()))
    )
    assert own == pytest.approx(heun, abs=0.06)
