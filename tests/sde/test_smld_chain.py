import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import f64

from diffusionkit.sde import VESDE
from diffusionkit.sde.smld_chain import SMLDChain
from diffusionkit.testing import check_sde


def test_three_levels_computed_by_hand() -> None:
    chain = SMLDChain([0.1, 1.0, 10.0])
    t = f64(0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1)
    variance = f64(0, 0.005, 0.01, 0.505, 1, 50.5, 100)
    alpha, sigma = chain.marginal(t)
    assert alpha.tolist() == [1.0] * 7
    torch.testing.assert_close(sigma**2, variance, rtol=1e-14, atol=0)
    torch.testing.assert_close(chain.log_snr(t[1:]), -variance[1:].log(), rtol=1e-13, atol=1e-13)
    rates = f64(0.01, 0.99, 99) * 3
    ends = f64(1 / 3, 2 / 3, 1)
    torch.testing.assert_close(chain.diffusion(ends) ** 2, rates, rtol=1e-13, atol=0)
    assert chain.drift_coefficient(ends).tolist() == [0.0] * 3
    scale, std = chain.transition(t[:-1], t[1:])
    assert scale.tolist() == [1.0] * 6
    torch.testing.assert_close(std**2, variance.diff(), rtol=1e-13, atol=0)
    assert float(chain.transition(t[1:2], t[5:6])[1] ** 2) == pytest.approx(50.495, rel=1e-13)
    assert chain.prior_std == 10.0
    assert chain.t_min == chain.t_stop == 1 / 3
    assert chain.steps == 3
    assert repr(chain) == "SMLDChain(3 steps, sigmas 0.1 ... 10)"


def test_close_levels_lose_no_digits() -> None:
    """Subtracting squares of 1e6 that differ by 2e-3 would leave seven digits."""
    chain = SMLDChain([1.0, 1000.0, 1000.000001])
    wanted = (1000.000001 - 1000.0) * 2000.000001
    std = chain.transition(f64(2 / 3), f64(1.0))[1]
    assert float(std**2) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize(
    "chain",
    [SMLDChain([0.5, 3.0]), SMLDChain.geometric(30), SMLDChain.geometric(1000, sigma_max=300.0)],
    ids=repr,
)
def test_passes_check_sde(chain) -> None:
    assert check_sde(chain).ok


@given(st.floats(1e-6, 1.0))
def test_time_at_log_snr_inverts_log_snr(t) -> None:
    chain, t = SMLDChain.geometric(40), f64(t)
    torch.testing.assert_close(chain.time_at_log_snr(chain.log_snr(t)), t, rtol=1e-12, atol=0)


def test_time_at_log_snr_is_clamped_to_the_ends() -> None:
    chain = SMLDChain.geometric(10)
    assert chain.time_at_log_snr(f64(-1e3, math.inf)).tolist() == [1.0, 0.0]


def test_converges_to_ve_with_many_levels() -> None:
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    limit = VESDE(sigma_min=0.02, sigma_max=30.0).log_snr(t)

    def error(steps):
        chain = SMLDChain.geometric(steps, sigma_min=0.02, sigma_max=30.0)
        return float((chain.log_snr(t) - limit).abs().max())

    errors = [error(steps) for steps in (1000, 10_000)]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


def test_geometric_levels() -> None:
    chain = SMLDChain.geometric(5, sigma_min=0.01, sigma_max=100.0)
    torch.testing.assert_close(chain.sigmas, f64(0.01, 0.1, 1, 10, 100), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("sigmas", "match"),
    [
        ([], r"strictly increasing, got \[\] \.\.\. of 0$"),
        ([1.0], "of 1$"),
        ([50.0, 1.0, 0.01], "of 3; reverse their order"),
        ([0.1, 0.1], "of 2$"),
        ([0.0, 0.1], "of 2$"),
        ([-1.0, 0.1], "of 2$"),
        ([0.1, math.inf], "of 2$"),
        ([0.1, math.nan], "of 2$"),
    ],
)
def test_invalid_levels_raise(sigmas, match) -> None:
    with pytest.raises(ValueError, match=f"sigmas: expected at least two positive.*{match}"):
        SMLDChain(sigmas)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SMLDChain.geometric(0),
        lambda: SMLDChain.geometric(1),
        lambda: SMLDChain.geometric(sigma_min=0.0),
        lambda: SMLDChain.geometric(sigma_max=-1.0),
        lambda: SMLDChain.geometric(sigma_min=2.0, sigma_max=1.0),
        lambda: SMLDChain.geometric(10).drift_coefficient(f64(1.5)),
        lambda: SMLDChain.geometric(10).transition(f64(0.5), f64(0.4)),
    ],
)
def test_invalid_arguments_raise(make) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


def test_sigmas_are_copied() -> None:
    sigmas = f64(1, 2, 3)
    chain = SMLDChain(sigmas)
    sigmas *= 2
    assert chain.sigmas.tolist() == [1, 2, 3]
