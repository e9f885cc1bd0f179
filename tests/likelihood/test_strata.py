"""Strata of the bound's times: exact integrals, and narrower where the integrand is noisy."""

import math

import pytest
import torch
from support import seeded

from diffusionkit import NELBO, VESDE, VPSDE, GaussianMixtureModel, SubVPSDE
from diffusionkit.likelihood._strata import Strata, pilot_draws

PROCESSES = [VPSDE(), SubVPSDE(), VESDE(sigma_min=0.01, sigma_max=50.0)]


def noisy_in_the_middle(u):
    """The standard deviation of an integrand: a tenth, and 2 within .4 ... .6."""
    return torch.where((u - 0.5).abs() < 0.1, 2.0, 0.1)


def values(strata: Strata, generator) -> torch.Tensor:
    """An integrand u^2 with this noise, at one point of each stratum."""
    rows = []
    for k in range(len(strata.widths)):
        u = torch.rand(strata.edges.shape[1], generator=generator, dtype=torch.float64)
        u = strata.draw(k, u)
        noise = torch.randn(len(u), generator=generator, dtype=torch.float64)
        rows.append(u.square() + noisy_in_the_middle(u) * noise)
    return torch.stack(rows)


def test_strata_cover_the_unit_interval() -> None:
    pilot = values(Strata.equal(40, torch.zeros(50, dtype=torch.float64)), seeded())
    for strata in (Strata.equal(7, torch.zeros(50)), Strata.by_noise(33, pilot)):
        assert (strata.widths > 0).all()
        torch.testing.assert_close(strata.widths.sum(0), torch.ones_like(strata.edges[0]))
        assert (strata.edges[0] == 0).all()
        assert (strata.edges[-1] == 1).all()


def test_noisy_strata_are_narrow_and_the_integral_unbiased() -> None:
    """Two independent runs: the mean of 4,000 is 1 / 3, with half of the equal strata's error."""
    like = torch.zeros(4000, dtype=torch.float64)
    strata = Strata.by_noise(100, values(Strata.equal(40, like), seeded()))
    width = strata.widths
    middle = (0.5 * (strata.edges[1:] + strata.edges[:-1]) - 0.5).abs()
    assert float(width[middle < 0.05].mean()) < 0.4 * float(width[middle > 0.25].mean())
    found = values(strata, seeded(1))
    integral = strata.integral(found)
    error = float(integral.std()) / math.sqrt(len(like))
    assert abs(float(integral.mean()) - 1 / 3) < 3.5 * error
    assert float(strata.variance(found).mean()) == pytest.approx(float(integral.var()), rel=0.1)
    equal = Strata.equal(100, like)
    assert float(integral.std()) < 0.7 * float(equal.integral(values(equal, seeded(2))).std())


def test_equal_strata_give_the_mean_and_its_variance() -> None:
    strata = Strata.equal(50, torch.zeros(4000, dtype=torch.float64))
    noise = torch.randn(50, 4000, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(strata.integral(noise), noise.mean(0))
    assert float(strata.variance(noise).mean()) == pytest.approx(1 / 50, rel=0.02)
    trend = 5.0 * torch.arange(50, dtype=torch.float64).unsqueeze(1)
    assert float(strata.variance(noise + trend).mean()) == pytest.approx(1 / 50, rel=0.02)
    two = Strata.equal(2, noise[0]).variance(noise[:2])
    assert float(two.mean()) == pytest.approx(1 / 2, rel=0.1)


def test_noise_in_the_last_strata_counts() -> None:
    """Of noise that grows by half from one stratum to the next, as at an end of the log-SNR."""
    growth = 1.5 ** (0.5 * torch.arange(40, dtype=torch.float64)).unsqueeze(1)
    noise = growth * torch.randn(40, 4000, generator=seeded(), dtype=torch.float64)
    strata = Strata.equal(40, noise[0])
    stated, true = strata.variance(noise).mean(), strata.integral(noise).var()
    assert float(stated / true) == pytest.approx(1.0, abs=0.15)  # .69 without the last stratum


def test_integrands_without_noise_keep_equal_strata() -> None:
    strata = Strata.by_noise(8, torch.zeros(5, 3, dtype=torch.float64))
    torch.testing.assert_close(strata.edges, Strata.equal(8, strata.edges[0]).edges)


@pytest.mark.parametrize("sde", PROCESSES)
def test_a_bound_of_placed_draws_is_unbiased(sde) -> None:
    """400 estimates agree with the closed form, and their spread with stderr."""
    samples = 300
    assert pilot_draws(samples) == 30
    model = GaussianMixtureModel(sde, torch.zeros(1, 4), [0.5])
    x = torch.tensor([[0.4, -0.3, 0.9, 0.1]], dtype=torch.float64).expand(400, 4)
    bound = NELBO(model, samples=samples)(x, generator=seeded())
    truth = -model.log_prob(x[:1], torch.zeros(1, dtype=torch.float64))
    error = float(bound.nats.std()) / 20
    assert float(bound.nats.mean()) == pytest.approx(float(truth), abs=3.5 * error)
    stated = float(bound.stderr.square().mean().sqrt())
    assert 0.8 < stated / float(bound.nats.std()) < 1.3
