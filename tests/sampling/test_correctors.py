"""Correctors: steps computed by hand, and annealed Langevin dynamics."""

import itertools

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    EpsModel,
    GaussianMixtureModel,
    Langevin,
    LogSNRGrid,
    PCSampler,
    SubVPSDE,
)


@pytest.mark.parametrize(
    "corrector", [AnnealedLangevin(0.2, 5), Langevin(0.2, 5), Langevin(0.2, 5, "batch")]
)
def test_a_corrector_alone_is_annealed_langevin_dynamics(corrector):
    """It finds the modes but not their exact widths, since its steps shrink with sigma."""
    sde = VESDE(sigma_min=0.01, sigma_max=20.0)
    model = GaussianMixtureModel(sde, [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    x = PCSampler(model, None, corrector, steps=200)((1000, 2), generator=seeded())
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=0.1)
    for rows, mean, std in ((right, [1.0, 0.5], 0.3), (~right, [-1.0, 0.0], 0.2)):
        torch.testing.assert_close(x[rows].mean(0), torch.tensor(mean), rtol=0, atol=0.1)
        assert float(x[rows].std(0).mean()) == pytest.approx(std, rel=0.3)


def test_langevin_with_norms_of_each_sample_in_many_dimensions():
    means = torch.stack([torch.full((3, 8, 8), -0.5), torch.full((3, 8, 8), 0.5)])
    model = GaussianMixtureModel(VPSDE(), means, [0.3, 0.3], [0.3, 0.7])
    sampler = PCSampler(model, Ancestral(), Langevin(snr=0.16), steps=150, grid=LogSNRGrid())
    x = sampler((400, 3, 8, 8), generator=seeded())
    right = x.mean((1, 2, 3)) > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=0.09)  # 4 standard errors
    # 54,000 numbers of standard deviation .3; the corrector's bias is snr^2 / 2, the solver's 1%.
    assert float(x[right].std()) == pytest.approx(0.3, rel=0.04)
    assert float(x[right].mean()) == pytest.approx(0.5, abs=0.01)


def test_a_langevin_step_computed_by_hand():
    """epsilon = 2 (snr sigma)^2 (d / ||sigma s||^2)^w, sample by sample; the batch's is 2 (snr
    ||z|| / ||s||)^2 with mean norms."""
    x = torch.tensor([[3.0, 4.0], [0.3, -0.4]], dtype=torch.float64)
    model = EpsModel(lambda x, noise_label: 2 * x, VESDE(sigma_min=0.1, sigma_max=40.0))  # score -x
    t = torch.full((2,), 0.5, dtype=torch.float64)  # sigma = 2
    z = torch.randn((2, 2), generator=seeded(), dtype=torch.float64)
    ratio = torch.tensor([[0.02], [2.0]], dtype=torch.float64)  # 2 / (10^2, 1^2)
    eps = 2 * (0.1 * 2) ** 2 * ratio ** (4 / 4100)
    step = Langevin(snr=0.1).step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.mean, x - eps * x, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.x, x - eps * x + (2 * eps) ** 0.5 * z, rtol=1e-12, atol=0)
    eps = 2 * (0.1 * z.square().sum(1).sqrt().mean() / 2.75) ** 2
    step = Langevin(snr=0.1, norm="batch").step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.x, x - eps * x + (2 * eps) ** 0.5 * z, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_at_image_sizes_langevin_is_the_papers_rule(scale):
    """Within 1%: a step of 2 (snr ||z|| / ||s||)^2, for scores of any length."""
    x = torch.randn((4, 3, 32, 32), generator=seeded(), dtype=torch.float64)
    model = EpsModel(lambda x, noise_label: scale * x, VESDE(sigma_min=0.1, sigma_max=10.0))
    t = torch.full((4,), 0.5, dtype=torch.float64)  # sigma = 1
    z = torch.randn((4, 3, 32, 32), generator=seeded(1), dtype=torch.float64)
    norms = (v.flatten(1).norm(dim=1).view(4, 1, 1, 1) for v in (z, scale * x))
    eps = 2 * (0.16 * next(norms) / next(norms)) ** 2
    step = Langevin(snr=0.16).step(model, x, t, generator=seeded(1))
    paper = x - eps * scale * x + (2 * eps) ** 0.5 * z
    difference = (step.x - paper).flatten(1).norm(dim=1) / (paper - x).flatten(1).norm(dim=1)
    assert float(difference.max()) < 0.02  # of the move: ||z|| differs by 1% from its mean
    assert float(step.x.std() / paper.std() - 1) == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()])
