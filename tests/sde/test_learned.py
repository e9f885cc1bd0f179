import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import f64, seeded

from diffusionkit import DDIM, VPSDE, EpsModel, LogSigmaLabel, PCSampler
from diffusionkit.networks import MLP
from diffusionkit.sde.learned import LearnedSDE, LogSNRSDE
from diffusionkit.testing import check_sde

# Computed independently with 40 digits.
VAR_0, VAR_1, GAMMA_MID = 1.6744904055114538e-06, 0.9933071490757152, -4.15
VP_GAMMA = (-13.81451555215112, 10.049956813318408)


def perturbed(seed: int, scale: float = 1.0, **options) -> LearnedSDE:
    """Return a schedule far from its initialization."""
    sde = LearnedSDE(hidden=16, **options).double()
    generator = seeded(seed)
    with torch.no_grad():
        for p, most in zip(sde.interior(), (0.3, 30.0, 30.0), strict=True):
            p += min(scale, most) * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return sde


@pytest.mark.parametrize("make", [LogSNRSDE, LearnedSDE])
def test_end_points_and_middle_of_the_published_range(make) -> None:
    sde = make()
    alpha, sigma = sde.marginal(f64(0.0, 1.0))
    torch.testing.assert_close(sigma.detach() ** 2, f64(VAR_0, VAR_1), rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha.detach() ** 2, f64(1 - VAR_0, 1 - VAR_1), rtol=1e-12, atol=0)
    torch.testing.assert_close(-sde.log_snr(f64(0.5)).detach(), f64(GAMMA_MID))


def test_log_snr_sde_reproduces_the_range_of_vp() -> None:
    gamma = -VPSDE().log_snr(f64(1e-5, 1.0))
    torch.testing.assert_close(gamma, f64(*VP_GAMMA), rtol=1e-9, atol=0)
    sde = LogSNRSDE(*VP_GAMMA)
    ends = VPSDE().marginal(f64(1e-5, 1.0))
    for got, expected in zip(sde.marginal(f64(0.0, 1.0)), ends, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "sde",
    [LogSNRSDE(), LogSNRSDE(-10.0, 9.0), LearnedSDE(), perturbed(0), perturbed(1, learn_ends=True)],
    ids=["fixed", "fixed wide", "new", "learned", "learned ends"],
)
def test_passes_check_sde(sde) -> None:
    check_sde(sde)


@pytest.mark.parametrize("sde", [LogSNRSDE(), perturbed(2)], ids=["fixed", "learned"])
def test_drift_and_diffusion_match_finite_differences(sde) -> None:
    t, h = f64(0.05, 0.3, 0.8), 1e-6
    with torch.no_grad():
        (a, s), (b, u) = sde.marginal(t - h), sde.marginal(t + h)
        f = (torch.log(b) - torch.log(a)) / (2 * h)
        growth = (u**2 - s**2) / (2 * h)
        torch.testing.assert_close(sde.drift_coefficient(t), f, rtol=1e-6, atol=1e-9)
        expected = growth - 2 * f * sde.marginal(t)[1] ** 2
        torch.testing.assert_close(sde.diffusion(t) ** 2, expected, rtol=1e-6, atol=1e-9)


def test_learned_schedule_matches_its_formula() -> None:
    sde = perturbed(3, learn_ends=True)
    with torch.no_grad():
        sde.ends.copy_(f64(-9.0, math.log(12.0)))
        sde.raw_steepness -= 16
    u, k, c = (p.tolist() for p in sde.interior())

    def soft(v):
        return math.log1p(math.exp(v))

    def rise(t):
        terms = (soft(c) / (1 + math.exp(-soft(k) * (t - u))) for u, k, c in zip(u, k, c))  # noqa: B905
        return t + sum(terms) / 16

    expected = [-9 + 12 * (rise(t) - rise(0)) / (rise(1) - rise(0)) for t in (0.0, 0.2, 0.7, 1.0)]
    torch.testing.assert_close(-sde.log_snr(f64(0.0, 0.2, 0.7, 1.0)).detach(), f64(*expected))


