"""`check_score_model` reports what is inconsistent, and nothing else."""

from dataclasses import dataclass

import pytest
import torch
from support.user_processes import PROCESSES, Cosine, class_name
from torch import Tensor, nn

from diffusionkit import (
    EDMSDE,
    VPSDE,
    EDMModel,
    EmpiricalModel,
    EpsModel,
    GaussianMixtureModel,
    Prediction,
    RawScoreModel,
    ScoreModel,
    SubVPSDE,
    VModel,
    X0Model,
)
from diffusionkit.networks import MLP
from diffusionkit.testing import InconsistentError, check_score_model

VP = VPSDE()


@pytest.mark.parametrize("sde", PROCESSES, ids=class_name)
def test_exact_models_pass(sde) -> None:
    means = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    mixture = GaussianMixtureModel(sde, means, stds=[0.2, 0.3, 0.4], weights=[0.2, 0.3, 0.5])
    report = check_score_model(mixture, (4, 3), exact=True)
    assert str(report) == "GaussianMixtureModel: 7 checks, no problems"
    assert check_score_model(EmpiricalModel(sde, means), (4, 3), exact=True).ok


@pytest.mark.parametrize("kind", [EpsModel, X0Model, VModel, RawScoreModel, EDMModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sde", [VP, SubVPSDE(), EDMSDE(), Cosine()], ids=class_name)
def test_network_models_pass(kind, dtype, sde) -> None:
    """Untrained, with dropout that the check switches off."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"mlp": MLP(3, width=16, depth=1), "drop": nn.Dropout(0.5)}).to(dtype)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x, noise_label):
            return self.parts["drop"](self.parts["mlp"](x, noise_label))

    model = kind(Network(), sde)
    assert check_score_model(model, (4, 3)).ok
    assert all(module.training for module in model.modules())


def test_conditions_reach_the_model() -> None:
    torch.manual_seed(0)
    model = EpsModel(MLP(3, width=16, depth=1, num_classes=5), VP)
    class_labels = torch.tensor([0, 1, 2, 3])
    assert check_score_model(model, (4, 3), class_labels=class_labels).ok


@pytest.mark.parametrize("shape", [(1, 2), (4, 1), (3, 2, 2), (2, 1, 2, 2)])
def test_states_of_any_shape(shape) -> None:
    model = GaussianMixtureModel(VP, torch.zeros(1, *shape[1:]), [0.5])
    assert check_score_model(model, shape, exact=True).ok


@dataclass(eq=False)
class Wrapped(ScoreModel):
    """The exact model of N((1, 0, 0), I / 4), with a hook that breaks its noise."""

    def __post_init__(self) -> None:
        super().__init__()
        self.sde = VP
        self.exact = GaussianMixtureModel(VP, [[1.0, 0.0, 0.0]], [0.5])

    def predict(self, x, t, **cond):
        true = self.exact.predict(x, t)
        return Prediction.from_eps(x, self.broken(x, t, true), true.alpha, true.sigma)

    def broken(self, x: Tensor, t: Tensor, true: Prediction) -> Tensor:
        return true.eps


class WrongSign(Wrapped):
    def broken(self, x, t, true):
        return -true.eps


class DependsOnTheBatch(Wrapped):
    def broken(self, x, t, true):
        return true.eps - true.eps.mean(0)


class DependsOnTheFirstTime(Wrapped):
    def broken(self, x, t, true):
        return self.exact.predict(x, t[:1].expand(len(t))).eps


class Random(Wrapped):
    def broken(self, x, t, true):
        return true.eps + 0.1 * torch.randn_like(x)


class NoGradient(Wrapped):
    def broken(self, x, t, true):
        return true.eps.detach()

    def predict(self, x, t, **cond):
        return super().predict(x.detach(), t)


class Rotates(Wrapped):
    """A field with a curl is not a gradient."""

    def broken(self, x, t, true):
        return true.eps + 0.3 * x.roll(1, 1)


class NotFinite(Wrapped):
    def broken(self, x, t, true):
        return torch.where(x > 0, torch.nan, true.eps)


class FlatOutput(Wrapped):
    def predict(self, x, t, **cond):
        true = self.exact.predict(x, t)
        return Prediction(x, true.x0, true.eps[:, :1], true.alpha, true.sigma)


class DoubleOutput(Wrapped):
    def predict(self, x, t, **cond):
        return self.exact.predict(x.double(), t)


class AnotherX0(Wrapped):
    def predict(self, x, t, **cond):
        true = self.exact.predict(x, t)
        return Prediction(x, 1.1 * true.x0, true.eps, true.alpha, true.sigma)


class AnotherScore(Wrapped):
    def forward(self, x, t, **cond):
        return 2 * super().forward(x, t)


class ReturnsATensor(Wrapped):
    def predict(self, x, t, **cond):
        return self.exact.predict(x, t).eps


class Raises(Wrapped):
    def broken(self, x, t, true):
        raise RuntimeError("not today")


BROKEN_MODELS = [
    (WrongSign(), "direction: at T the score points away from the data"),
    (DependsOnTheBatch(), "samples apart: a sample's prediction depends on the other samples"),
    (DependsOnTheFirstTime(), "samples apart: a sample's prediction depends on the other samples"),
    (Random(), "repeatable: in evaluation mode two predictions of the same state differ"),
    (NoGradient(), "gradient: the prediction is not differentiable in x"),
    (Rotates(), "symmetric: the Jacobian of the score is not symmetric"),
    (NotFinite(), "prediction: x0: expected finite values, got "),
    (
        FlatOutput(),
        "prediction: raised ValueError: eps: expected the shape of x, (4, 3), got (4, 1)",
    ),
    (DoubleOutput(), "prediction: x0: expected shape (4, 3) and torch.float32, got (4, 3) and "),
    (AnotherX0(), "prediction: x0 and eps do not satisfy x = alpha x0 + sigma eps"),
    (AnotherScore(), "prediction: the score is not -eps / sigma"),
    (ReturnsATensor(), "prediction: raised TypeError: ReturnsATensor: expected a Prediction, got"),
    (Raises(), "prediction: raised RuntimeError: not today"),
]


def test_the_unbroken_model_passes() -> None:
    assert check_score_model(Wrapped(), (4, 3), exact=True).ok


@pytest.mark.parametrize(("model", "problem"), BROKEN_MODELS, ids=class_name)
def test_inconsistent_models_are_reported(model, problem) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_score_model(model, (4, 3), exact=True)
    report = caught.value.report
    assert any(problem in found for found in report.problems), str(report)
    assert str(caught.value).startswith(type(model).__name__)


@pytest.mark.parametrize(
    "model",
    [WrongSign(), Rotates(), AnotherX0(), AnotherScore(), NoGradient()],
    ids=class_name,
)
def test_no_other_problem_is_reported(model) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_score_model(model, (4, 3), exact=True)
    first, *others = {found.split(":")[0] for found in caught.value.report.problems}
    assert others in ([], ["symmetric"], ["gradient"])
    assert first


def test_only_exact_models_need_a_symmetric_jacobian() -> None:
    assert check_score_model(Rotates(), (4, 3)).ok


@pytest.mark.parametrize("seed", range(5))
def test_the_direction_of_an_untrained_network_is_accepted(seed) -> None:
    torch.manual_seed(seed)
    for kind in (EpsModel, RawScoreModel):
        assert check_score_model(kind(MLP(1, width=16, depth=1), VP), (2, 1)).ok


def test_a_network_of_the_wrong_output_shape_is_reported() -> None:
    with pytest.raises(InconsistentError, match=r"raised ValueError: network: expected an output"):
        check_score_model(EpsModel(lambda x, noise_label: x[:, :2], VP), (4, 3))


def test_a_model_without_a_process_raises() -> None:
    model = Wrapped()
    del model.sde
    with pytest.raises(TypeError, match=r"model\.sde: expected a ForwardSDE"):
        check_score_model(model, (4, 3))


def test_the_modes_are_restored_after_a_failure() -> None:
    model = EpsModel(nn.Sequential(nn.Dropout(), nn.Linear(3, 2)), VP)
    model.network[0].eval()
    with pytest.raises(InconsistentError):
        check_score_model(model, (4, 3))
    assert model.training
    assert not model.network[0].training
    assert model.network[1].training
