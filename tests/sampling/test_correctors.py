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
)


@pytest.mark.parametrize("corrector", [AnnealedLangevin(0.2, 5), Langevin(0.2, 5, "batch")])
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
    """epsilon = 2 (snr ||z|| / ||s||)^2, x + epsilon s + sqrt(2 epsilon) z, sample by sample."""
    x = torch.tensor([[3.0, 4.0], [0.3, -0.4]], dtype=torch.float64)
    model = EpsModel(
        lambda x, noise_label: x, VESDE(sigma_min=0.1, sigma_max=10.0)
    )  # score -x / sigma
    t = torch.full((2,), 0.5, dtype=torch.float64)  # sigma = 1
    z = torch.randn((2, 2), generator=seeded(), dtype=torch.float64)
    size = z.square().sum(1).sqrt() / torch.tensor([5.0, 0.5])
    eps = (2 * 0.01 * size**2).unsqueeze(1)
    step = Langevin(snr=0.1).step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.mean, x - eps * x, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.x, x - eps * x + (2 * eps) ** 0.5 * z, rtol=1e-12, atol=0)
    eps = 2 * (0.1 * z.square().sum(1).sqrt().mean() / 2.75) ** 2
    step = Langevin(snr=0.1, norm="batch").step(model, x, t, generator=seeded())
    torch.testing.assert_close(step.x, x - eps * x + (2 * eps) ** 0.5 * z, rtol=1e-12, atol=0)


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
        noise = torch.stack([torch.randn(64, generator=seeded(i), dtype=dtype) for i in range(4)])
        ratio = noise.double().norm(dim=1, keepdim=True) / (8 / 1e-3)
        drift = -2 * (0.16 * ratio) ** 2 / 1e-3
        expected = drift.expand(-1, 64)
        error = (half.mean.double() - expected).abs().max() / expected.abs().max()
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
