"""One standard deviation for each channel: the model of channels standardized separately."""

import math

import numpy as np
import pytest
import torch
from support.pretend_device import PretendDevice

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EDMWeighting,
    FlowMatchingSDE,
    NoiseClassifier,
    PCSampler,
    ScoreMatching,
    SubVPSDE,
    UniPC,
)
from diffusionkit.checkpoints import load_model, save_model
from diffusionkit.networks import MLP

SDES = {
    "VE": VESDE(sigma_max=20.0),
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "EDM": EDMSDE(),
    "flow matching": FlowMatchingSDE(),
    "alpha = 0": DDPMChain.cosine(10).zero_terminal_snr(),
}
OWN = (0.02, 0.5, 30.0)


def network(x, noise_label, **cond):
    """Each channel on its own, the same function for all."""
    label = noise_label.clamp_max(5.0)  # infinite at alpha = 0
    return torch.tanh(x) - 0.3 * label.view(-1, *(1,) * (x.ndim - 1)).cos()


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def channels(part, **options):
    """A model or another part for each channel."""
    return [part(sd, **options) for sd in OWN]


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)], ids=str)
def test_predictions_are_those_of_a_model_of_each_channel(sde, shape):
    x = drawn(*shape)
    t = torch.linspace(sde.t_min, sde.T, 6, dtype=torch.float64)
    got = EDMModel(network, sde, OWN).predict(x, t)
    for c, sd in enumerate(OWN):
        part = x[:, c : c + 1]
        right = EDMModel(network, sde, sd).predict(part, t)
        for name in ("x0", "eps", "v"):
            values, expected = getattr(got, name)[:, c : c + 1], getattr(right, name)
            scale = max(1.0, sd)
            torch.testing.assert_close(values / scale, expected / scale, rtol=1e-9, atol=1e-9)


def test_predictions_are_the_closed_form():
    """D = sd^2 / S^2 x + s sd / S F(x / S), EDM's, in each channel."""
    x, s = drawn(1, 3), 0.7
    got = EDMModel(network, EDMSDE(), OWN).predict(x, torch.tensor([s], dtype=torch.float64)).x0
    for c, sd in enumerate(OWN):
        S = math.hypot(s, sd)
        inner = math.tanh(float(x[0, c]) / S) - 0.3 * math.cos(math.log(s) / 4)
        right = sd**2 / S**2 * float(x[0, c]) + s * sd / S * inner
        assert float(got[0, c]) == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_losses_are_the_mean_of_those_of_the_channels(sde):
    """Unit weight of each channel's raw output, also at alpha = 0."""
    x0 = drawn(6, 3, 4) * torch.tensor(OWN, dtype=torch.float64).view(3, 1)
    t = torch.linspace(sde.t_min, sde.T, 6, dtype=torch.float64)
    eps = drawn(6, 3, 4).flip(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: eps)
        got = ScoreMatching(EDMWeighting(OWN))(EDMModel(network, sde, OWN), x0, t=t)
        parts = []
        for c, sd in enumerate(OWN):
            noise = eps[:, c : c + 1]
            patch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator, n=noise: n)
            objective = ScoreMatching(EDMWeighting(sd))
            parts.append(objective(EDMModel(network, sde, sd), x0[:, c : c + 1], t=t))
    torch.testing.assert_close(got, sum(parts) / 3, rtol=1e-6, atol=1e-9)


def test_masks_and_channels_together():
    x0, mask = drawn(4, 3, 5), torch.ones(4, 3, 5)
    mask[:, 1:] = 0
    t = torch.full((4,), 0.3, dtype=torch.float64)
    objective, one = ScoreMatching(EDMWeighting(OWN)), ScoreMatching(EDMWeighting(OWN[0]))
    draw = [[torch.Generator().manual_seed(i) for i in range(4)] for _ in range(2)]
    model = EDMModel(network, VPSDE(), OWN)
    got = objective(model, x0, mask=mask, t=t, generator=draw[0])
    noise = torch.stack([torch.randn(3, 5, generator=g, dtype=torch.float64) for g in draw[1]])
    with pytest.MonkeyPatch.context() as patch:
        first = noise[:, :1]
        patch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: first)
        right = one(EDMModel(network, VPSDE(), OWN[0]), x0[:, :1], t=t)
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("predictor", [DDIM(), UniPC()], ids=lambda p: type(p).__name__)
def test_samples_are_those_of_the_channels(predictor):
    """At times of a grid, where schedules are floats."""
    sde = VPSDE()
    x = drawn(2, 3, 4).float()
    got = PCSampler(EDMModel(network, sde, OWN), predictor, steps=5)(x)
    for c, sd in enumerate(OWN):
        right = PCSampler(EDMModel(network, sde, sd), predictor, steps=5)(x[:, c : c + 1])
        torch.testing.assert_close(got[:, c : c + 1], right, rtol=2e-5, atol=2e-5)


