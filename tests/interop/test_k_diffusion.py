"""Samplers and wrappers of k-diffusion itself, where it is installed."""

import pytest
import torch

from diffusionkit import (
    DDIM,
    EDMSDE,
    LMS,
    Ancestral,
    DDPMChain,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2SAncestral,
    DPMSolver3MSDE,
    EDMModel,
    EpsModel,
    Heun,
    KarrasGrid,
    PCSampler,
    StepLabel,
)
from diffusionkit.interop import as_denoiser, from_denoiser
from diffusionkit.networks import MLP

sampling = pytest.importorskip("k_diffusion.sampling")
external = pytest.importorskip("k_diffusion.external")


def model():
    torch.manual_seed(0)
    return EDMModel(MLP(2, width=16), EDMSDE(0.02, 80.0)).double().eval()


@pytest.mark.parametrize(
    ("name", "predictor"),
    [
        ("sample_euler", DDIM()),
        ("sample_heun", Heun()),
        ("sample_dpmpp_2m", DPMSolver2M()),
        ("sample_euler_ancestral", Ancestral()),
        ("sample_dpmpp_2m_sde", DPMSolver2MSDE()),
        ("sample_dpmpp_3m_sde", DPMSolver3MSDE(form="published")),
        ("sample_dpmpp_2s_ancestral", DPMSolver2SAncestral()),
    ],
)
def test_samplers(name, predictor):
    ours, x = model(), torch.randn(4, 2, dtype=torch.float64) * 80  # seeded by model
    sigmas = sampling.get_sigmas_karras(15, 0.02, 80.0).double()
    noise = torch.Generator().manual_seed(1)

    def noise_sampler(sigma, following):
        return torch.randn(x.shape, generator=noise, dtype=x.dtype)

    extra = {"noise_sampler": noise_sampler} if "ancestral" in name or "sde" in name else {}
    expected = getattr(sampling, name)(as_denoiser(ours), x, sigmas, disable=True, **extra)
    sampler = PCSampler(ours, predictor, grid=sigmas)
    got = sampler(x, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_lms_and_the_grid():
    ours, x = model(), torch.randn(4, 2, dtype=torch.float64) * 80  # seeded by model
    grid = KarrasGrid(t_end=0.02, to_zero=True)(ours.sde, 15)
    sigmas = sampling.get_sigmas_karras(15, 0.02, 80.0)
    torch.testing.assert_close(grid.float(), sigmas, rtol=1e-5, atol=1e-6)
    sigmas = sigmas.double()[:-1]  # to 0 its step extrapolates
    expected = sampling.sample_lms(as_denoiser(ours), x, sigmas, disable=True)
    got = PCSampler(ours, LMS(), grid=sigmas, denoise=False)(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_its_wrapper_of_a_chain_is_our_model_on_it():
    torch.manual_seed(0)
    network, chain = MLP(2, width=16).eval(), DDPMChain.linear(100)
    bar = chain.marginal(chain.time(range(100)))[0].square().float()
    theirs = external.DiscreteEpsDDPMDenoiser(network, bar, quantize=True)
    ours = as_denoiser(EpsModel(network, chain, label=StepLabel(100)))
    again = from_denoiser(theirs)
    assert again.sde.sigma_max == pytest.approx(float(theirs.sigma_max))
    x, sigma = torch.randn(3, 2), theirs.sigmas[[3, 50, 99]]
    with torch.no_grad():
        torch.testing.assert_close(ours(x, sigma), theirs(x, sigma), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(again.predict(x, sigma).x0, theirs(x, sigma))


def bimodal(x, sigma):
    sigma = sigma.view(-1, 1)
    variance = 0.2**2 + sigma**2
    mean = 0.5 * torch.tanh(0.5 * x / variance)
    return (0.2**2 * x + sigma**2 * mean) / variance


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("sample_heun", [-0.6669, -0.2264, 0.4153, 0.8396]),
        ("sample_dpmpp_2m", [-0.6707, -0.2198, 0.4226, 0.8384]),
    ],
)
def test_the_numbers_of_the_page(name, printed):
    """docs/coming_from/k_diffusion.md prints ours."""
    x = torch.tensor([[-1.2], [-0.1], [0.4], [1.9]]) * 80.0
    sigmas = sampling.get_sigmas_karras(18, 0.02, 80.0)
    got = getattr(sampling, name)(bimodal, x, sigmas, disable=True)
    assert [round(value, 4) for value in got.flatten().tolist()] == printed
