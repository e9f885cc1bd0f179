"""Predictors on Gaussian data, where the distribution after a run is known exactly."""

import itertools
import math

import pytest
import torch
from support import f64, seeded
from support.flow_values import AT_SIGMA_MIN, Z, line_mixture, rms
from support.gaussian_runs import error_after
from support.noise import GivenNoise

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    DPMSolver2M,
    DPMSolver2MSDE,
    EpsModel,
    EulerMaruyama,
    GaussianDecoder,
    GaussianMixtureModel,
    Heun,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    Prediction,
    ProbabilityFlow,
    ReverseDiffusion,
    StochasticHeun,
    UniformGrid,
    UniPC,
)
from diffusionkit._chain_terms import step_nats
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


@pytest.fixture(params=PREDICTORS)
def predictor(request) -> LinearPredictor:
    return PREDICTORS[request.param]


def pair(time, last):
    return (torch.full((2,), v, dtype=torch.float64) for v in (time, last))


def test_weak_order_is_one(sde, predictor):
    grid = LogSNRGrid(t_end=float(sde.time_at_log_snr(torch.tensor([6.0]).double())))
    coarse, fine = (error_after(sde, predictor, grid(sde, n)) for n in (1000, 2000))
    assert fine < 0.02
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    "sampled",
    [
        *(DDIM(), Heun(), DPMSolver2M(), UniPC(), ProbabilityFlow),
        *(Ancestral(), EulerMaruyama(), ReverseDiffusion(), StochasticHeun(), DPMSolver2MSDE()),
    ],
    ids=str,
)
def test_samples_keep_their_spread_with_noise_and_without(sde, sampled):
    """One model of N(0, .5^2) for every kind of solver; the standard error is .008.

    Libraries with a denoiser for each kind of solver collapse to .002 where the two do not fit.
    """
    model = GaussianMixtureModel(sde, [[0.0]], [0.5])
    shape, options = (2000, 1), {"generator": seeded(), "dtype": torch.float64}
    if sampled is ProbabilityFlow:
        x = ProbabilityFlow(model, rtol=1e-3, atol=1e-3).sample(shape, **options)
    else:
        x = PCSampler(model, sampled, steps=60, grid=LogSNRGrid())(shape, **options)
    assert float(x.std()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("name", ["euler-maruyama", "reverse-diffusion", "ancestral", "ddim"])
def test_weak_order_is_one_on_a_uniform_grid(name):
    sde, grid = VPSDE(), UniformGrid(t_end=0.05)
    coarse, fine = (error_after(sde, PREDICTORS[name], grid(sde, n)) for n in (400, 800))
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.25)


def test_ancestral_is_ddpms_posterior():
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
        step = Ancestral(variance).step(model, x, t, s, generator=seeded())
        z = torch.randn((2, 1), generator=seeded(), dtype=torch.float64)
        torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(step.x, mean + std * z, rtol=1e-12, atol=0)


def test_reverse_diffusion_is_smld_and_ddpm():
    """Song et al. 2021, equations 47 and 46: VE and VP in the paper's discretizations."""
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
    step = EulerMaruyama().step(model, x, t, s, generator=seeded())
    z = torch.randn((1, 1), generator=seeded(), dtype=torch.float64)
    mean = 0.8 + 0.2 * 10.05 * (0.4 + 0.3 / 0.9596542020680362)
    assert float(step.mean) == pytest.approx(mean, rel=1e-12)
    assert float(step.x - step.mean) == pytest.approx(math.sqrt(2.01) * float(z), rel=1e-12)


def test_ddim_at_one_is_the_ancestral_sampler(mixture):
    x = mixture.sample(6, generator=seeded(1), dtype=torch.float64)
    t, s = (torch.full((6,), v * mixture.sde.T, dtype=torch.float64) for v in (0.5, 0.45))
    steps = [p.step(mixture, x, t, s, generator=seeded()) for p in (DDIM(eta=1.0), Ancestral())]
    torch.testing.assert_close(steps[0].mean, steps[1].mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps[0].x, steps[1].x, rtol=1e-9, atol=1e-9)


# Root mean square errors of Euler steps of the probability flow on Karras's grid, computed
# independently.
@pytest.mark.parametrize(
    ("steps", "expected"),
    [(8, 0.1792685698314777), (64, 0.032030068697725046), (512, 0.005231140404040236)],
)
def test_ddim_converges_to_the_probability_flow(steps, expected):
    model = line_mixture(EDMSDE())
    x = PCSampler(model, DDIM(), steps=steps, grid=KarrasGrid(), denoise=False)(80 * Z)
    assert rms(x, AT_SIGMA_MIN) == pytest.approx(expected, rel=1e-6)


def test_each_sample_may_have_its_own_times(sde, predictor, mixture):
    x = mixture.sample(3, generator=seeded(), dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) * sde.T
    generators = [seeded(i) for i in range(3)]
    together = predictor.step(mixture, x, t, 0.9 * t, generator=generators)
    for i in range(3):
        generator = seeded(i)
        row = slice(i, i + 1)
        alone = predictor.step(mixture, x[row], t[row], 0.9 * t[row], generator=[generator])
        torch.testing.assert_close(together.x[row], alone.x, rtol=1e-12, atol=1e-12)


