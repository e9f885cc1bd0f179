"""The distribution of log-SNRs with and without an end, against its density."""

import math

import pytest
import torch
from support import f64

from diffusionkit._log_snr import FAINTEST, LARGEST_RATIO, LogSNRSpan, with_signal


def test_a_finite_span_is_uniform():
    span = LogSNRSpan(6.0, -4.0)
    assert (span.length, span.floor) == (10.0, -4.0)
    assert span.at(f64(0.0, 0.25, 1.0)).tolist() == [6.0, 3.5, -4.0]
    assert span.share(f64(6.0, -4.0)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("last", [-math.inf, f64(-math.inf)[0]])
def test_without_signal_quantiles_belong_to_the_density(last):
    """Integrated by a sum over small steps: the fraction above each quantile."""
    span = LogSNRSpan(6.0, last)
    assert float(span.length) == pytest.approx(6.0 - FAINTEST + 2.0)
    u = f64(0.0, 0.3, 0.9, 0.95, 0.99)
    step = 1e-3
    grid = torch.arange(6.0 - step / 2, -60.0, -step, dtype=torch.float64)
    density = span.share(grid) / span.length
    for fraction, level in zip(u.tolist(), span.at(u).tolist(), strict=True):
        assert float(density[grid > level].sum() * step) == pytest.approx(fraction, abs=1e-4)
    assert float(density.sum() * step) == pytest.approx(1.0, abs=1e-4)
    assert float(span.at(f64(1.0))) == -math.inf


def test_the_faintest_level():
    levels = with_signal(f64(3.0, -50.0, -math.inf))
    assert levels[:2].tolist() == [3.0, -50.0]
    assert float(torch.exp(-0.5 * levels[2])) == pytest.approx(LARGEST_RATIO)