def test_equal_channels_are_one_number():
    x, t = drawn(4, 3, 2), torch.rand(4, dtype=torch.float64) * 0.9 + 0.05
    models = [EDMModel(network, VPSDE(), sd) for sd in (0.5, (0.5, 0.5, 0.5))]
    torch.testing.assert_close(*(model.predict(x, t).x0 for model in models))
    weights = EDMWeighting((0.5, 0.5, 0.5))
    assert torch.equal(weights(VPSDE(), t), EDMWeighting(0.5)(VPSDE(), t))
    torch.testing.assert_close(weights.per_channel(VPSDE(), t), torch.ones(4, 3).double())
    assert EDMWeighting(0.5).per_channel(VPSDE(), t) is None


def test_a_learned_variance_is_not_scaled():
    def double(x, noise_label):
        return torch.cat([network(x, noise_label), 0.3 * torch.ones_like(x)], 1)

    model = EDMModel(double, VPSDE(), OWN, variance="learned_range")
    plain = EDMModel(network, VPSDE(), OWN)
    x, t = drawn(2, 3, 4), torch.tensor([0.1, 0.8], dtype=torch.float64)
    torch.testing.assert_close(model.predict(x, t).x0, plain.predict(x, t).x0)
    fraction = model.predict(x, t).log_var_fraction
    torch.testing.assert_close(fraction, torch.full_like(x, 0.65))


@pytest.mark.parametrize(
    "given",
    [
        list(OWN),
        torch.tensor(OWN, dtype=torch.float64),
        torch.tensor(OWN, dtype=torch.float64).view(3, 1, 1),
        np.array(OWN),
    ],
    ids=["list", "tensor", "column", "array"],
)
def test_they_are_kept_as_a_tuple_and_shown(given):
    model = EDMModel(MLP(3, width=4, depth=1), VPSDE(), given)
    assert model.sigma_data == OWN
    assert "sigma_data=(0.02, 0.5, 30.0)" in repr(model)
    assert EDMWeighting(given) == EDMWeighting(OWN)
    assert hash(EDMWeighting(given)) == hash(EDMWeighting(OWN))


def test_models_are_saved_with_them(tmp_path):
    model = EDMModel(MLP(3, width=4, depth=1), VPSDE(), OWN)
    save_model(tmp_path / "model.safetensors", model)
    found = load_model(tmp_path / "model.safetensors")
    assert found.sigma_data == OWN
    x, t = drawn(2, 3).float(), torch.tensor([0.2, 0.9])
    assert torch.equal(found.predict(x, t).x0, model.predict(x, t).x0)


def test_the_classifiers_input_has_unit_variance_in_each_channel():
    seen = []

    def logits(x, noise_label):
        seen.append(x)
        return x.flatten(1)[:, :2]

    x, t = drawn(5, 3, 4), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    NoiseClassifier(logits, VPSDE(), OWN)(x, t)
    alpha, sigma = VPSDE().marginal(t)
    for c, sd in enumerate(OWN):
        std = ((alpha * sd) ** 2 + sigma**2).sqrt().view(5, 1)
        torch.testing.assert_close(seen[0][:, c], x[:, c] / std)


@pytest.mark.parametrize("part", [EDMWeighting, lambda sd: EDMModel(network, VPSDE(), sd)])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ((), ValueError, "sigma_data: expected at least one number"),
        ((0.5, -1.0), ValueError, "sigma_data: expected a finite number > 0, got -1"),
        ((0.5, "x"), TypeError, "sigma_data: expected a number"),
        (torch.ones(2, 3), ValueError, r"one for each channel, .* of shape \(2, 3\)"),
        (torch.tensor(0.5), ValueError, r"of shape \(\)"),
        (torch.full((2,), math.nan), ValueError, "expected a finite number > 0, got nan"),
    ],
)
def test_other_deviations_are_refused(part, bad, error, message):
    with pytest.raises(error, match=message):
        part(bad)


def test_another_number_of_channels_is_refused():
    model, t = EDMModel(network, VPSDE(), OWN), torch.tensor([0.5])
    for shape in ((1,), (1, 2), (1, 4, 3)):
        with pytest.raises(ValueError, match="x: expected 3 channels, as sigma_data has"):
            model.predict(torch.zeros(shape), t)
    with pytest.raises(ValueError, match=r"weighting: expected weights of \(1, 2\) channels"):
        ScoreMatching(EDMWeighting(OWN))(EDMModel(network, VPSDE()), torch.zeros(1, 2), t=t)


def on(device):
    """A loss and logits with one standard deviation for each channel, on a device."""
    x, t = drawn(4, 3).float().to(device), torch.linspace(0.1, 0.9, 4).to(device)
    model, objective = EDMModel(network, VPSDE(), OWN), ScoreMatching(EDMWeighting(OWN))
    mask = torch.tensor([[1.0, 2.0, 0.5]]).to(device)
    loss = objective(model, x, mask=mask, t=t, generator=torch.Generator())
    return loss, NoiseClassifier(lambda x, noise_label: x, VPSDE(), OWN)(x, t)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_devices_have_the_same_numbers_and_neither_wait_nor_copy(kind):
    right = on("cpu")
    with PretendDevice(kind) as device:
        model, objective = EDMModel(network, VPSDE(), OWN), ScoreMatching(EDMWeighting(OWN))
        for got, expected in zip(on(kind), right, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
        x = torch.rand(4, 3, device=kind)
        for _ in range(2):
            with device.watched() as events:
                objective(model, x)
    assert not events