def test_starts_nearly_linear() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    with torch.no_grad():
        off = LearnedSDE().log_snr(t) - LogSNRSDE().log_snr(t)
    assert off.abs().max() < 0.01


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_monotone_with_fixed_ends_for_all_parameters(seed, scale) -> None:
    sde = perturbed(seed, scale)
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    with torch.no_grad():
        log_snr = sde.log_snr(t)
        assert (log_snr.diff() < 0).all()
        assert (sde.diffusion(t) > 0).all()
    torch.testing.assert_close(log_snr[[0, -1]], f64(13.3, -5.0), rtol=0, atol=1e-12)


def test_end_points_stay_fixed_in_training() -> None:
    sde = LearnedSDE(hidden=8)
    optimizer = torch.optim.Adam(sde.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (sde.log_snr(torch.tensor([0.3, 0.6])) - 1.0).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(sde.log_snr(f64(0, 1)), f64(13.3, -5.0), rtol=0, atol=1e-12)
        assert abs(float(sde.log_snr(f64(0.5))) - 4.15) > 0.5


def test_learned_end_points_stay_ordered() -> None:
    sde = LearnedSDE(-3.0, 2.0, hidden=4, learn_ends=True)
    optimizer = torch.optim.SGD([sde.ends], lr=0.3)
    for _ in range(20):  # pulls the ends together
        optimizer.zero_grad()
        gamma = -sde.log_snr(torch.tensor([0.0, 1.0]))
        (gamma[1] - gamma[0]).backward()
        optimizer.step()
    gamma = -sde.log_snr(f64(0.0, 1.0)).detach()
    assert 0 < gamma[1] - gamma[0] < 3
    assert "learn_ends=True" in repr(sde)


@pytest.mark.parametrize("quantity", ["log_snr", "diffusion", "drift_coefficient", "transition"])
def test_differentiable_in_every_parameter(quantity) -> None:
    sde = perturbed(4, learn_ends=True)
    t = f64(0.2, 0.5)
    times = (0.5 * t, t) if quantity == "transition" else (t,)

    def value(*parameters):
        named = zip((f"sde.{name}" for name, _ in sde.named_parameters()), parameters, strict=True)
        return torch.func.functional_call(Caller(sde, quantity), dict(named), times)

    assert torch.autograd.gradcheck(value, tuple(sde.parameters()))


class Caller(torch.nn.Module):
    """Evaluates a method of a process in `forward`."""

    def __init__(self, sde, quantity) -> None:
        super().__init__()
        self.sde, self.quantity = sde, quantity

    def forward(self, *times):
        return getattr(self.sde, self.quantity)(*times)


def test_parameters_belong_to_the_model_and_sampling_works() -> None:
    sde = LearnedSDE(hidden=8, learn_ends=True)
    model = EpsModel(MLP(2, width=8, depth=1), sde, label=LogSigmaLabel())
    assert {id(p) for p in sde.parameters()} <= {id(p) for p in model.parameters()}
    assert not {id(p) for p in sde.interior()} & {id(sde.ends)}
    x = PCSampler(model, DDIM(), steps=5)((3, 2), generator=seeded())
    assert torch.isfinite(x).all()
    assert not x.requires_grad
    log_snr = model.sde.log_snr(torch.tensor([0.25]))
    assert log_snr.dtype == torch.float32
    torch.testing.assert_close(sde.time_at_log_snr(log_snr), torch.tensor([0.25]))


@pytest.mark.parametrize("make", [LogSNRSDE, LearnedSDE])
def test_invalid_arguments_raise(make) -> None:
    with pytest.raises(ValueError, match=r"gamma_min < gamma_max, got 1.0 and 1.0"):
        make(1.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        make(-math.inf, 5.0)
    with pytest.raises(TypeError, match="gamma_max: expected a number, got str"):
        make(0.0, "5")
    for method in ("marginal", "log_snr", "drift_coefficient", "diffusion"):
        with pytest.raises(ValueError, match=r"within \[0, T\]"):
            getattr(make(), method)(torch.tensor([1.5]))


def test_invalid_number_of_sigmoids_raises() -> None:
    with pytest.raises(ValueError, match="hidden: expected an integer >= 1, got 0"):
        LearnedSDE(hidden=0)
