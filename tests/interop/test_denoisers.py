"""Denoisers D(x, sigma) both ways, against closed forms and k-diffusion's loops, written out."""

import itertools
import math

import pytest
import torch

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    DPMSolver2M,
    EDMModel,
    EpsModel,
    GaussianMixtureModel,
    Heun,
    PCSampler,
    ScheduleTransformedModel,
    SubVPSDE,
)
from diffusionkit.interop import as_denoiser, from_denoiser
from diffusionkit.networks import MLP
from diffusionkit.testing import check_score_model

STD = 0.7
PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), DDPMChain.cosine(100)]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def to_d(x, sigma, data):
    return (x - data) / sigma.view(-1, 1)


def euler(model, x, sigmas, extra_args):
    for sigma, following in itertools.pairwise(sigmas):
        each = sigma.expand(len(x))
        x = x + to_d(x, each, model(x, each, **extra_args)) * (following - sigma)
    return x


def heun(model, x, sigmas, extra_args):
    for sigma, following in itertools.pairwise(sigmas):
        each = sigma.expand(len(x))
        d = to_d(x, each, model(x, each, **extra_args))
        ahead = x + d * (following - sigma)
        if following > 0:
            later = following.expand(len(x))
            d = (d + to_d(ahead, later, model(ahead, later, **extra_args))) / 2
        x = x + d * (following - sigma)
    return x


def dpmpp_2m(model, x, sigmas, extra_args):
    before = None
    for i in range(len(sigmas) - 1):
        data = model(x, sigmas[i].expand(len(x)), **extra_args)
        h = sigmas[i].log() - sigmas[i + 1].log()
        used = data
        if before is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            used = data + (data - before) / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * used
        before = data
    return x


def karras(n, low, high):
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_a_gaussian_is_denoised_in_closed_form(sde):
    denoiser = as_denoiser(GaussianMixtureModel(sde, [[0.0, 0.0]], [STD]))
    sigma = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    x = noise(3, 2) * torch.hypot(sigma, torch.tensor(STD)).view(-1, 1)
    expected = x * (STD**2 / (STD**2 + sigma**2)).view(-1, 1)
    torch.testing.assert_close(denoiser(x, sigma), expected)
    torch.testing.assert_close(denoiser(x, 1.0)[1], expected[1])
    torch.testing.assert_close(denoiser(x, torch.tensor(20.0))[2], expected[2])


def test_noise_levels():
    vp = as_denoiser(GaussianMixtureModel(VPSDE(), [[0.0]], [1.0]))
    assert vp.sigma_max == pytest.approx(152.17, rel=1e-4)  # sqrt(exp(10.05) - 1)
    assert vp.sigma_min == pytest.approx(math.sqrt(math.expm1(1e-4 + 9.95e-6)))
    edm = as_denoiser(GaussianMixtureModel(EDMSDE(), [[0.0]], [1.0]))
    assert (edm.sigma_min, edm.sigma_max) == pytest.approx((0.002, 80.0))
    zero = as_denoiser(GaussianMixtureModel(DDPMChain.linear(50).zero_terminal_snr(), [[0.0]], [1]))
    x = noise(2, 1) * zero.sigma_max
    torch.testing.assert_close(zero(x, zero.sigma_max), x / (1 + zero.sigma_max**2))


@pytest.mark.parametrize(
    ("theirs", "ours"), [(euler, DDIM()), (heun, Heun()), (dpmpp_2m, DPMSolver2M())]
)
def test_k_diffusion_loops_give_the_results_of_our_samplers(theirs, ours):
    torch.manual_seed(0)
    model = EpsModel(MLP(2, width=16, num_classes=3), VPSDE()).double().eval()
    denoiser, labels = as_denoiser(model), torch.tensor([0, 1, 2, 1])
    sigmas = karras(12, 0.05, 80.0)
    x = noise(4, 2) * 80.0
    with torch.no_grad():
        expected = theirs(denoiser, x, sigmas, {"class_labels": labels})
    on_sigma = ScheduleTransformedModel(model, EDMSDE())
    got = PCSampler(on_sigma, ours, grid=sigmas)(x, class_labels=labels)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_model_is_in_evaluation_mode_and_gradients_flow():
    modes = []

    class Network(torch.nn.Module):
        def forward(self, x, noise_label):
            modes.append(self.training)
            return x

    denoiser = as_denoiser(EpsModel(Network(), VPSDE()))
    x = noise(2, 1).requires_grad_()
    denoiser(x, 1.0).sum().backward()
    assert modes == [False]
    assert denoiser.model.training
    assert x.grad.abs().min() > 0
    half = denoiser(x.detach().bfloat16(), torch.tensor([1.0, 2.0]))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sigma", "kind"),
    [
        (torch.ones(3), ValueError),
        (torch.ones(2, 1), ValueError),
        (torch.tensor([1.0, 1e6]), ValueError),
        ("x", TypeError),
        (None, TypeError),
    ],
)
def test_noise_levels_of_another_shape_or_range_are_refused(sigma, kind):
    denoiser = as_denoiser(GaussianMixtureModel(VPSDE(), [[0.0]], [1.0]))
    with pytest.raises(kind, match="expected"):
        denoiser(torch.ones(2, 1), sigma)


def test_a_denoiser_is_a_score_model_of_edm():
    def denoiser(x, sigma, shift=0.0):
        assert sigma.shape == (len(x),)
        return x * (STD**2 / (STD**2 + sigma**2)).view(-1, 1).to(x.dtype) + shift

    model, exact = from_denoiser(denoiser), GaussianMixtureModel(EDMSDE(), [[0.0]], [STD])
    t = torch.tensor([0.01, 1.0, 70.0], dtype=torch.float64)
    x = noise(3, 1) * t.view(-1, 1)
    torch.testing.assert_close(model(x, t), exact(x, t))
    torch.testing.assert_close(model.predict(x, t, shift=1.0).x0, denoiser(x, t) + 1)
    assert check_score_model(model, (2, 1)).ok


def test_a_denoiser_brings_its_noise_levels():
    class Denoiser(torch.nn.Module):
        sigma_min = torch.tensor(0.03)
        sigma_max = torch.tensor(14.5)

        def forward(self, x, sigma):
            return x

    sde = from_denoiser(Denoiser(), data_range=(-1.0, 1.0)).sde
    assert (sde.sigma_min, sde.sigma_max) == pytest.approx((0.03, 14.5))
    Denoiser.sigma_min, Denoiser.sigma_max = 0.0, float("inf")  # as EDM's
    assert from_denoiser(Denoiser()).sde == EDMSDE(0.002, 80.0)
    assert from_denoiser(Denoiser(), sigma_min=0.1, sigma_max=9.0).sde == EDMSDE(0.1, 9.0)


def test_there_and_back():
    torch.manual_seed(0)
    model = EDMModel(MLP(2, width=16), EDMSDE()).double()
    again = from_denoiser(as_denoiser(model))
    x, t = noise(3, 2), torch.tensor([0.01, 1.0, 60.0], dtype=torch.float64)
    torch.testing.assert_close(again(x, t), model(x, t))