def test_a_samplers_steps_equal_single_steps(sde, predictor, mixture):
    """Coefficients are tabulated for a run, and computed from the times in single steps."""
    grid = LogSNRGrid()(sde, 5)
    x = sde.prior_sample((4, 2), generator=seeded()).double()
    sampler = PCSampler(mixture, predictor, grid=grid, denoise=False)
    fast = sampler(x, generator=seeded(1))
    generator = seeded(1)
    for t, s in itertools.pairwise(grid):
        x = predictor.step(mixture, x, t.expand(4), s.expand(4), generator=generator).x
    torch.testing.assert_close(fast, x, rtol=1e-9, atol=1e-9)


# --- learned variances -----------------------------------------------------------------------

X, EPS = f64([0.8, -1.3, 0.05, 1.9]), f64([0.5, -0.7, 0.3, 1.1])
NOISE, V = f64([0.25, -1.0, 0.6, -0.4]), f64([-1.0, 0.3, 1.0, 1.5])


def constant_model(chain, variance):
    """Return a model of constant output, for the noise and perhaps its variance."""
    output = torch.cat([EPS, V], 1) if variance in ("learned", "learned_range") else EPS
    return EpsModel(lambda x, noise_label: output.expand(len(x), -1), chain, variance=variance)


def test_a_learned_log_variance_is_the_variance_of_a_step() -> None:
    model = constant_model(DDPMChain.linear(1000), "learned")
    step = Ancestral(variance="model").step(model, X, f64(0.16), f64(0.14),
                                            generator=GivenNoise(NOISE))  # fmt: skip
    torch.testing.assert_close(step.x - step.mean, (V / 2).exp() * NOISE)


def test_no_noise_is_added_in_a_step_to_zero_noise() -> None:
    """In a batch with samples at different times."""
    x, t, s = X.repeat(2, 1), f64(0.1, 0.2), f64(0.0, 0.1)
    for variance in ("learned", "learned_range"):
        model = constant_model(DDPMChain.linear(10, beta_max=5.0), variance)
        noise = GivenNoise(NOISE.repeat(2, 1))
        step = Ancestral(variance="model").step(model, x, t, s, generator=noise)
        assert torch.equal(step.x[0], step.mean[0])
        assert ((step.x[1] - step.mean[1]).abs() > 1e-3).all()


@pytest.mark.parametrize(
    ("fixed", "own"), [("fixed_small", "posterior"), ("fixed_large", "forward")]
)
def test_fixed_variances_are_those_of_the_predictor(fixed, own) -> None:
    """The bound of a model with a fixed variance is that of the sampler's step of this name."""
    chain, step = DDPMChain.linear(1000), torch.tensor([149])
    model = constant_model(chain, fixed)
    t, s = (step + 1).double() / 1000, step.double() / 1000
    taken = Ancestral(own).step(model, X, t, s, generator=GivenNoise(NOISE))
    other = Ancestral(own).step(constant_model(chain, None), X, t, s, generator=GivenNoise(NOISE))
    assert torch.equal(taken.x, other.x)  # samplers do not ask the model
    std = ((taken.x - taken.mean) / NOISE).flatten()[0]
    x0 = torch.zeros_like(X)
    nats = step_nats(model, model.predict(X, t), x0, step, GaussianDecoder())
    # KL(q || p) of Gaussians with the means of the posterior and of the sampler's step.
    exact = Prediction.from_x0(X, x0, *chain.marginal(t))
    spread = Ancestral().coefficients(chain, t, s).std
    mean = Ancestral().coefficients(chain, t, s)
    difference = taken.mean - exact.combine(x=mean.x, x0=mean.x0)
    d, ratio = X.shape[1], (spread / std).square()
    kl = 0.5 * (d * (ratio - 1 - ratio.log()) + (difference / std).square().sum(1))
    torch.testing.assert_close(nats.double(), kl.double())


@pytest.mark.parametrize("variance", [None, "fixed_small", "fixed_large"])
def test_a_model_without_a_variance_raises(variance) -> None:
    model = constant_model(DDPMChain.linear(1000), variance)
    with pytest.raises(
        ValueError, match=r"predicts a variance, such as .*learned_range.*, got none; a fixed .*"
    ):
        Ancestral(variance="model").step(model, X, f64(0.16), f64(0.14))
    with pytest.raises(
        ValueError, match="variance: expected one of 'posterior', 'forward', 'model', got 'large'"
    ):
        Ancestral(variance="large")


def test_a_learned_variance_in_other_shapes_and_dtypes() -> None:
    chain = DDPMChain.linear(100)
    for dtype in (torch.float32, torch.bfloat16):
        network = lambda x, noise_label: torch.cat([x, x], 1)  # noqa: E731
        model = EpsModel(network, chain, variance="learned_range")
        sampler = PCSampler(model, Ancestral(variance="model"), grid=chain.respaced(10))
        x = sampler((2, 3, 4, 4), generator=seeded(), dtype=dtype)
        assert x.dtype == dtype
        assert torch.isfinite(x).all()
