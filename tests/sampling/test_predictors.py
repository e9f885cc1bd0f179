"""Predictors on Gaussian data, where every step is linear and its law can be followed exactly."""

import itertools
import math

import pytest
import torch

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    EpsModel,
    EulerMaruyama,
    GaussianMixtureModel,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    ReverseDiffusion,
    UniformGrid,
)
from diffusionkit.sampling import LinearPredictor

PREDICTORS = {
    "euler-maruyama": EulerMaruyama(),
    "reverse-diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "ancestral-forward": Ancestral(variance="forward"),
    "ddim": DDIM(),
    "ddim-half": DDIM(eta=0.5),
    "ddim-one": DDIM(eta=1.0),
}
MEAN, STD = 0.7, 0.4


@pytest.fixture(params=PREDICTORS)
def predictor(request) -> LinearPredictor:
    return PREDICTORS[request.param]


def gaussian(sde):
    return GaussianMixtureModel(sde, [[MEAN]], [STD])


def pair(time, last):
    return (torch.full((2,), v, dtype=torch.float64) for v in (time, last))


def law_after(model, predictor, times):
    """The mean and variance at the last time, found by asking the predictor for its steps.

    From p_T exactly, so that the error is the solver's. The state enters a step linearly: its
    slope and offset come from two states, its noise from the difference of x and mean.
    """
    alpha, sigma = (float(c) for c in model.sde.marginal(times[:1]))
    mean, variance = alpha * MEAN, (alpha * STD) ** 2 + sigma**2
    n = len(times) - 1
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(n).unsqueeze(1)
    t, s = times[:-1].repeat(2), times[1:].repeat(2)
    step = predictor.step(model, x, t, s, generator=torch.Generator().manual_seed(0))
    z = torch.randn((2 * n, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset, at_one = step.mean.view(2, n)
    std = ((step.x - step.mean) / z)[:n, 0]
    for o, m, v in zip(offset.tolist(), (at_one - offset).tolist(), std.tolist(), strict=True):
        mean, variance = o + m * mean, m**2 * variance + v**2
    return mean, variance


def error_after(sde, predictor, steps, grid):
    model = gaussian(sde)
    times = grid(sde, steps)
    mean, variance = law_after(model, predictor, times)
    alpha, sigma = (float(c) for c in sde.marginal(times[-1:]))
    return max(abs(mean - alpha * MEAN), abs(math.sqrt(variance) - math.hypot(alpha * STD, sigma)))


def test_weak_order_is_one(sde, predictor):
    grid = LogSNRGrid(t_end=float(sde.time_at_log_snr(torch.tensor([6.0]).double())))
    coarse, fine = (error_after(sde, predictor, n, grid) for n in (1000, 2000))
    assert fine < 0.02
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("name", ["euler-maruyama", "reverse-diffusion", "ancestral", "ddim"])
def test_weak_order_is_one_on_the_papers_grid(name):
    grid = UniformGrid(t_end=0.05)
    coarse, fine = (error_after(VPSDE(), PREDICTORS[name], n, grid) for n in (400, 800))
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.25)


def test_ancestral_is_ddpm_posterior():
    """Ho et al. 2020, equations 6 and 7, with beta = 1 - alpha_t^2 / alpha_s^2."""
    sde = VPSDE()
    t, s = pair(0.5, 0.3)
    x, eps = (
        torch.tensor([[0.8], [-1.1]], dtype=torch.float64),
        torch.tensor([[-0.3], [0.5]], dtype=torch.float64),
    )
    model = EpsModel(lambda x, noise_label: eps, sde)
    abar_t, abar_s = 0.28118288079675235**2, math.exp(-0.9255)  # B(.3) = .9255
    beta = 1 - abar_t / abar_s
    x0 = (x - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
    mean = (
        math.sqrt(abar_s) * beta / (1 - abar_t) * x0
        + math.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t) * x
    )
    for variance, std in (
        ("posterior", math.sqrt(beta * (1 - abar_s) / (1 - abar_t))),
        ("forward", math.sqrt(beta)),
    ):
        step = Ancestral(variance).step(model, x, t, s, generator=torch.Generator().manual_seed(0))
        z = torch.randn((2, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(step.x, mean + std * z, rtol=1e-12, atol=0)


def test_reverse_diffusion_is_smld_and_ddpm():
    """Song et al. 2021, equations 47 and 46: VE and VP in the papers' discretisations."""
    x, eps = (
        torch.tensor([[0.8], [-1.1]], dtype=torch.float64),
        torch.tensor([[-0.3], [0.5]], dtype=torch.float64),
    )
    t, s = pair(0.5, 0.3)
    ve = EpsModel(lambda x, noise_label: eps, VESDE())
    sigma_t, sigma_s = 0.01 * 5000**0.5, 0.01 * 5000**0.3
    score, v = -eps / sigma_t, sigma_t**2 - sigma_s**2
    torch.testing.assert_close(
        ReverseDiffusion().step(ve, x, t, s).mean, x + v * score, rtol=1e-12, atol=0
    )
    vp = EpsModel(lambda x, noise_label: eps, VPSDE())
    beta = 1 - math.exp(0.9255 - 2.5375)
    score = -eps / 0.9596542020680362
    torch.testing.assert_close(
        ReverseDiffusion().step(vp, x, t, s).mean,
        (2 - math.sqrt(1 - beta)) * x + beta * score,
        rtol=1e-12,
        atol=0,
    )


def test_euler_maruyama_step_by_hand():
    """beta(.5) = 10.05, step .2: x + (x beta / 2 + beta score) .2, noise sqrt(.2 beta)."""
    x, eps = torch.tensor([[0.8]], dtype=torch.float64), torch.tensor([[-0.3]], dtype=torch.float64)
    model = EpsModel(lambda x, noise_label: eps, VPSDE())
    t, s = (v[:1] for v in pair(0.5, 0.3))
    step = EulerMaruyama().step(model, x, t, s, generator=torch.Generator().manual_seed(0))
    z = torch.randn((1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = 0.8 + 0.2 * 10.05 * (0.4 + 0.3 / 0.9596542020680362)
    assert float(step.mean) == pytest.approx(mean, rel=1e-12)
    assert float(step.x - step.mean) == pytest.approx(math.sqrt(2.01) * float(z), rel=1e-12)


def test_ddim_at_one_is_the_ancestral_sampler(mixture):
    x = mixture.sample(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, s = (torch.full((6,), v * mixture.sde.T, dtype=torch.float64) for v in (0.5, 0.45))
    steps = [
        p.step(mixture, x, t, s, generator=torch.Generator().manual_seed(0))
        for p in (DDIM(eta=1.0), Ancestral())
    ]
    torch.testing.assert_close(steps[0].mean, steps[1].mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps[0].x, steps[1].x, rtol=1e-9, atol=1e-9)


# Root-mean-square errors of Euler steps of the probability flow on Karras's grid, and the exact
# solution by quantiles, computed independently: mixture .3 N(-1, .2^2) + .7 N(.8, .4^2).
EXACT = [
    -1.2875353048000238, -0.986817377558069, -0.12203711969627962, 0.5004622118484008,
    0.6358468040802714, 0.8579357142150439, 1.0984518868239346, 1.5366789879079523,
]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "rms"),
    [(8, 0.1792685698314777), (64, 0.032030068697725046), (512, 0.005231140404040236)],
)
def test_ddim_converges_to_the_probability_flow(steps, rms):
    model = GaussianMixtureModel(EDMSDE(), [[-1.0], [0.8]], [0.2, 0.4], [0.3, 0.7])
    sampler = PCSampler(model, DDIM(), steps=steps, grid=KarrasGrid(), denoise=False)
    start = torch.tensor([-2.0, -1, -0.5, -0.1, 0.1, 0.5, 1, 2], dtype=torch.float64) * 80
    x = sampler(start.unsqueeze(1)).squeeze(1)
    error = (x - torch.tensor(EXACT, dtype=torch.float64)).square().mean().sqrt()
    assert float(error) == pytest.approx(rms, rel=1e-6)


def test_every_sample_may_have_its_own_times(sde, predictor, mixture):
    x = mixture.sample(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) * sde.T
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = predictor.step(mixture, x, t, 0.9 * t, generator=generators)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        row = slice(i, i + 1)
        alone = predictor.step(mixture, x[row], t[row], 0.9 * t[row], generator=[generator])
        torch.testing.assert_close(together.x[row], alone.x, rtol=1e-12, atol=1e-12)


def test_the_sampler_takes_the_steps_the_predictor_takes(sde, predictor, mixture):
    """Coefficients are tabulated for a run; by hand they are computed from the times."""
    grid = LogSNRGrid()(sde, 5)
    x = sde.prior_sample((4, 2), generator=torch.Generator().manual_seed(0)).double()
    sampler = PCSampler(mixture, predictor, grid=grid, denoise=False)
    fast = sampler(x, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for t, s in itertools.pairwise(grid):
        x = predictor.step(mixture, x, t.expand(4), s.expand(4), generator=generator).x
    torch.testing.assert_close(fast, x, rtol=1e-9, atol=1e-9)
