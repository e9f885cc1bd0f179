import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import f64, seeded

from diffusionkit import EDMSDE, VESDE, VPSDE, DDPMChain, ForwardSDE, SubVPSDE

# alpha, sigma and g^2 of VP(0.1, 20), sub-VP(0.1, 20) and VE(0.01, 50), with 40 digits.
REFERENCE = {
    1e-5: {
        "vp": (0.9999994995026252, 0.0010004971259352383, 0.100199),
        "subvp": (0.9999994995026252, 1.0009944990046721e-06, 2.0059719521314358e-07),
        "ve": (1.0, 0.01000085175559146, 0.0017037288333184573),
    },
    1e-2: {
        "vp": (0.9990029973377464, 0.044643155244657055, 0.299),
        "subvp": (0.9990029973377464, 0.0019930113101985507, 0.0011906331073680422),
        "ve": (1.0, 0.010889042680001354, 0.0020197884946893153),
    },
    0.5: {
        "vp": (0.28118288079675235, 0.9596542020680362, 10.05),
        "subvp": (0.28118288079675235, 0.9209361875468394, 9.987176581281734),
        "ve": (1.0, 0.7071067811865476, 8.517193191416238),
    },
    1.0: {
        "vp": (0.0065715864949296154, 0.9999784068923386, 20.0),
        "subvp": (0.0065715864949296154, 0.9999568142509396, 19.99999996269982),
        "ve": (1.0, 50.0, 42585.965957081185),
    },
}
DEFAULTS = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE()}


class MarginalOnly(ForwardSDE):
    """An SDE that defines only `marginal`."""

    def __init__(self, sde: ForwardSDE) -> None:
        self.sde, self.T, self.t_min = sde, sde.T, sde.t_min

    def marginal(self, t):
        return self.sde.marginal(t)


def times(sde, u):
    """Return times at fractions u between t_min and T, in log t."""
    t = sde.t_min * (sde.T / sde.t_min) ** torch.as_tensor(u, dtype=torch.float64)
    return t.clamp(sde.t_min, sde.T)


# Not closer than the rounding with which chains meet the ends of their steps.
fractions = (
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3, unique=True)
    .map(sorted)
    .filter(lambda u: min(u[1] - u[0], u[2] - u[1]) > 1e-9)
)


@pytest.mark.parametrize("time", REFERENCE)
@pytest.mark.parametrize("name", DEFAULTS)
def test_marginal_and_diffusion_match_40_digit_values(name, time):
    sde, t = DEFAULTS[name], f64(time)
    alpha, sigma, g2 = REFERENCE[time][name]
    assert float(sde.marginal(t)[0]) == pytest.approx(alpha, rel=1e-12)
    assert float(sde.marginal(t)[1]) == pytest.approx(sigma, rel=1e-12)
    assert float(sde.diffusion(t)) ** 2 == pytest.approx(g2, rel=1e-12)


@pytest.mark.parametrize("time", [1e-5, 0.5, 1.0])
@pytest.mark.parametrize("name", DEFAULTS)
def test_float32_times_lose_only_rounding(name, time):
    alpha, sigma, _ = REFERENCE[time][name]
    got = DEFAULTS[name].marginal(torch.tensor([time]))
    assert [float(c) for c in got] == pytest.approx([alpha, sigma], rel=2e-6)


def test_edm_time_is_the_noise():
    alpha, sigma = EDMSDE().marginal(f64(0.002, 3.0, 80.0))
    torch.testing.assert_close(alpha, f64(1, 1, 1))
    torch.testing.assert_close(sigma, f64(0.002, 3, 80))
    torch.testing.assert_close(EDMSDE().diffusion(f64(8.0)), f64(4.0))