@pytest.mark.parametrize("d", [1, 2, 3, 8, 20, 64])
def test_langevin_leaves_a_mixture_unchanged_in_any_dimension(d, sde):
    """60 steps from exact samples: the variance grows by less than the bias of finite steps, and
    twice the largest w / d, together 4%; the largest value stays within that of exact samples."""
    means = torch.zeros(2, d, dtype=torch.float64)
    means[:, 0] = torch.tensor([-1.0, 1.0])
    model, n = GaussianMixtureModel(sde, means, [0.3, 0.6], [0.35, 0.65]), 16_000 // d
    t = sde.time_at_log_snr(torch.zeros(1, dtype=torch.float64)).expand(n)  # sigma = alpha
    exact = sde.perturb(model.sample(n, generator=seeded(), dtype=torch.float64), t)
    x, generator = exact.x, seeded(1)
    for _ in range(60):
        x = Langevin(snr=0.16).step(model, x, t, generator=generator).x
    alpha, sigma = (float(value) for value in sde.marginal(t[:1]))
    # Along the first axis the means add .91 alpha^2; the others have the modes' mean variance.
    truth = torch.full((d,), (0.35 * 0.3**2 + 0.65 * 0.6**2) * alpha**2 + sigma**2)
    truth[0] += 0.91 * alpha**2
    ratio = float(((x - x.mean(0)).square().mean(0) / truth).mean())
    assert ratio == pytest.approx(1.015, abs=0.025 + 4 * (2 / (n * d)) ** 0.5)
    assert float(x.abs().max()) < 1.5 * float(exact.x.abs().max())


def test_langevin_does_not_depend_on_the_batch(mixture):
    x, t = torch.randn((6, 2), generator=seeded()), torch.full((6,), 0.3)
    whole = Langevin(steps=3).step(mixture, x, t, generator=[seeded(i) for i in range(6)]).x
    for i in range(6):
        alone = Langevin(steps=3).step(mixture, x[i : i + 1], t[:1], generator=[seeded(i)]).x
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-6, atol=1e-6)


def test_an_annealed_langevin_step_computed_by_hand():
    """epsilon = 2 (snr sigma)^2."""
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    model = EpsModel(lambda x, noise_label: 0.1 * x, VESDE(sigma_min=0.5, sigma_max=8.0))
    t = torch.full((1,), 0.5, dtype=torch.float64)  # sigma = 2, score -.05 x
    z = torch.randn((1, 2), generator=seeded(), dtype=torch.float64)
    step = AnnealedLangevin(snr=0.1).step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.mean, x * (1 - 0.08 * 0.05), rtol=1e-12, atol=0)
    torch.testing.assert_close(step.x - step.mean, 0.4 * z, rtol=1e-9, atol=0)


def test_langevin_does_not_move_where_the_score_is_zero():
    model = EpsModel(lambda x, noise_label: torch.zeros_like(x), VPSDE())
    x = torch.ones(2, 3)
    step = Langevin().step(model, x, torch.full((2,), 0.5), generator=seeded())
    assert torch.equal(step.x, x)


def test_langevin_in_half_precision():
    """Its squared step is subnormal in float16 at small noise, so it is computed in float32."""
    x = torch.randn(4, 64, generator=seeded())
    t = torch.zeros(4)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        network = EpsModel(lambda x, noise_label: torch.ones_like(x), VESDE(sigma_min=1e-3))
        # From 0, so that the mean is not rounded to the state's digits.
        start = torch.zeros_like(x, dtype=dtype)
        half = Langevin().step(network, start, t, generator=[seeded(i) for i in range(4)])
        drift = -2 * 0.16**2 * 1e-3  # the score is -1 / sigma, its norm that of the noise's mean
        error = (half.mean.double() / drift - 1).abs().max()
        assert float(error) < tolerance


@pytest.mark.parametrize("corrector", [Langevin(), Langevin(norm="batch"), AnnealedLangevin()])
def test_a_samplers_corrections_equal_single_steps(mixture, corrector):
    """In a run the noise level is a float, in single steps a tensor (B,)."""
    grid = LogSNRGrid()(mixture.sde, 4)
    x = mixture.sde.prior_sample((5, 2), generator=seeded()).double()
    sampler = PCSampler(mixture, DDIM(), corrector, grid=grid, denoise=False)
    fast = sampler(x, generator=seeded(1))
    generator = seeded(1)
    for t, s in itertools.pairwise(grid):
        x = corrector.step(mixture, x, t.repeat(5), generator=generator).x
        x = DDIM().step(mixture, x, t.repeat(5), s.repeat(5), generator=generator).x
    torch.testing.assert_close(fast, x, rtol=1e-9, atol=1e-9)
