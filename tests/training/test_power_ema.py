"""Power-function averages, their snapshots, and reconstructions of other lengths."""

import logging
import math

import pytest
import torch
from torch import nn

from diffusionkit import VPSDE, CheckpointError, EpsModel, load_checkpoint, save_checkpoint
from diffusionkit.training.power_ema import (
    PowerEMA,
    power_coefficients,
    power_exponent,
    reconstruct_ema,
)


class Weights(nn.Module):
    """A parameter under two names, and a buffer."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.tied = self.w
        self.register_buffer("count", torch.tensor(0))

    def set(self, *values: float) -> None:
        with torch.no_grad():
            self.w.copy_(torch.tensor(values, dtype=torch.float64))
        self.count += 1


# The largest root of the cubic, computed independently.
@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [
        (0.05, 16.97219860230345),
        (0.10, 6.937203937601807),
        (0.13, 4.6035967814798555),
        (0.15, 3.5578687748994664),
    ],
)
def test_exponents_match_an_independent_solver(sigma_rel, gamma) -> None:
    assert power_exponent(sigma_rel) == pytest.approx(gamma, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.02, 0.2, 0.28, 0.2886])
def test_profiles_have_the_given_standard_deviation(sigma_rel) -> None:
    """The n-th moment of t^gamma on [0, 1] is (gamma + 1) / (gamma + 1 + n)."""
    g = power_exponent(sigma_rel)
    assert g > 0
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-7)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, math.nan])
def test_lengths_out_of_range_raise(sigma_rel) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel: expected a number in \(0, 0\.2887\), got"):
        PowerEMA(Weights(), sigma_rels=(0.05, sigma_rel))


def test_updates_match_hand_computed_values() -> None:
    """beta = (1 - 1/t)^(gamma + 1); at t = 1000 and .10 it is .9920902726450789."""
    model = Weights()
    model.set(100.0, 100.0)
    ema = PowerEMA(model, sigma_rels=(0.10,))
    kept = 0.0
    for t in range(1, 1001):
        model.set(1.0 if t == 1000 else 0.0, float(t))
        kept = float(ema.averages[0.10].model.w[1])
        ema.update(model)
        if t == 1:  # the initial weights have no share
            assert ema.averages[0.10].model.w.tolist() == [0.0, 1.0]
    beta = 0.9920902726450789
    found = ema.averages[0.10].model.w.tolist()
    assert found == pytest.approx([1 - beta, beta * kept + (1 - beta) * 1000], rel=1e-12)
    # A weight equal to t averages to (gamma + 1) / (gamma + 2) of its last value.
    assert found[1] == pytest.approx(1000 * 7.937203937601807 / 8.937203937601807, rel=1e-3)
    assert int(ema.averages[0.10].model.count) == int(model.count)
    assert ema.updates == 1000


BASIS = [(t, sigma_rel) for t in range(1, 9) for sigma_rel in (0.05, 0.10)]


def test_coefficients_match_an_independent_solver() -> None:
    found, error = power_coefficients(BASIS, (8, 0.15))
    expected = [
        -2.3106212516330822e-05, 7.992397244271987e-05, -0.0005405309602212721,
        0.0015630650408306494, -0.003205000344061355, 0.008239137666580047,
        -0.010372944523473001, 0.025228717565190774, -0.024574257213277516,
        0.058198829911898134, -0.04865177874856597, 0.1135910588765062,
        -0.08580813901246707,
    ]  # fmt: skip
    assert found[:13].tolist() == pytest.approx(expected, rel=1e-8)
    assert float(found.sum()) == pytest.approx(1.0, rel=1e-12)
    assert error**2 == pytest.approx(0.0010841678647117265, rel=1e-6)


def test_a_saved_profile_is_fitted_exactly() -> None:
    found, error = power_coefficients(BASIS, (5, 0.10))
    expected = [1.0 if key == (5, 0.10) else 0.0 for key in BASIS]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert error < 1e-6


def test_coefficients_do_not_overflow_at_large_updates() -> None:
    """Powers of the updates would overflow, but only their ratios matter."""
    large = [(t * 10**8, sigma_rel) for t, sigma_rel in BASIS]
    small, _ = power_coefficients(BASIS, (8, 0.15))
    found, _ = power_coefficients(large, (8 * 10**8, 0.15))
    torch.testing.assert_close(found, small, rtol=1e-9, atol=1e-12)


def trained(folder, wanted=0.15, every=50, steps=400, **options):
    """Average a random walk directly, and save snapshots of two other lengths."""
    torch.manual_seed(0)
    model = Weights()
    ema, direct = PowerEMA(model), PowerEMA(model, (wanted,))
    walk = torch.randn(steps, 2, dtype=torch.float64).cumsum(0)
    for step, values in enumerate(walk.tolist(), 1):
        model.set(*values)
        ema.update(model)
        direct.update(model)
        if step % every == 0:
            paths = ema.save(folder, **options)
    assert [path.name for path in paths] == [f"{steps:09d}-0.05.pt", f"{steps:09d}-0.1.pt"]
    return model, direct.averages[wanted].model


@pytest.mark.parametrize("wanted", [0.06, 0.08, 0.12])
def test_a_reconstruction_matches_the_direct_average(tmp_path, wanted) -> None:
    model, direct = trained(tmp_path, wanted)
    weights = reconstruct_ema(tmp_path, wanted)
    # The walk has standard deviation 20; the fit and the discrete sum leave .4% of error.
    torch.testing.assert_close(weights["w"], direct.w.detach(), rtol=0, atol=0.08)
    assert weights["w"].dtype == torch.float64
    assert torch.equal(weights["tied"], weights["w"])
    assert int(weights["count"]) == 400
    model.load_state_dict(weights)


def test_a_reconstruction_at_an_earlier_update(tmp_path) -> None:
    _, direct = trained(tmp_path / "short", 0.08, steps=200)
    trained(tmp_path / "long", 0.08, steps=400)
    weights = reconstruct_ema(tmp_path / "long", 0.08, updates=200)
    torch.testing.assert_close(weights["w"], direct.w.detach(), rtol=0, atol=0.08)
    assert int(weights["count"]) == 200
    assert weights["w"].tolist() == reconstruct_ema(tmp_path / "short", 0.08)["w"].tolist()


def test_the_reconstruction_of_a_saved_length_is_its_snapshot(tmp_path) -> None:
    trained(tmp_path)
    saved = torch.load(tmp_path / "000000400-0.05.pt", weights_only=True)
    weights = reconstruct_ema([*tmp_path.glob("*.pt")], 0.05)
    torch.testing.assert_close(weights["w"], saved["model"]["w"], rtol=1e-9, atol=1e-9)


def test_snapshots_in_half_precision(tmp_path) -> None:
    _, direct = trained(tmp_path, 0.08, dtype=torch.float16)
    saved = torch.load(tmp_path / "000000400-0.05.pt", weights_only=True)
    assert saved["model"]["w"].dtype == torch.float16
    assert saved["model"]["count"].dtype == torch.int64
    weights = reconstruct_ema(tmp_path, 0.08)
    assert weights["w"].dtype == torch.float32
    torch.testing.assert_close(weights["w"].double(), direct.w.detach(), rtol=0, atol=0.1)
    keys = [(t, sigma_rel) for t in range(50, 401, 50) for sigma_rel in (0.05, 0.10)]
    parts = [tmp_path / f"{t:09d}-{sigma_rel:g}.pt" for t, sigma_rel in keys]
    parts = [torch.load(path, weights_only=True)["model"]["w"].double() for path in parts]
    total = power_coefficients(keys, (400, 0.08))[0] @ torch.stack(parts)
    torch.testing.assert_close(weights["w"].double(), total, rtol=1e-6, atol=0)


def test_applied_averages_of_a_score_model() -> None:
    model = EpsModel(nn.Linear(2, 2), VPSDE())
    ema = PowerEMA(model, (0.1, 0.05))
    before = model.network.weight.detach().clone()
    with torch.no_grad():
        model.network.weight.add_(1.0)
    ema.update(model)
    with torch.no_grad():
        model.network.weight.add_(1.0)
    with ema.averages[0.05].applied(model):
        torch.testing.assert_close(model.network.weight, before + 1)
    torch.testing.assert_close(model.network.weight, before + 2)


def test_it_resumes_from_a_checkpoint(tmp_path) -> None:
    model = Weights()
    ema = PowerEMA(model)
    for step in range(5):
        model.set(step, -step)
        ema.update(model)
    save_checkpoint(tmp_path / "run.pt", model, stateful={"power": ema})
    other = PowerEMA(Weights())
    load_checkpoint(tmp_path / "run.pt", Weights(), stateful={"power": other})
    for one in (ema, other):
        one.update(model)
    for sigma_rel in (0.05, 0.10):
        ours, theirs = (one.averages[sigma_rel].model.w for one in (ema, other))
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"state_dict: expected the .*unexpected 0_1\.model\.w"):
        PowerEMA(model, (0.05,)).load_state_dict(ema.state_dict())


def test_a_poor_fit_is_logged(tmp_path, caplog) -> None:
    trained(tmp_path, every=400)
    with caplog.at_level(logging.WARNING):
        reconstruct_ema(tmp_path, 0.08)
        assert not caplog.records
        reconstruct_ema(tmp_path, 0.25)
    assert "the fit to sigma_rel = 0.25 has an error of" in caplog.text


def test_too_few_snapshots_raise(tmp_path) -> None:
    trained(tmp_path, every=200)
    for files, updates, message in (
        ([], None, "at least two up to update 0, got 0 of 0"),
        (tmp_path, 100, "at least two up to update 100, got 0 of 4"),
        ([tmp_path / "000000400-0.05.pt"], None, "at least two up to update 400, got 1 of 1"),
    ):
        with pytest.raises(ValueError, match=f"snapshots: expected {message}"):
            reconstruct_ema(files, 0.08, updates=updates)
    with pytest.raises(ValueError, match=r"sigma_rel: expected a number in \(0, 0.2887\)"):
        reconstruct_ema(tmp_path, 0.3)


def test_snapshots_of_different_models_raise(tmp_path) -> None:
    trained(tmp_path)
    other = PowerEMA(Weights(size=3), (0.07,))
    other.update(Weights(size=3))
    other.save(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"000000050-0\.05\.pt: expected the tensors of .*-0\.07"
    ):
        reconstruct_ema(tmp_path, 0.08)


def test_files_that_are_not_snapshots_raise(tmp_path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError):
        reconstruct_ema([path], 0.08)
    good = {
        "format": "diffusionkit.power_ema", "version": 1, "updates": 3, "sigma_rel": 0.1,
        "averaged": ["w"], "model": {"w": torch.ones(2)},
    }  # fmt: skip
    for change, message in (
        ({"format": "other"}, "got a file of another format"),
        ({"version": 2}, "expected version 1, got 2"),
        ({"updates": "3"}, r"wrong entries: \['updates'\]"),
        ({"averaged": ["v"]}, "wrong entries"),
    ):
        torch.save(good | change, path)
        with pytest.raises(CheckpointError, match=message):
            reconstruct_ema([path], 0.08)
    path.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"expected a snapshot written by PowerEMA.save"):
        reconstruct_ema([path], 0.08)


def test_invalid_arguments(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"sigma_rels: expected distinct numbers, got \(0.1, 0.1"):
        PowerEMA(Weights(), (0.1, 0.1))
    with pytest.raises(ValueError, match="sigma_rels: expected distinct numbers"):
        PowerEMA(Weights(), ())
    with pytest.raises(TypeError, match="model: expected a Module, got int"):
        PowerEMA(3)
    with pytest.raises(ValueError, match="updates: expected an integer >= 1, got 0"):
        PowerEMA(Weights()).save(tmp_path)
    with pytest.raises(ValueError, match="model: expected the tensors of the averaged"):
        PowerEMA(Weights()).update(Weights(size=3))
    with pytest.raises(ValueError, match=r"snapshots: expected distinct ones"):
        power_coefficients([(1, 0.1), (1, 0.1)], (2, 0.1))
    with pytest.raises(ValueError, match="updates: expected an integer >= 1, got 0"):
        power_coefficients([(0, 0.1), (1, 0.1)], (2, 0.1))
