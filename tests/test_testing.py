"""The checks for people who write their own parts find what is broken, and only that."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EDMModel,
    EmpiricalModel,
    EpsModel,
    ForwardSDE,
    GaussianMixtureModel,
    Prediction,
    RawScoreModel,
    ScoreModel,
    SubVPSDE,
    VModel,
    X0Model,
)
from diffusionkit.networks import MLP
from diffusionkit.testing import InconsistentError, Report, check_score_model, check_sde

VP = VPSDE()


class Cosine(ForwardSDE):
    """A user's SDE, written by `marginal` alone: Nichol and Dhariwal's, stopped before pi/2."""

    T = 0.99

    def marginal(self, t):
        return torch.cos(0.5 * torch.pi * t), torch.sin(0.5 * torch.pi * t)


class Linear(ForwardSDE):
    """The interpolation of flow matching: alpha = 1 - t, sigma = t."""

    T, t_min = 0.999, 1e-3

    def marginal(self, t):
        return 1 - t, t


def name(value: object) -> str | None:
    """Name a test after the class of the part under test."""
    return type(value).__name__ if isinstance(value, (ForwardSDE, ScoreModel)) else ""


BUILT_IN = [
    VP,
    VPSDE(1.0, 30.0),
    SubVPSDE(),
    VESDE(),
    VESDE(1e-3, 1e3),
    EDMSDE(),
    EDMSDE(1e-4, 2e3),
    Cosine(),
    Linear(),
]


@pytest.mark.parametrize("sde", BUILT_IN, ids=name)
def test_sdes_that_are_right(sde) -> None:
    report = check_sde(sde)
    assert report.ok
    assert report.problems == ()
    assert str(report) == f"{type(sde).__name__}: 8 checks, no problems"


class WrongStart(Cosine):
    def marginal(self, t):
        alpha, sigma = super().marginal(t)
        return 0.5 * alpha, sigma


class TurnsBack(Cosine):
    def marginal(self, t):
        return torch.ones_like(t), 0.01 + torch.sin(3 * t)


class ShrinksTooFast(Cosine):
    """log-SNR falls, but at a point d sigma^2/dt - 2 f sigma^2 is 0."""

    def marginal(self, t):
        return torch.ones_like(t), 0.1 + (t - 0.5).clamp_min(0)


class OneValue(Cosine):
    def marginal(self, t):
        return (torch.cos(t),)


class WrongShape(Cosine):
    def marginal(self, t):
        if t.ndim > 2:  # a search that feeds these shapes back to itself would fill the memory
            raise MemoryError
        alpha, sigma = super().marginal(t)
        return alpha[:, None], sigma[:, None]


class WrongDtype(Cosine):
    def marginal(self, t):
        alpha, sigma = super().marginal(t)
        return alpha.float(), sigma.float()


class NegativeNoise(Cosine):
    def marginal(self, t):
        alpha, sigma = super().marginal(t)
        return alpha, -sigma


class NotANumber(Cosine):
    def marginal(self, t):
        return torch.cos(t), torch.log(t - 0.5)


class WrongTimes(Cosine):
    t_min = 2.0


class StopsTooEarly(Cosine):
    t_stop = 1e-9


class WrongDrift(VPSDE):
    def drift_coefficient(self, t):
        return -self.beta(t)  # without the half


class WrongDriftShape(VPSDE):
    def drift(self, x, t):
        return self.drift_coefficient(t)


class WrongDiffusion(VPSDE):
    def diffusion(self, t):
        return self.beta(t)  # g^2 instead of g


class WrongLogSNR(VPSDE):
    def log_snr(self, t):
        return 0.5 * super().log_snr(t)

    def time_at_log_snr(self, log_snr):
        return super().time_at_log_snr(2 * log_snr)


class WrongInverse(VPSDE):
    def time_at_log_snr(self, log_snr):
        return 1.001 * super().time_at_log_snr(log_snr)


class WrongTransition(VPSDE):
    def transition(self, s, t):
        scale, std = super().transition(s, t)
        return scale, std**2


class WrongScale(VPSDE):
    def transition(self, s, t):
        scale, std = super().transition(s, t)
        return 1 / scale, std


class NoIdentity(VPSDE):
    def transition(self, s, t):
        scale, std = super().transition(s, t)
        return scale, std + 1e-4


class WrongPerturb(VPSDE):
    def perturb(self, x0, t, *, generator=None):
        sample = super().perturb(x0, t, generator=generator)
        object.__setattr__(sample, "x", sample.x * 1.01)
        return sample


class WrongPriorStd(VPSDE):
    prior_std = 50.0


class WrongPriorSample(VPSDE):
    def prior_sample(self, shape, **options):
        return 2 * super().prior_sample(shape, **options)


class WrongPriorLogProb(VPSDE):
    def prior_log_prob(self, x):
        return super().prior_log_prob(x) / x.shape[1]  # per dimension


class Raises(VPSDE):
    def log_snr(self, t):
        raise RuntimeError("not today")


BROKEN_SDES = [
    (WrongStart(), "marginal: expected alpha(0) = 1, the data themselves, got 0.5"),
    (TurnsBack(), "marginal: expected log-SNR to decrease in t, but it does not near t = "),
    (ShrinksTooFast(), "drift and diffusion: d sigma^2/dt - 2 f sigma^2 is not positive near t = "),
    (OneValue(), "marginal: expected alpha and sigma, got 1 values"),
    (WrongShape(), "marginal: alpha: expected shape (33,) and torch.float32, got (33, 1)"),
    (WrongDtype(), "expected shape (33,) and torch.float64, got (33,) and torch.float32"),
    (NegativeNoise(), "marginal: sigma: expected finite positive values on [t_min, T], got sigma("),
    (NotANumber(), "marginal: sigma: expected finite positive values on [t_min, T], got sigma("),
    (WrongTimes(), "end points: expected 0 < t_min < T, got t_min = 2.0 and T = 0.99"),
    (StopsTooEarly(), "end points: expected t_min <= t_stop < T, got t_stop = 1e-09"),
    (WrongDrift(), "drift and diffusion: f is not d log(alpha)/dt: got "),
    (WrongDriftShape(), "drift and diffusion: drift(x, t) is not f(t) x of shape (B, *D), got"),
    (WrongDiffusion(), "drift and diffusion: g^2 is not d sigma^2/dt - 2 f sigma^2: got"),
    (WrongLogSNR(), "log snr: log_snr is not log(alpha^2 / sigma^2): got"),
    (WrongInverse(), "log snr: time_at_log_snr does not invert log_snr: got"),
    (WrongTransition(), "transition: scale^2 sigma_s^2 + std^2 is not sigma_t^2: got"),
    (WrongTransition(), "transition: variances of s to t and s to m to t do not compose: got"),
    (WrongScale(), "transition: the scale is not alpha_t / alpha_s: got"),
    (NoIdentity(), "transition: the transition from t to t is not the identity"),
    (WrongPerturb(), "perturb: x is not alpha x0 + sigma eps"),
    (WrongPriorStd(), "prior: expected a prior_std near sigma(T) = 0.999978, got 50"),
    (WrongPriorSample(), "prior: prior_sample: expected standard deviation 1, got"),
    (WrongPriorLogProb(), "prior: prior_log_prob is not that of N(0, prior_std^2 I): got"),
    (Raises(), "log snr: raised RuntimeError: not today"),
]


@pytest.mark.parametrize(("sde", "problem"), BROKEN_SDES, ids=name)
def test_sdes_that_are_wrong(sde, problem) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_sde(sde)
    report = caught.value.report
    assert not report.ok
    assert any(problem in found for found in report.problems), str(report)
    assert all(found in str(caught.value) for found in report.problems)
    assert str(caught.value).startswith(f"{type(sde).__name__}: {len(report.problems)} problem")


@pytest.mark.parametrize(
    ("sde", "count"),
    [(WrongDrift(), 1), (WrongDiffusion(), 1), (WrongInverse(), 1),
     (WrongPerturb(), 1), (WrongPriorLogProb(), 1), (StopsTooEarly(), 1)],
    ids=name,
)  # fmt: skip
def test_nothing_else_is_blamed(sde, count) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_sde(sde)
    assert len(caught.value.report.problems) == count


def test_shapes_do_not_grow() -> None:
    """The inverse of log_snr calls it eighty times; what it returns must not be let grow."""
    with pytest.raises(InconsistentError) as caught:
        check_sde(WrongShape())
    assert "MemoryError" not in str(caught.value)
    with pytest.raises(ValueError, match=r"expected .*shape \(3,\), got \(3, 1\)"):
        WrongShape().time_at_log_snr(torch.zeros(3))


def test_every_problem_is_listed_at_once() -> None:
    class Hopeless(VPSDE):
        prior_std = 50.0

        def diffusion(self, t):
            return self.beta(t)

        def time_at_log_snr(self, log_snr):
            return 1.001 * super().time_at_log_snr(log_snr)

    with pytest.raises(InconsistentError, match=r"g\^2 is not(.|\n)*does not invert(.|\n)*prior"):
        check_sde(Hopeless())


# Score models.


@pytest.mark.parametrize("sde", BUILT_IN, ids=name)
def test_exact_models_that_are_right(sde) -> None:
    means = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    mixture = GaussianMixtureModel(sde, means, stds=[0.2, 0.3, 0.4], weights=[0.2, 0.3, 0.5])
    report = check_score_model(mixture, (4, 3), exact=True)
    assert str(report) == "GaussianMixtureModel: 7 checks, no problems"
    assert check_score_model(EmpiricalModel(sde, means), (4, 3), exact=True).ok


@pytest.mark.parametrize("kind", [EpsModel, X0Model, VModel, RawScoreModel, EDMModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sde", [VP, SubVPSDE(), EDMSDE(), Cosine()], ids=name)
def test_network_models_that_are_right(kind, dtype, sde) -> None:
    """Untrained: the weights are drawn, and dropout is on until the check switches it off."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"mlp": MLP(3, width=16, depth=1), "drop": nn.Dropout(0.5)}).to(dtype)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x, label):
            return self.parts["drop"](self.parts["mlp"](x, label))

    model = kind(Network(), sde)
    assert check_score_model(model, (4, 3)).ok
    assert all(module.training for module in model.modules())


