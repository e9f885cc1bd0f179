"""The process of flow matching, against values computed with exact fractions."""

import math

import pytest
import torch
from support import f64

from diffusionkit import FlowMatchingSDE
from diffusionkit.testing import check_sde

SDE = FlowMatchingSDE()


def test_the_process_is_consistent():
    assert check_sde(SDE).ok
    assert check_sde(FlowMatchingSDE(t_min=1e-5)).ok


def test_closed_forms_by_hand():
    """At t = 1/4, from x_t = 3/4 x0 + 1/4 eps; the step from 1/5 to 1/2 scales by 5/8."""
    t = f64(0.25)
    assert [float(c) for c in SDE.marginal(t)] == [0.75, 0.25]
    assert float(SDE.drift_coefficient(t)) == pytest.approx(-4 / 3, rel=1e-15)
    assert float(SDE.diffusion(t)) ** 2 == pytest.approx(2 / 3, rel=1e-15)
    assert float(SDE.log_snr(t)) == pytest.approx(math.log(9), rel=1e-15)
    assert float(SDE.time_at_log_snr(f64(math.log(9)))) == pytest.approx(0.25, rel=1e-15)
    scale, std = SDE.transition(f64(0.2), f64(0.5))
    assert float(scale) == pytest.approx(5 / 8, rel=1e-15)
    assert float(std) ** 2 == pytest.approx(1 / 4 - 1 / 64, rel=1e-14)


def test_the_end_has_no_signal():
    assert [float(c) for c in SDE.marginal(f64(1.0))] == [0.0, 1.0]
    assert float(SDE.log_snr(f64(1.0))) == -math.inf
    assert float(SDE.time_at_log_snr(f64(-math.inf))) == 1.0
    assert [float(c) for c in SDE.transition(f64(0.3), f64(1.0))] == [0.0, 1.0]
    assert [float(c) for c in SDE.transition(f64(1.0), f64(1.0))] == [1.0, 0.0]


@pytest.mark.parametrize("gap", [1e-3, 1e-9, 1e-13])
def test_short_transitions_lose_no_digits(gap):
    """std^2 / (t - s) tends to g^2."""
    s = f64(1e-3, 0.3, 0.9)
    t = s * (1 + gap)
    rate = SDE.transition(s, t)[1].square() / (t - s)
    torch.testing.assert_close(rate, SDE.diffusion(s).square(), rtol=200 * gap + 1e-9, atol=0)
