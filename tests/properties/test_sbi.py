"""sbi's processes, whose values are kept here, and its score estimators as score models."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusionkit import VESDE, VPSDE, ForwardSDE, Heun, PCSampler, RawScoreModel, SubVPSDE

TIMES = torch.tensor([0.2, 0.5, 0.9])
# By sbi's class, our process and sbi's mean_t_fn, std_fn and diffusion_fn at TIMES, with its
# default settings, recorded from sbi 0.27.
KEPT: dict[str, tuple[ForwardSDE, list[list[float]]]] = {
    "VPScoreEstimator": (
        VPSDE(0.01, 10.0),
        [
            [0.9040234, 0.5342588, 0.1316676],
            [0.4274829, 0.845321, 0.9912939],
            [1.417039, 2.237186, 3.000167],
        ],
    ),
    "SubVPScoreEstimator": (
        SubVPSDE(0.01, 10.0),
        [
            [0.9040234, 0.5342588, 0.1316676],
            [0.1827416, 0.7145675, 0.9826636],
            [0.8165992, 2.144116, 2.999716],
        ],
    ),
    "VEScoreEstimator": (
        VESDE(1e-4, 10.0),
        [[1.0, 1.0, 1.0], [0.0009999999, 0.03162277, 3.162277], [0.004798525, 0.1517427, 15.17427]],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_values_of_its_processes(name: str) -> None:
    sde, kept = KEPT[name]
    values = (*sde.marginal(TIMES), sde.diffusion(TIMES))
    torch.testing.assert_close(torch.stack(values), torch.tensor(kept), rtol=1e-4, atol=0)


class EstimatorNetwork(nn.Module):
    """The score of an estimator of sbi: the adapter of the page."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(self, theta: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return self.estimator.score(theta, x, t)


def estimator(name: str) -> Any:
    from sbi.neural_nets.estimators import score_estimator

    class Net(nn.Module):
        def forward(self, theta: Tensor, condition: Tensor, time: Tensor) -> Tensor:
            return 0.3 * theta - 0.1 * condition * time[:, None]

    kind = getattr(score_estimator, name)
    return kind(Net(), input_shape=torch.Size([2]), condition_shape=torch.Size([2]))


@pytest.mark.skipif(find_spec("sbi") is None, reason="needs sbi")
@pytest.mark.parametrize("name", KEPT)
def test_its_processes_and_scores(name: str) -> None:
    sde, _ = KEPT[name]
    theirs = estimator(name)
    t = torch.linspace(theirs.t_min, 1.0, 50)
    alpha, sigma = sde.marginal(t)
    one = torch.ones(50, 2)
    torch.testing.assert_close(alpha, theirs.mean_t_fn(t)[:, 0], rtol=1e-4, atol=1e-6)
    # sbi's float32 loses digits of the variance near t = 0.
    torch.testing.assert_close(sigma, theirs.std_fn(t)[:, 0], rtol=2e-3, atol=1e-6)
    drift = theirs.drift_fn(one, t).expand(50, 2) if name[1] == "E" else theirs.drift_fn(one, t)
    torch.testing.assert_close(sde.drift(one, t), drift, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        sde.diffusion(t), theirs.diffusion_fn(one, t)[:, 0], rtol=2e-3, atol=1e-6
    )

    model = RawScoreModel(EstimatorNetwork(theirs), sde, label=lambda sde, t: t)
    theta, x = torch.randn(50, 2), torch.randn(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(theta, t, x=x), theirs.score(theta, x, t))
        velocity = theirs.ode_fn(theta, x.expand(50, 2), t)  # of its probability flow
        ours = sde.drift(theta, t) - 0.5 * sde.diffusion(t)[:, None] ** 2 * model(theta, t, x=x)
    torch.testing.assert_close(ours, velocity, rtol=5e-3, atol=1e-4)
    assert PCSampler(model, Heun(), steps=3)((5, 2), x=x).shape == (5, 2)