def test_conditions_are_handed_on() -> None:
    torch.manual_seed(0)
    model = EpsModel(MLP(3, width=16, depth=1, num_classes=5), VP)
    class_labels = torch.tensor([0, 1, 2, 3])
    assert check_score_model(model, (4, 3), class_labels=class_labels).ok


@pytest.mark.parametrize("shape", [(1, 2), (4, 1), (3, 2, 2), (2, 1, 2, 2)])
def test_any_shape(shape) -> None:
    model = GaussianMixtureModel(VP, torch.zeros(1, *shape[1:]), [0.5])
    assert check_score_model(model, shape, exact=True).ok


@dataclass(eq=False)
class Wrapped(ScoreModel):
    """The exact model of N((1, 0, 0), 1/4), and a place to break it."""

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


class LooksAtTheBatch(Wrapped):
    def broken(self, x, t, true):
        return true.eps - true.eps.mean(0)


class LooksAtTheFirstTime(Wrapped):
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
    """A field with a curl is the gradient of nothing."""

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


class Breaks(Wrapped):
    def broken(self, x, t, true):
        raise RuntimeError("not today")


BROKEN_MODELS = [
    (WrongSign(), "direction: at T the score points away from the data"),
    (LooksAtTheBatch(), "samples apart: a sample's prediction depends on the other samples"),
    (LooksAtTheFirstTime(), "samples apart: a sample's prediction depends on the other samples"),
    (Random(), "repeatable: in evaluation mode two predictions of the same state differ"),
    (NoGradient(), "gradient: the prediction is not differentiable in x"),
    (Rotates(), "symmetric: the Jacobian of the score is not symmetric"),
    (NotFinite(), "prediction: x0: expected finite values, got "),
    (FlatOutput(), "prediction: eps: expected shape (4, 3) and torch.float32, got (4, 1)"),
    (DoubleOutput(), "prediction: x0: expected shape (4, 3) and torch.float32, got (4, 3) and "),
    (AnotherX0(), "prediction: x0 and eps do not satisfy x = alpha x0 + sigma eps"),
    (AnotherScore(), "prediction: the score is not -eps / sigma"),
    (ReturnsATensor(), "prediction: expected predict to return a Prediction, got Tensor"),
    (Breaks(), "prediction: raised RuntimeError: not today"),
]


