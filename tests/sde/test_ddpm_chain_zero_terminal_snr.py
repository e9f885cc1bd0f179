"""DDPM chains with zero terminal SNR, and chains created from alpha-bar."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import f64, seeded

from diffusionkit.interfaces import ForwardSDE
from diffusionkit.models import EpsModel, VModel, X0Model
from diffusionkit.sampling import DDIM, Ancestral, EulerMaruyama, PCSampler
from diffusionkit.sampling.adaptive import AdaptiveSDE
from diffusionkit.sampling.heun import Euler, Heun
from diffusionkit.sde.ddpm_chain import DDPMChain


def test_three_steps_computed_by_hand() -> None:
    """alpha of 0.9, 0.7, 0.3 becomes 0.9, 0.6, 0."""
    chain = DDPMChain.from_alphas_bar([0.81, 0.49, 0.09])
    torch.testing.assert_close(chain.betas, f64(0.19, 32 / 81, 40 / 49))
    rescaled = chain.zero_terminal_snr()
    torch.testing.assert_close(rescaled.betas, f64(0.19, 5 / 9, 1), rtol=1e-14, atol=0)
    assert float(rescaled.betas[-1]) == 1.0
    t = f64(0, 1 / 3, 2 / 3, 0.75, 5 / 6, 1)
    alpha, sigma = rescaled.marginal(t)
    expected = f64(1, 0.9, 0.6, 0.45, 0.3, 0)  # linear in the last step
    torch.testing.assert_close(alpha, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma, (1 - expected**2).sqrt(), rtol=1e-14, atol=1e-15)
    log_snr = rescaled.log_snr(t)
    assert float(log_snr[-1]) == -math.inf
    torch.testing.assert_close(rescaled.time_at_log_snr(log_snr), t, rtol=1e-14, atol=0)
    assert repr(rescaled) == "DDPMChain(3 steps, betas 0.19 ... 1)"
    again = rescaled.zero_terminal_snr()
    torch.testing.assert_close(again.betas, rescaled.betas)


def test_transitions_to_zero_snr() -> None:
    chain = DDPMChain.from_alphas_bar([0.81, 0.36, 0.0])
    s, t = f64(0, 1 / 3, 2 / 3, 0.75, 0.75, 1, 0.5), f64(1, 1, 1, 1, 5 / 6, 1, 0.75)
    scale, std = chain.transition(s, t)
    middle = 0.9 * (2 / 3) ** 0.5  # alpha(.5): geometric between .9 and .6
    expected = f64(0, 0, 0, 0, 0.3 / 0.45, 1, 0.45 / middle)
    torch.testing.assert_close(scale, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(std, (1 - expected**2).sqrt(), rtol=1e-13, atol=1e-15)


def test_drift_and_diffusion_match_the_marginals() -> None:
    chain = DDPMChain.linear(100).zero_terminal_snr()
    t = torch.linspace(0.005, 0.9985, 57, dtype=torch.float64)
    auto = ForwardSDE.drift_coefficient(chain, t)
    torch.testing.assert_close(chain.drift_coefficient(t), auto, rtol=1e-9, atol=0)
    auto = ForwardSDE.diffusion(chain, t)
    torch.testing.assert_close(chain.diffusion(t), auto, rtol=1e-7, atol=0)
    # d log(1 - u) / dt, at half of the last step, u = 0.5.
    assert float(chain.drift_coefficient(f64(0.995))) == pytest.approx(-200, rel=1e-10)


@given(st.floats(1e-6, 1 - 1e-9))
def test_time_at_log_snr_inverts_log_snr(t) -> None:
    chain, t = DDPMChain.cosine(50).zero_terminal_snr(), f64(t)
    log_snr = chain.log_snr(t)
    alpha, sigma = chain.marginal(t)
    torch.testing.assert_close(log_snr, 2 * (alpha / sigma).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chain.time_at_log_snr(log_snr), t, rtol=1e-8, atol=0)


def test_rescaling_keeps_the_first_alpha_and_is_linear() -> None:
    """Lin et al. 2023, algorithm 1, for 1000 linear steps."""
    chain = DDPMChain.linear(1000)
    rescaled = chain.zero_terminal_snr()
    t = chain.time(list(range(1000)))
    old, new = chain.marginal(t)[0], rescaled.marginal(t)[0]
    assert float(new[0]) == pytest.approx(float(old[0]), rel=1e-14)
    slope = (old[0] - old[-1]) / (new[0] - new[-1])
    torch.testing.assert_close(old - old[-1], new * slope, rtol=1e-9, atol=1e-12)
    assert float(new[-1]) == 0.0
    assert float(rescaled.marginal(f64(1.0))[1]) == rescaled.prior_std == 1.0


@pytest.mark.parametrize("predictor", [Ancestral(), Ancestral("forward"), DDIM(), DDIM(eta=1.0)])
def test_samplers_start_from_pure_noise(predictor) -> None:
    chain = DDPMChain.linear(50).zero_terminal_snr()
    x0 = torch.tensor([0.3, -0.7])
    model = X0Model(lambda x, noise_label: x0.expand_as(x), chain)
    x = PCSampler(model, predictor, steps=49)((3, 2), generator=seeded())
    torch.testing.assert_close(x, x0.expand(3, 2))
    velocity = VModel(lambda x, noise_label: -x0.expand_as(x), chain)
    first = predictor.step(velocity, torch.randn(3, 2), torch.ones(3), torch.full((3,), 0.98))
    assert torch.isfinite(first.x).all()


def test_noise_predictions_raise_at_zero_snr() -> None:
    chain = DDPMChain.linear(50).zero_terminal_snr()
    with pytest.raises(ValueError, match="model: expected a prediction of x0 or of a velocity"):
        PCSampler(EpsModel(lambda x, noise_label: x, chain), DDIM(), steps=49)((3, 2))


@pytest.mark.parametrize(
    "predictor", [EulerMaruyama(), Euler(), Heun(), Heun(churn=20.0), AdaptiveSDE(0.1, 0.1)]
)
def test_sde_solvers_start_at_zero_snr(predictor) -> None:
    """The drift is infinite at alpha = 0, but a step from there is not."""
    chain = DDPMChain.linear(50).zero_terminal_snr()
    model = X0Model(lambda x, noise_label: 0.5 * torch.ones_like(x), chain)
    x = PCSampler(model, predictor, steps=49)((2, 1), generator=seeded())
    torch.testing.assert_close(x, torch.full((2, 1), 0.5), rtol=0, atol=1e-6)
    if predictor != Heun(churn=20.0):  # churn needs a grid
        x, t = torch.ones(2, 1), f64(0.5, 1)
        with torch.no_grad():
            both, alone = (predictor.step(model, x[k:], t[k:], t[k:] - 0.02) for k in (0, 1))
        assert torch.isfinite(both.x).all()
        if not isinstance(predictor, (EulerMaruyama, AdaptiveSDE)):
            assert float(both.x[1]) == float(alone.x)


@pytest.mark.parametrize("predictor", [Euler(), Heun(), Heun(alpha=0.5)])
def test_solvers_of_the_flow_raise_where_its_slope_is_infinite(predictor) -> None:
    class Root(ForwardSDE):
        def marginal(self, t):
            return torch.sqrt(1 - t), torch.sqrt(t)

    model = X0Model(lambda x, noise_label: 0.5 * torch.ones_like(x), Root())
    message = rf"begin where alpha > 0, .* got t = 1 with {type(predictor).__name__}; use a pred"
    with pytest.raises(ValueError, match=message):
        PCSampler(model, predictor, steps=9)
    x = PCSampler(model, DDIM(), steps=9)((2, 1))
    torch.testing.assert_close(x, torch.full((2, 1), 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_from_alphas_bar_recovers_the_chain(kind) -> None:
    chain = getattr(DDPMChain, kind)(200)
    alphas_bar = chain.marginal(chain.time(list(range(200))))[0] ** 2
    got = DDPMChain.from_alphas_bar(alphas_bar)
    torch.testing.assert_close(got.betas, chain.betas, rtol=1e-11, atol=0)