@given(u=fractions)
def test_drift_and_diffusion_are_derivatives_of_the_marginals(sde, u):
    t = times(sde, u)
    if isinstance(sde, DDPMChain):  # f and g jump at the steps
        t = ((t * sde.steps).floor().clamp_max(sde.steps - 1) + 0.5) / sde.steps
    plain = MarginalOnly(sde)
    drift = plain.drift_coefficient(t)
    torch.testing.assert_close(sde.drift_coefficient(t), drift, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sde.diffusion(t), plain.diffusion(t), rtol=1e-9, atol=0)
    # Compare with a difference quotient, independent of autograd.
    h = 1e-5 * t.clamp_max(sde.T / 2)
    middle = t.clamp_max(0.99 * sde.T)
    if isinstance(sde, DDPMChain):  # f and g jump at the steps
        middle = ((middle * sde.steps).floor() + 0.5) / sde.steps
    (a0, s0), (a1, s1) = sde.marginal(middle - h), sde.marginal(middle + h)
    f = sde.drift_coefficient(middle)
    g2 = (s1**2 - s0**2) / (2 * h) - 2 * f * sde.marginal(middle)[1] ** 2
    torch.testing.assert_close(f, (a1.log() - a0.log()) / (2 * h), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(sde.diffusion(middle) ** 2, g2, rtol=1e-4, atol=1e-12)


@given(u=fractions)
def test_transitions_compose(sde, u):
    s, m, t = (times(sde, v).unsqueeze(0) for v in u)
    for process in (sde, MarginalOnly(sde)):
        first, second, whole = (process.transition(*e) for e in ((s, m), (m, t), (s, t)))
        (alpha_s, sigma_s), (alpha_t, sigma_t) = process.marginal(s), process.marginal(t)
        torch.testing.assert_close(first[0] * second[0], whole[0], rtol=1e-10, atol=0)
        composed = second[0] ** 2 * first[1] ** 2 + second[1] ** 2
        torch.testing.assert_close(composed, whole[1] ** 2, rtol=1e-9, atol=1e-25)
        torch.testing.assert_close(whole[0] * alpha_s, alpha_t, rtol=1e-10, atol=0)
        total = whole[0] ** 2 * sigma_s**2 + whole[1] ** 2
        torch.testing.assert_close(total, sigma_t**2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("gap", [1e-3, 1e-9, 1e-13])
def test_transitions_over_tiny_steps_lose_no_digits(sde, gap):
    """var / (t - s) tends to g^2; a difference of variances would lose all digits."""
    s = times(sde, [0.3, 0.6, 0.9])
    t = s * (1 + gap)
    _, std = sde.transition(s, t)
    rate, rtol = std**2 / (t - s), 20 * gap + 1e-9
    torch.testing.assert_close(rate, sde.diffusion(s) ** 2, rtol=rtol, atol=0)


def test_transitions_of_zero_and_full_length(sde):
    zero, t = f64(0.0), f64(sde.T)
    assert float(sde.transition(t, t)[1]) == 0.0
    assert float(sde.transition(zero, zero)[1]) == 0.0
    scale, std = sde.transition(zero, t)
    alpha, sigma = sde.marginal(t)
    start = sde.marginal(zero)[1]
    torch.testing.assert_close(scale, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(std**2 + (scale * start) ** 2, sigma**2, rtol=1e-12, atol=0)


@given(u=fractions)
def test_time_at_log_snr_inverts_log_snr(sde, u):
    t = times(sde, u)
    for process in (sde, MarginalOnly(sde)):
        alpha, sigma = process.marginal(t)
        log_snr = process.log_snr(t)
        expected = 2 * (alpha.log() - sigma.log())
        torch.testing.assert_close(log_snr, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(process.time_at_log_snr(log_snr), t, rtol=1e-9, atol=0)


# log(1 / expm1 B) for VP, log(1 / (4 sinh^2(B / 2))) for sub-VP, with 30 digits, B(.5) = 2.5375.
@pytest.mark.parametrize(
    ("name", "expected"),
    [("vp", -2.45513546882), ("subvp", -2.37277093764), ("ve", 0.6931471806)],
)
def test_log_snr_matches_30_digit_values(name, expected):
    assert float(DEFAULTS[name].log_snr(f64(0.5))) == pytest.approx(expected, abs=1e-9)


def test_default_drift_and_diffusion_are_finite_at_time_zero(sde):
    """sigma starts as sqrt(t) in some processes, but g is finite."""
    plain = MarginalOnly(sde)
    zero = f64(0.0)
    assert torch.isfinite(plain.drift_coefficient(zero)).all()
    torch.testing.assert_close(plain.diffusion(zero), sde.diffusion(zero), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 4), (5, 3, 4, 4), (5, 1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturb_adds_noise_to_the_scaled_data(sde, shape, dtype):
    x0 = torch.randn(shape, generator=seeded(1), dtype=dtype)
    t = times(sde, torch.linspace(0, 1, 5))
    sample = sde.perturb(x0, t, generator=seeded())
    assert sample.x.shape == sample.eps.shape == shape
    assert sample.x.dtype == sample.alpha.dtype == dtype
    assert sample.alpha.shape == sample.sigma.shape == (5,)
    for i in range(5):
        alpha, sigma = (float(c[i]) for c in sde.marginal(t))
        torch.testing.assert_close(sample.x[i], alpha * x0[i] + sigma * sample.eps[i])


def test_perturb_computes_half_precision_in_float32():
    x0 = torch.full((1, 64), 1.0, dtype=torch.bfloat16)
    sample = VESDE().perturb(x0, torch.tensor([0.3]), generator=seeded())
    sigma = VESDE().marginal(f64(0.3))[1]
    exact = x0.double() + sigma * sample.eps.double()
    # A single rounding to 8 bits, not three.
    assert float(((sample.x.double() - exact) / exact).abs().max()) < 2**-8


def test_prior_is_gaussian(sde):
    x = torch.randn(4, 3, 2, generator=seeded(), dtype=torch.float64)
    x = x * sde.prior_std
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), sde.prior_std)
    expected = normal.log_prob(x).sum((1, 2))
    torch.testing.assert_close(sde.prior_log_prob(x), expected, rtol=1e-12, atol=1e-12)
    z = sde.prior_sample((20000, 2), generator=seeded())
    # The standard error of a standard deviation from 40000 normals is .35%.
    assert float(z.std()) == pytest.approx(sde.prior_std, rel=0.015)


def test_prior_std_of_the_papers():
    assert VPSDE().prior_std == SubVPSDE().prior_std == 1.0
    assert VESDE(sigma_max=50.0).prior_std == 50.0
    assert EDMSDE(sigma_max=80.0).prior_std == 80.0
    # The default is sigma(T).
    assert MarginalOnly(VESDE(sigma_max=7.0)).prior_std == pytest.approx(7.0)


def test_learned_schedules_receive_gradients():
    rate = torch.nn.Parameter(f64(1.3))

    class Learned(ForwardSDE):
        def marginal(self, t):
            return torch.exp(-rate * t), torch.sqrt(-torch.expm1(-2 * rate * t))

    sde = Learned()
    t = f64(0.2, 0.7)
    torch.testing.assert_close(sde.diffusion(t).detach(), torch.full_like(t, math.sqrt(2.6)))
    (gradient,) = torch.autograd.grad(sde.diffusion(t).sum(), rate)
    assert float(gradient) == pytest.approx(2 / math.sqrt(2.6))  # d sqrt(2 r) / dr, two times
    assert not MarginalOnly(VPSDE()).diffusion(t).requires_grad


def test_schedules_with_only_alpha_learned_receive_gradients():
    rate = torch.nn.Parameter(f64(1.5))

    class Scaled(ForwardSDE):
        def marginal(self, t):
            return torch.exp(-rate * t), t

    # f = -rate, g^2 = 2 t + 2 rate t^2
    t = f64(0.5)
    (gradient,) = torch.autograd.grad(Scaled().diffusion(t).square().sum(), rate)
    assert float(gradient) == pytest.approx(2 * 0.25)
    (gradient,) = torch.autograd.grad(Scaled().drift_coefficient(t).sum(), rate)
    assert float(gradient) == pytest.approx(-1.0)


def test_time_at_log_snr_is_clamped_to_the_ends(sde):
    for process in (sde, MarginalOnly(sde)):
        t = process.time_at_log_snr(f64(-80.0, 80.0))
        assert float(t[0]) == pytest.approx(sde.T, rel=1e-9)
        assert 0.0 <= float(t[1]) <= 1e-6 * sde.T


def test_sdes_compare_and_print_by_value():
    assert VPSDE(0.1, 10.0) == VPSDE(0.1, 10.0) != VPSDE()
    assert repr(VESDE()) == "VESDE(sigma_min=0.01, sigma_max=50.0, t_min=1e-05)"
