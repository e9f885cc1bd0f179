import math

import pytest
import torch
from support import f64
from torch.distributions import Normal, kl_divergence

from diffusionkit._gaussian import gaussian_kl, log_normal_cdf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("z", [-3e4, -300.0, -8.0, -1.0, 0.0, 2.0, 12.0])
def test_log_normal_cdf_and_its_derivative(z, dtype) -> None:
    """Compare with math.erfc, and with the asymptotic series in the far tail."""
    at = torch.tensor(z, dtype=dtype, requires_grad=True)
    value = log_normal_cdf(at)
    (slope,) = torch.autograd.grad(value, at)
    if z < -20:
        series = 1 - z**-2 + 3 * z**-4
        log_phi = -0.5 * z * z - 0.5 * math.log(2 * math.pi) - math.log(-z) + math.log(series)
        hazard = -z / series
    else:
        log_phi = math.log(0.5 * math.erfc(-z / math.sqrt(2)))
        if z > 8:
            log_phi = -0.5 * math.erfc(z / math.sqrt(2))
        hazard = math.exp(-0.5 * z * z - log_phi) / math.sqrt(2 * math.pi)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    assert float(value.detach()) == pytest.approx(log_phi, rel=rtol, abs=1e-37)
    assert float(slope) == pytest.approx(hazard, rel=rtol, abs=1e-37)


def test_gaussian_kl_matches_torch() -> None:
    torch.manual_seed(0)
    m1, m2, lv1, lv2 = torch.randn(4, 50).double()
    want = kl_divergence(Normal(m1, (0.5 * lv1).exp()), Normal(m2, (0.5 * lv2).exp()))
    torch.testing.assert_close(gaussian_kl(m1 - m2, lv1, lv2), want, rtol=1e-12, atol=1e-14)
    near = gaussian_kl(f64(0.0), f64(1e-6), f64(0.0))  # delta^2 / 4
    assert float(near) == pytest.approx(2.5e-13, rel=1e-3)
