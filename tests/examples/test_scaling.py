import re

import numpy as np
import pytest
import torch
from support.pictures import check_picture
from torch import nn


@pytest.fixture
def small(example, monkeypatch):
    """Reduce the cost of the example."""
    images = example.patches()
    images = images._replace(train=images.train[:300], test=images.test[:20])
    monkeypatch.setattr(example, "patches", lambda: images)
    monkeypatch.setattr(example, "CHAIN", example.DDPMChain.cosine(12))
    monkeypatch.setattr(example, "SAMPLER_STEPS", "4")
    monkeypatch.setattr(example, "EVALUATIONS", 3)
    monkeypatch.setattr(example, "RESAMPLES", 20)
    monkeypatch.setattr(example, "TESTED", 10)
    return example


def test_small_run(small, picture, capsys):
    argv = ["--widths", "8", "12", "--seeds", "2", "--train-steps", "32", "--samples", "30"]
    small.main([*argv, "--output", str(picture)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    widths = [row for row in rows if row[:1] in (["8"], ["12"])]
    assert [len(row) for row in widths] == [12, 12]
    assert float(widths[0][2]) < float(widths[1][2])  # GFLOP per step
    assert all(0 < float(row[k]) < 20 for row in widths for k in (3, 6, 9))
    laws = [row for row in rows if row[:1] in (["held-out"], ["energy"]) and "[" in " ".join(row)]
    assert len(laws) == 3
    assert all(re.search(r"determined", " ".join(row)) for row in laws)
    check_picture(picture)


@pytest.mark.slow
def test_one_seed_has_no_intervals(small, picture, capsys):
    argv = ["--widths", "8", "--seeds", "1", "--train-steps", "32", "--samples", "10"]
    small.main([*argv, "--output", str(picture)])
    output = capsys.readouterr().out
    assert output.count("one seed: no intervals") == 3
    assert "±" not in output


def test_flops_are_those_of_the_matrix_products(example):
    images = example.patches()
    network = example.build(images, 16).network
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    products = {m: m.in_features * m.out_features for m in layers}
    first = next(m for m in network.embedding.modules() if isinstance(m, nn.Linear))
    # Forward, weight gradients, and input gradients except for the network's own inputs.
    passes = {m: 2 if m in (network.input, first) else 3 for m in products}
    by_hand = sum(2 * example.BATCH * products[m] * passes[m] for m in products)
    assert example.flops_per_step(images, 16) == by_hand


def test_evaluations_are_spread_over_training(small):
    found = list(small.train(small.patches(), 8, 64, seed=0))
    assert [step for step, _ in found] == [2, 11, 64]
    sums = [next(model.parameters()).sum().item() for _, model in found]
    assert len(set(sums)) == 3


def test_loss_of_a_model_that_predicts_zero_noise(small):
    images = small.patches()
    model = small.build(images, 8)
    with torch.no_grad():
        model.network.output.weight.zero_()
        model.network.output.bias.zero_()
    found = small.measure(images, model, 5.0, 10, 0)
    assert found.compute == 5.0
    assert found.loss == pytest.approx(1.0, abs=0.03)  # the second moment of the noise


@pytest.mark.parametrize("floor", [0.0, 0.4])
@pytest.mark.parametrize("exponent", [0.05, 0.3, 1.2])
def test_fit_recovers_a_power_law(example, floor, exponent):
    compute = np.geomspace(1e9, 1e12, 40)
    law = example.fit(compute, floor + (3e9 / compute) ** exponent)
    step = example.EXPONENTS[1] / example.EXPONENTS[0]
    assert law.exponent == pytest.approx(exponent, rel=step - 1)
    assert law.floor == pytest.approx(floor, abs=0.02)
    assert law.scale == pytest.approx(3e9, rel=0.3)
    np.testing.assert_allclose(law(compute), floor + (3e9 / compute) ** exponent, rtol=1e-2)


def test_fitted_floor_is_nonnegative(example):
    compute = np.geomspace(1e9, 1e12, 40)
    law = example.fit(compute, 5 - np.log10(compute / 1e9))  # unbounded from below
    assert law.floor == 0.0


def test_frontier_is_the_lower_envelope(example):
    # Two lines in log-log coordinates, crossing at 1e3; the first ends at 1e4.
    root, other = np.array([10.0, 1e4]), np.array([1e2, 1e6])
    values = np.stack([root**-0.5, 1e3**0.5 / other])
    x, y = example.frontier(np.stack([root, other]), values)
    assert (x[0], x[-1]) == (pytest.approx(1e1), pytest.approx(1e6))
    np.testing.assert_allclose(y, np.where(x < 1e3, x**-0.5, 1e3**0.5 / x), rtol=1e-8)


def test_frontier_does_not_increase(example):
    _, y = example.frontier(np.array([[1.0, 10.0, 100.0]]), np.array([[3.0, 1.0, 2.0]]))
    assert (np.diff(y) <= 0).all()
    assert y[-1] == pytest.approx(1.0, rel=0.05)


def test_bootstrap_error_equals_the_standard_error_over_seeds(example):
    compute = np.geomspace(1e9, 1e12, 6)[None]
    seeds = np.array([0.9, 1.0, 1.1])
    values = seeds[None, :, None] * compute[:, None] ** -0.5
    laws = example.refits(compute, values, np.random.default_rng(0))
    assert len(laws) == example.RESAMPLES
    factors = np.array([law.scale**law.exponent for law in laws])
    sizes = factors * 1e10 ** -np.array([law.exponent for law in laws]) * 1e10**0.5
    assert sizes.std() == pytest.approx(seeds.std(ddof=1) / 3**0.5, rel=0.1)
    assert sizes.mean() == pytest.approx(1.0, abs=0.01)


def test_bootstrap_varies_the_starting_point(example):
    # Two successive power laws: the result depends on the starting point.
    compute = np.geomspace(1e9, 1e12, 30)[None]
    curve = np.where(compute < 1e10, (compute / 1e10) ** -0.1, (compute / 1e10) ** -0.6)
    laws = example.refits(compute, np.stack([curve, curve], 1), np.random.default_rng(0))
    low, high = example.interval([law.exponent for law in laws])
    assert high - low > 0.05


def test_verdict_on_an_interval(example):
    assert example.verdict((0.2, 0.3)) == "determined within a factor of two"
    assert "factor of 3.0" in example.verdict((0.1, 0.3))
    assert "unbounded" in example.verdict((0.2, 4.0))
    assert example.interval(list(range(1001))) == (25.0, 975.0)


def test_fit_of_a_constant_is_its_floor(example):
    law = example.fit(np.geomspace(1e9, 1e12, 20), np.full(20, 3.0))
    np.testing.assert_allclose(law(np.array([1e9, 1e15])), 3.0, rtol=1e-6)


def test_too_few_steps_for_the_evaluations_are_an_error(example, capsys):
    with pytest.raises(SystemExit):
        example.options(["--train-steps", "31"])
    assert "--train-steps: expected at least 32, got 31" in capsys.readouterr().err


@pytest.mark.slow
def test_narrow_networks_train_for_more_steps(small, monkeypatch):
    monkeypatch.setattr(small, "measure", lambda *args: small.Measurement(args[2], 0, 0, 0))
    options = small.options(["--widths", "8", "32", "--seeds", "1", "--train-steps", "40"])
    found = small.study(small.patches(), options)
    narrow, wide = found[8], found[32]
    longer = (wide.flops / narrow.flops) ** 0.5
    assert longer > 2
    assert wide.seeds[0][-1].compute == wide.flops * 40
    assert narrow.seeds[0][-1].compute == pytest.approx(narrow.flops * 40 * longer, rel=0.01)
