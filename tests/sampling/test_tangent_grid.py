"""The tangent grid, and the grids that samplers take by default."""

import functools
import math

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    IPNDM,
    LMS,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver2SAncestral,
    DPMSolver3M,
    DPMSolver3MSDE,
    FlowMatchingSDE,
    ForwardSDE,
    GaussianMixtureModel,
    GuidanceMomentum,
    Heun,
    KarrasGrid,
    PCSampler,
    ProbabilityFlow,
    SASolver,
    TangentGrid,
    UniformGrid,
    UniPC,
    VelocityAdams,
)

SOLVERS = [
    DPMSolver2M(), DPMSolver3M(), DPMSolver2S(), UniPC(), DEIS(), LMS(), IPNDM(3), VelocityAdams(),
]  # fmt: skip
NOISY = [
    DPMSolver2MSDE(), DPMSolver3MSDE(), SASolver(), DPMSolver2SAncestral(), DPMSolver2MSDE(0.0),
]  # fmt: skip


def mixture(sde):
    return GaussianMixtureModel(sde, [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])


@pytest.mark.parametrize(("scale", "power"), [(0.7, 1.5), (1.0, 1.0), (0.5, 2.0)])
def test_levels_are_powers_of_a_tangent(scale, power):
    """By hand, in five steps: angles 5/5 to 1/5 of that at 80, and 0."""
    top = math.atan((80 / scale) ** (1 / power))
    found = TangentGrid(scale, power)(EDMSDE(), 5).tolist()
    expected = [scale * math.tan(top * k / 5) ** power for k in (5, 4, 3, 2, 1)]
    assert found == pytest.approx([*expected, 0.0], rel=1e-9)


def test_on_every_process_times_have_the_same_form(sde):
    for steps in (1, 2, 7, 300):
        times = TangentGrid()(sde, steps)
        assert len(times) == steps + 1
        assert float(times[0]) == sde.T
        assert float(times[-1]) == 0.0
        assert bool((times.diff() < 0).all())
        if steps > 1:
            assert float(times[-2]) >= sde.t_stop * (1 - 1e-6)


def test_many_steps_end_at_the_last_time_of_samplers():
    times = TangentGrid()(VPSDE(), 1000)
    assert float(times[-2]) == pytest.approx(VPSDE().t_stop, rel=1e-6)


def test_without_signal_levels_begin_at_160():
    sde = FlowMatchingSDE()
    times = TangentGrid()(sde, 9)
    top = math.atan((160 / 0.7) ** (1 / 1.5))
    ratio = 0.7 * math.tan(top * 8 / 9) ** 1.5
    assert times[:2].tolist() == pytest.approx([1.0, ratio / (1 + ratio)], rel=1e-9)


@pytest.mark.parametrize("predictor", SOLVERS + NOISY, ids=str)
def test_it_is_the_default_of_multistep_solvers(predictor):
    for part in (predictor, GuidanceMomentum(predictor)):
        sampler = PCSampler(mixture(VPSDE()), part, steps=6)
        assert torch.equal(sampler.times, TangentGrid()(VPSDE(), 6))


@pytest.mark.parametrize(
    "predictor",
    [None, DDIM(), Ancestral(), Heun(), DEIS(variable="time")],
    ids=str,
)
def test_other_samplers_take_the_times_of_the_process(predictor):
    corrector = AnnealedLangevin() if predictor is None else None
    sampler = PCSampler(mixture(VPSDE()), predictor, corrector, steps=6)
    assert torch.equal(sampler.times, UniformGrid()(VPSDE(), 6))
    sampler = PCSampler(mixture(EDMSDE()), predictor, corrector, steps=6)
    torch.testing.assert_close(sampler.times, KarrasGrid()(EDMSDE(), 6), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("predictor", NOISY, ids=str)
def test_twenty_noisy_steps_by_default(sde, predictor):
    """On every process; with uniform times on EDM these distances are .3 to 14."""
    model = GaussianMixtureModel(sde, [[-1.0], [0.8]], [0.2, 0.4])
    x = PCSampler(model, predictor, steps=20)((2000, 1), generator=seeded())
    exact = model.sample(2000, generator=torch.Generator().manual_seed(1))
    # The distance of two exact samples is .03 at most in 100 pairs.
    assert float((x.sort(0).values - exact.sort(0).values).abs().mean()) < 0.07


def test_a_process_of_ones_own_spaces_its_times():
    class Noise(ForwardSDE):
        T, t_min, grid_rho = 50.0, 0.01, 3.0

        def marginal(self, t):
            return torch.ones_like(t), t

    times = PCSampler(mixture(Noise()), DDIM(), steps=4).times
    expected = [50.0, 22.35152, 7.41188, 1.26880, 0.01]
    assert times.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_given_grid_has_precedence_and_a_predictor_may_have_its_own():
    class Karras(DDIM):
        def default_grid(self, sde, steps):
            return KarrasGrid()(sde, steps)

    model = mixture(EDMSDE())
    sampler = PCSampler(model, Karras(), steps=5)
    assert torch.equal(sampler.times, KarrasGrid()(EDMSDE(), 5))
    sampler = PCSampler(model, Karras(), steps=5, grid=UniformGrid())
    assert torch.equal(sampler.times, UniformGrid()(EDMSDE(), 5))


@functools.cache
def flow_of_64(sde):
    x = sde.prior_sample((64, 2), generator=seeded(), dtype=torch.float64)
    return x, ProbabilityFlow(mixture(sde), rtol=1e-5, atol=1e-5).sample(x)


@pytest.mark.parametrize("predictor", SOLVERS, ids=str)
def test_eight_evaluations_by_default(sde, predictor):
    """On every process; with uniform times the error of most is above .3 on VP and EDM."""
    x, exact = flow_of_64(sde)
    sampler = PCSampler(
        mixture(sde), predictor, steps=4 if isinstance(predictor, DPMSolver2S) else 8
    )
    error = (sampler(x) - exact).square().mean().sqrt()
    assert float(error) < (0.3 if isinstance(predictor, (DPMSolver2S, DPMSolver3M)) else 0.13)
    noisy = float(sde.marginal(torch.zeros(1).double())[1]) > 0  # denoised at the end
    assert isinstance(predictor, DPMSolver2S) or sampler.nfe == 8 + noisy


@pytest.mark.parametrize("predictor", [DEIS(), UniPC()], ids=str)
def test_the_default_converges_with_about_order_three(predictor):
    """On N(0, .5^2), whose flow scales the state."""
    sde, errors = EDMSDE(sigma_min=1e-5), []
    model = GaussianMixtureModel(sde, [[0.0]], [0.5])
    x = torch.full((1, 1), 80.0, dtype=torch.float64)
    for steps in (80, 160, 320):
        found = PCSampler(model, predictor, steps=steps)(x)
        errors.append(abs(float(found) - 80 * 0.5 / math.hypot(0.5, 80)))
    assert errors[-1] < 1e-5
    assert math.log2(errors[0] / errors[2]) / 2 > 2.6


@pytest.mark.parametrize("name", ["scale", "power"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_invalid_settings_raise(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a finite"):
        TangentGrid(**{name: value})