def test_the_unbroken_one_is_right() -> None:
    assert check_score_model(Wrapped(), (4, 3), exact=True).ok


@pytest.mark.parametrize(("model", "problem"), BROKEN_MODELS, ids=name)
def test_models_that_are_wrong(model, problem) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_score_model(model, (4, 3), exact=True)
    report = caught.value.report
    assert any(problem in found for found in report.problems), str(report)
    assert str(caught.value).startswith(type(model).__name__)


@pytest.mark.parametrize(
    "model",
    [WrongSign(), Rotates(), AnotherX0(), AnotherScore(), NoGradient()],
    ids=name,
)
def test_no_other_part_of_a_model_is_blamed(model) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_score_model(model, (4, 3), exact=True)
    first, *others = {found.split(":")[0] for found in caught.value.report.problems}
    assert others in ([], ["symmetric"], ["gradient"])
    assert first


def test_only_exact_models_need_a_symmetric_jacobian() -> None:
    assert check_score_model(Rotates(), (4, 3)).ok


@pytest.mark.parametrize("seed", range(5))
def test_an_untrained_network_is_not_blamed_for_its_direction(seed) -> None:
    torch.manual_seed(seed)
    for kind in (EpsModel, RawScoreModel):
        assert check_score_model(kind(MLP(1, width=16, depth=1), VP), (2, 1)).ok


def test_a_network_of_the_wrong_shape_is_reported() -> None:
    with pytest.raises(InconsistentError, match=r"raised ValueError: network: expected an output"):
        check_score_model(EpsModel(lambda x, noise_label: x[:, :2], VP), (4, 3))


def test_a_model_without_a_process() -> None:
    model = Wrapped()
    del model.sde
    with pytest.raises(TypeError, match=r"model\.sde: expected a ForwardSDE"):
        check_score_model(model, (4, 3))


def test_the_mode_comes_back_after_a_failure() -> None:
    model = EpsModel(nn.Sequential(nn.Dropout(), nn.Linear(3, 2)), VP)
    model.network[0].eval()
    with pytest.raises(InconsistentError):
        check_score_model(model, (4, 3))
    assert model.training
    assert not model.network[0].training
    assert model.network[1].training


def test_report() -> None:
    report = Report("Part", ("a", "b"), ("first", "second"))
    assert not report.ok
    assert str(report) == "Part: 2 problems\n  - first\n  - second"
    assert str(Report("Part", ("a",), ("first",))) == "Part: 1 problem\n  - first"
    assert isinstance(InconsistentError(report), ValueError)
