"""The variance of an objective's gradient."""

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    EDMSDE,
    VPSDE,
    DenoisingTarget,
    EpsModel,
    GaussianMixtureModel,
    ScoreMatching,
)
from diffusionkit.diagnostics import gradient_variance
from diffusionkit.training.stable_target import StableTarget

POINTS = torch.tensor([[-1.0], [1.0]])


class Slope(nn.Module):
    """The network theta x at theta = 0, with an unused and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))
        self.unused = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x, label):
        return self.theta * x * self.frozen


class Level(nn.Module):
    """The network theta at theta = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def forward(self, x, label):
        return self.theta.expand_as(x)


@pytest.mark.parametrize("batch", [1, 8])
def test_the_variance_in_closed_form(batch) -> None:
    """The gradient of (theta x - eps)^2 at 0 is -2 x eps: variance 4 (alpha^2 + 2 sigma^2)."""
    model, t = EpsModel(Slope(), VPSDE()), torch.tensor([0.1, 0.4, 1.0])
    found = gradient_variance(
        model, ScoreMatching(), POINTS, t, batch_size=batch, pairs=300, generator=seeded()
    )
    alpha, sigma = VPSDE().marginal(t.double())
    exact = 4 * (alpha.square() + 2 * sigma.square()) / batch
    assert (found.stderr < 0.25 * exact).all()
    assert ((found.value - exact).abs() < 4 * found.stderr).all()
    torch.testing.assert_close(found.noise, sigma / alpha)
    assert found.quantity == "variance (gradient)"


def test_standard_errors_match_the_spread_of_estimates() -> None:
    model, t = EpsModel(Slope(), EDMSDE()), torch.tensor([1.0]).expand(60)
    found = gradient_variance(
        model, ScoreMatching(), POINTS, t, batch_size=8, pairs=25, generator=seeded()
    )
    spread = float(found.value.std())
    assert float(found.stderr.square().mean().sqrt()) == pytest.approx(spread, rel=0.3)
    assert float(found.value.mean()) == pytest.approx(12 / 8, abs=4 * spread / 60**0.5)


def test_each_batch_is_inside_a_new_reference() -> None:
    seen = []

    def objective(model, x0, *, reference, t, generator):
        seen.append((x0, reference, t))
        return model.predict(x0, t).eps.flatten() * 0 + model.network.theta * x0.flatten()

    data = torch.arange(100.0)[:, None]
    model = EpsModel(Slope(), EDMSDE())
    gradient_variance(
        model, objective, data, torch.tensor([0.5, 3.0]), batch_size=4, reference_size=10, pairs=2
    )
    assert [float(t[0]) for _, _, t in seen] == [0.5] * 4 + [3.0] * 4
    for x0, reference, t in seen:
        assert x0.shape == (4, 1)
        assert reference.shape == (10, 1)
        assert t.shape == (4,)
        assert t.dtype == torch.float32
        assert torch.equal(reference[:4], x0)
    assert len({tuple(reference.flatten().tolist()) for _, reference, _ in seen}) == 8


@pytest.mark.parametrize(("n", "stable"), [(1, 0.4495995092066729), (4, 0.09788584048027271)])
def test_the_variance_with_a_stable_target(n, stable) -> None:
    """For eps_hat = theta the gradient at 0 is -2 eps: variance 4 (1 - V_DSM + V_STF).

    V_DSM and V_STF are those of the points -1 and 1 at sigma = 1, by quadrature.
    """
    found = gradient_variance(
        EpsModel(Level(), EDMSDE()), ScoreMatching(target=StableTarget()), POINTS,
        torch.tensor([1.0]), batch_size=1, reference_size=n, pairs=500, generator=seeded(),
    )  # fmt: skip
    exact = 4 * (1 - 0.4495995092066729 + stable)
    assert float(found.stderr) < 0.1 * exact
    assert float(found.value) == pytest.approx(exact, abs=4 * float(found.stderr))


def test_objectives_with_the_same_seed_get_the_same_data_and_noise() -> None:
    first, second = (
        gradient_variance(
            EpsModel(Level(), EDMSDE()), ScoreMatching(target=target), POINTS[:1],
            torch.tensor([1.0]), batch_size=4, reference_size=8, pairs=2, generator=seeded(),
        )
        for target in (DenoisingTarget(), StableTarget())  # the same for a single point
    )  # fmt: skip
    torch.testing.assert_close(first.value, second.value, rtol=1e-6, atol=0)


def test_mode_and_gradients_of_the_model_do_not_change() -> None:
    model = EpsModel(Slope(), EDMSDE()).eval()
    model.network.theta.grad = torch.tensor(5.0)
    with torch.no_grad():
        gradient_variance(
            model, ScoreMatching(), POINTS, torch.tensor([1.0]), batch_size=2, pairs=2
        )
    assert not model.training
    assert float(model.network.theta.grad) == 5.0
    assert model.network.unused.grad is None


def test_progress_and_label() -> None:
    steps = []
    found = gradient_variance(
        EpsModel(Slope(), EDMSDE()), ScoreMatching(), POINTS, torch.tensor([1.0, 2.0]),
        pairs=3, label="mine", progress=lambda items: steps.extend(items) or items,
    )  # fmt: skip
    assert len(steps) == 6
    assert found.label == "mine"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": Slope()}, TypeError, "model: expected a ScoreModel"),
        (
            {"model": GaussianMixtureModel(EDMSDE(), means=POINTS, stds=[1.0, 1.0])},
            ValueError,
            "model: expected parameters that require a gradient",
        ),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1"),
        ({"reference_size": 3}, ValueError, "reference_size: expected an integer >= 4"),
        ({"pairs": 1}, ValueError, "pairs: expected an integer >= 2"),
        ({"t": torch.zeros(1)}, ValueError, "sigma > 0 at each"),
        ({"data": torch.zeros(0, 1)}, ValueError, "data: expected a non-empty batch"),
        ({"generator": 3}, TypeError, "generator: expected a Generator"),
    ],
)
def test_invalid_arguments(change, error, message) -> None:
    usual = {"model": EpsModel(Slope(), EDMSDE()), "objective": ScoreMatching(), "data": POINTS,
             "t": torch.tensor([1.0]), "batch_size": 4}  # fmt: skip
    with pytest.raises(error, match=message):
        gradient_variance(**{**usual, **change})
