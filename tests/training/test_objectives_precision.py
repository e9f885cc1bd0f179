"""Loss and gradient in float32 against float64, for sigma / alpha from 1e-3 to 1e3."""

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EDMModel,
    EDMWeighting,
    EpsModel,
    LikelihoodWeighting,
    RawScoreModel,
    ScoreMatching,
    SigmaLabel,
    SubVPSDE,
    VModel,
    X0Model,
)

B, D, VARIANCE = 32, 8, 1 / 3  # of the data, uniform on [-1, 1]
MODELS = [EpsModel, X0Model, VModel, RawScoreModel, EDMModel]
CASES = [
    *[("edm", s) for s in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3)],
    *[("ve", s) for s in (1e-3, 1.0, 1e3)],
    *[("vp", s) for s in (2e-3, 1.0, 100.0)],
    *[("subvp", s) for s in (1e-3, 1.0, 100.0)],
]
SDES = {
    "edm": EDMSDE(sigma_min=1e-4, sigma_max=2e3),
    "ve": VESDE(sigma_min=1e-4, sigma_max=2e3),
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
}


class Network(nn.Module):
    """A smooth network that scales its input, and its output if the model does not."""

    def __init__(self, kind: type, *, trained: bool = False) -> None:
        super().__init__()
        self.kind, self.trained = kind, trained
        self.first, self.time, self.last = nn.Linear(D, 16), nn.Linear(2, 16), nn.Linear(16, D)

    def forward(self, x, label):
        if self.kind is EDMModel:
            log, h = label.view(-1, 1), x
        else:
            sigma = label.view(-1, 1)
            log, h = sigma.log() / 4, x / (1 + sigma**2).sqrt()
        time = self.time(torch.cat([log + 0.3, torch.sin(3 * log + 0.2)], 1))
        out = self.last(torch.tanh(self.first(h) + time))
        if self.trained:  # the best linear denoiser, plus a small nonlinear term
            total = sigma**2 + VARIANCE
            slope = VARIANCE / total if self.kind is X0Model else sigma / total
            size = sigma if self.kind is X0Model else 1.0
            out = slope * x + 0.3 * size * (VARIANCE / total).sqrt() * out
        return -out / sigma if self.kind is RawScoreModel else out


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = seeded(3)
    return 2 * torch.rand(B, D, generator=g) - 1, torch.randn(B, D, generator=g)


def network(kind: type, *, trained: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(kind, trained=trained)


def errors(monkeypatch, kind, sde, sigma, weighting=None, *, trained=False) -> tuple[float, float]:
    """The largest relative errors of a sample's loss and of a parameter's gradient."""
    x0, eps = data()
    monkeypatch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: eps.to(x.dtype))
    t = sde.time_at_log_snr(torch.full((B,), sigma, dtype=torch.float64).log() * -2)
    found = []
    for dtype in (torch.float32, torch.float64):
        net = network(kind, trained=trained).to(dtype)
        model = kind(net, sde, label=None if kind is EDMModel else SigmaLabel())
        loss = ScoreMatching(weighting)(model, x0.to(dtype), t=t)
        loss.mean().backward()
        found.append((loss.detach().double(), [p.grad.double() for p in net.parameters()]))
    (loss, gradient), (true_loss, true_gradient) = found
    pairs = zip(gradient, true_gradient, strict=True)
    return (
        float(((loss - true_loss) / true_loss).abs().max()),
        max(float((g - true).norm() / true.norm()) for g, true in pairs),
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "sigma"), CASES)
def test_loss_and_gradient_are_precise_at_every_noise_level(monkeypatch, kind, name, sigma) -> None:
    """Within a few float32 roundings."""
    assert max(errors(monkeypatch, kind, SDES[name], sigma)) < 2e-6


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("weighting", [LikelihoodWeighting(), EDMWeighting()])
@pytest.mark.parametrize("sigma", [1e-3, 1e3])
def test_weighted_losses_are_as_precise(monkeypatch, kind, weighting, sigma) -> None:
    assert max(errors(monkeypatch, kind, SDES["edm"], sigma, weighting)) < 2e-6


@pytest.mark.parametrize(
    ("kind", "sigma"),
    [
        *[(EpsModel, s) for s in (1e-3, 1.0, 300.0)],
        *[(RawScoreModel, s) for s in (1e-3, 1.0, 300.0)],
        *[(X0Model, s) for s in (3e-3, 1.0, 1e3)],
    ],
)
def test_losses_of_a_trained_network_are_precise(monkeypatch, kind, sigma) -> None:
    assert max(errors(monkeypatch, kind, SDES["edm"], sigma, trained=True)) < 1e-4


@pytest.mark.parametrize(
    ("kind", "sigma"), [(EpsModel, 1e3), (RawScoreModel, 1e3), (X0Model, 1e-3)]
)
def test_only_rounding_in_the_network_is_left(monkeypatch, kind, sigma) -> None:
    """Near the data x0_hat - x0, and near the prior eps_hat - eps, is a thousandth of either.

    There the roundings of a trained float32 network's input and output dominate the error of the
    loss: it is that of rounding both once in exact arithmetic, up to roundings in the network.
    """
    x0, eps = (part.double() for part in data())
    net = network(kind, trained=True).double()
    x, label = x0 + sigma * eps, torch.full((B,), sigma, dtype=torch.float64)
    wanted = {X0Model: x0, EpsModel: eps, RawScoreModel: -eps / sigma}[kind]
    with torch.no_grad():
        true = (net(x, label) - wanted).square().mean(1)
        rounded = (net(x.float().double(), label).float() - wanted).square().mean(1)
    inherent = float(((rounded - true) / true).abs().max())
    assert 1e-5 < inherent < 3e-4
    assert errors(monkeypatch, kind, SDES["edm"], sigma, trained=True)[0] < 10 * inherent
