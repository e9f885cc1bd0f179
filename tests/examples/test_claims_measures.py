"""What the claims measure: evaluations, noise and variances are those that the papers mean."""

from types import SimpleNamespace

import pytest
import torch

import diffusionkit as dk


def exact(sde, low=-0.5, high=0.5):
    """Stand for a run: an exact model of two points."""
    return SimpleNamespace(model=dk.GaussianMixtureModel(sde, [[low], [high]], [0.05, 0.05]))


@pytest.mark.parametrize("scale", ["small", "full"])
def test_samplers_of_a_budget_have_equal_evaluations_and_initial_noise(claims, scale):
    """P2000, PC1000 and C2000 of table 1: as many evaluations, and one to denoise at the end."""
    module = claims("correctors_at_equal_cost")
    run = exact(dk.VESDE(sigma_min=0.01, sigma_max=15.0))
    for predictor, _, _ in module.BUDGETS[scale]:
        first = []
        for kind in module.kinds(predictor):
            sampler = module.sampler(run, predictor, kind, 20)
            states = list(sampler.iterate((3, 1), generator=torch.Generator().manual_seed(0)))
            assert sampler.nfe == states[-1].nfe == 21, (predictor, kind)
            assert len(states) == (12 if kind == "PC" else 22)
            first.append(states[0].x)
        assert all(torch.equal(x, first[0]) for x in first)


def test_correctors_have_the_ratio_of_the_paper(claims):
    module = claims("correctors_at_equal_cost")
    run = exact(dk.VESDE(sigma_min=0.01, sigma_max=15.0))
    corrector = module.sampler(run, "reverse diffusion", "PC", 20).corrector
    assert (corrector.snr, corrector.norm, corrector.steps) == (0.16, "batch", 1)
    assert module.sampler(run, "reverse diffusion", "P", 20).corrector is None


def test_variances_of_the_weighted_loss_are_those_of_a_quadrature(claims, monkeypatch):
    """Of a network that predicts no noise, the error is that of the noise alone: 1 in the mean.

    With importance sampling the loss is Z / (T - t_min) times the mean square of d normal numbers,
    of variance 2 / d.
    """
    measures = claims("measures")
    sde, d = dk.VPSDE(t_min=0.01), 16
    model = dk.EpsModel(lambda x, noise_label: 0 * x, sde)
    levels = dk.UniformDequantizer(256, -1.0, 1.0)
    parts = SimpleNamespace(dequantizer=levels, network=torch.nn.Linear(1, 1))
    images = torch.randint(256, (2000, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(measures, "test_images", lambda run, count: images[:count].byte())
    found = measures.loss_variances(SimpleNamespace(model=model, parts=parts), 2000, 2)
    t = torch.linspace(0.01, 1.0, 100_001, dtype=torch.float64)
    weight = dk.LikelihoodWeighting()(sde, t)
    mean = float(torch.trapezoid(weight, t)) / 0.99
    second = float(torch.trapezoid(weight.square(), t)) / 0.99
    assert found["mean"] == pytest.approx(mean, rel=0.03)
    assert found["importance"] == pytest.approx(2 / d * mean**2, rel=0.1)
    assert found["uniform"] == pytest.approx((1 + 2 / d) * second - mean**2, rel=0.1)


def test_curves_cross_where_the_difference_changes_sign(claims):
    """Halfway between 100 and 10,000 in logarithms is 1,000."""
    crossing = claims("maximum_likelihood").crossing
    assert crossing({100: 1.0, 10_000: -1.0}) == pytest.approx(1000)
    assert crossing({100: 3.0, 10_000: -1.0, 20_000: -1.0}) == pytest.approx(10**3.5)
    assert crossing({100: 1.0, 200: 0.5}) is crossing({100: 1.0}) is None


def test_the_exponent_of_a_power_law(claims, tmp_path):
    """Made-up numbers with 5 C^-0.25 have it, whatever the constant of a seed."""
    module, results = claims("network_widths"), claims("results")
    numbers = results.Results(tmp_path / "n.json")
    for place, name in enumerate(module.WIDTHS):
        for seed in range(2):
            key, cost = results.Results.key(name, seed, 10), 10.0 ** (place + 8)
            value = (5 + seed) * cost**-0.25
            numbers.add(key, module.OPERATIONS, cost, 0.0)
            numbers.add(key, module.QUALITY, {"frechet": value}, 0.0)
    bits, quality = (module.slope(numbers, label) for label in module.VALUES)
    assert bits.found is None
    assert quality.found.mean == pytest.approx(-0.25)
    assert quality.found.half == pytest.approx(0, abs=1e-9)
    by_width = [one for one in module.findings(numbers) if "width 16" in one.claim]
    assert by_width[1].found.mean < 0


def test_operations_are_those_of_training(claims, tmp_path):
    """A convolution with 9 weights in 1 channel of 8x8: 2 operations each, 3 passes."""
    module = claims("network_widths")
    network = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    stand_in = torch.nn.Module()
    stand_in.forward = lambda x, label: network(x)
    settings = {"data": {"channels": 1, "size": 8}, "training": {"batch": 5}}
    run = SimpleNamespace(settings=settings, step=7, parts=SimpleNamespace(network=stand_in))
    assert module.operations(run) == 3 * (2 * 9 * 64) * 5 * 7
