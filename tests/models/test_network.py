"""Networks as score models: parameterizations, noise labels, learned variances, data ranges."""

import math

import pytest
import torch
from support import f64, seeded
from support.recorder import Recorder
from torch import nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    NetworkModel,
    RawScoreModel,
    ScaledScoreModel,
    SubVPSDE,
    VelocityModel,
    VModel,
    X0Model,
)
from diffusionkit.values import Prediction

MODELS = [
    EpsModel, X0Model, VModel, VelocityModel, RawScoreModel, ScaledScoreModel, EDMModel
]  # fmt: skip


def state(sde, batch=4, dtype=torch.float64):
    g = seeded()
    x0 = torch.randn(batch, 3, 2, generator=g, dtype=dtype)
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64) * sde.T
    return sde.perturb(x0, t, generator=g)


@pytest.mark.parametrize("model_class", MODELS)
def test_exact_outputs_give_exact_predictions(model_class, sde):
    sample = state(sde)
    network = Recorder()
    model = model_class(network, sde)
    a, b = model.parameterization(*sde.marginal(sample.t))
    coefficient = [c if isinstance(c, float) else c.view(-1, 1, 1) for c in (a, b)]
    network.output = coefficient[0] * sample.x0 + coefficient[1] * sample.eps
    prediction = model.predict(sample.x, sample.t)
    torch.testing.assert_close(prediction.x0, sample.x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction.eps, sample.eps, rtol=1e-6, atol=1e-6)
    score = -sample.eps / sample.sigma.view(-1, 1, 1)
    torch.testing.assert_close(model(sample.x, sample.t), score, rtol=1e-6, atol=1e-6)


def test_each_class_interprets_its_output():
    sample = state(VPSDE())
    alpha, sigma = sample.alpha.view(-1, 1, 1), sample.sigma.view(-1, 1, 1)
    output = torch.randn(sample.x.shape, generator=seeded(1)).double()

    def predict(model_class):
        return model_class(Recorder(output), VPSDE()).predict(sample.x, sample.t)

    torch.testing.assert_close(predict(EpsModel).eps, output)
    torch.testing.assert_close(predict(X0Model).x0, output)
    torch.testing.assert_close(predict(RawScoreModel).score, output)
    torch.testing.assert_close(predict(VModel).v, output, rtol=1e-6, atol=1e-6)
    flow = predict(VelocityModel)
    torch.testing.assert_close(flow.eps - flow.x0, output, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.x0, (sample.x - sigma * output) / (alpha + sigma))
    prediction = predict(VModel)
    expected = alpha * sample.x - sigma * output
    torch.testing.assert_close(prediction.x0, expected, rtol=1e-6, atol=1e-6)


def test_default_labels():
    t = torch.tensor([0.25], dtype=torch.float64)

    def label_of(model_class, sde):
        network = Recorder()
        model_class(network, sde).predict(torch.zeros(1, 2), t)
        return float(network.calls[0][1])

    assert label_of(EpsModel, VPSDE()) == pytest.approx(249.75)
    assert label_of(VModel, EDMSDE(sigma_max=80.0)) == pytest.approx(999 * 0.25 / 80)
    sigma = 0.01 * 5000**0.25
    assert label_of(RawScoreModel, VESDE()) == pytest.approx(sigma, rel=1e-6)
    assert label_of(EDMModel, VESDE()) == pytest.approx(math.log(sigma) / 4, rel=1e-6)


def test_label_has_the_dtype_of_the_state_and_conditions_arrive():
    network = Recorder()
    EpsModel(network, VPSDE()).predict(torch.zeros(2, 3), f64(0.1, 0.2), class_labels="cat")
    _, label, cond = network.calls[0]
    assert label.dtype == torch.float32
    assert cond == {"class_labels": "cat"}


def test_output_objects_with_a_sample_are_accepted():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    class Diffusers(nn.Module):
        def forward(self, sample, timestep):
            return Output(2 * sample)

    prediction = EpsModel(Diffusers(), VPSDE()).predict(torch.ones(1, 2), torch.tensor([0.5]))
    assert prediction.eps.tolist() == [[2.0, 2.0]]


def test_custom_parameterization():
    class SumModel(NetworkModel):
        def parameterization(self, alpha, sigma):
            return 1.0, 1.0

    sample = state(VPSDE())
    prediction = SumModel(Recorder(sample.x0 + sample.eps), VPSDE()).predict(sample.x, sample.t)
    torch.testing.assert_close(prediction.x0, sample.x0, rtol=1e-6, atol=1e-6)


def test_network_parameters_belong_to_the_model():
    model = EpsModel(nn.Linear(2, 2), VPSDE())
    assert [name for name, _ in model.named_parameters()] == ["network.weight", "network.bias"]


X, T = torch.randn(2, 3, 4, 4).double(), torch.tensor([0.3, 0.7]).double()


def half(value: float) -> torch.Tensor:
    return torch.full_like(X, value)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_the_first_half_of_the_channels_is_the_prediction(kind, variance) -> None:
    first = torch.randn_like(X)
    wide = torch.cat([first, half(torch.nan)], dim=1)
    plain = kind(lambda x, noise_label: first, VPSDE()).predict(X, T)
    prediction = kind(lambda x, noise_label: wide, VPSDE(), variance=variance).predict(X, T)
    assert torch.equal(prediction.x0, plain.x0)
    assert torch.equal(prediction.eps, plain.eps)
    assert plain.log_var is None
    assert plain.log_var_fraction is None


@pytest.mark.parametrize(("v", "fraction"), [(-1.0, 0.0), (0.3, 0.65), (1.0, 1.0), (1.5, 1.25)])
def test_the_second_half_interpolates_the_log_variances(v, fraction) -> None:
    wide = torch.cat([half(9.0), half(v)], dim=1)
    model = EpsModel(lambda x, noise_label: wide, VPSDE(), variance="learned_range")
    prediction = model.predict(X, T)
    torch.testing.assert_close(prediction.log_var_fraction, half(fraction), rtol=1e-15, atol=0)
    assert prediction.log_var is None


def test_the_second_half_is_the_log_variance() -> None:
    wide = torch.cat([half(9.0), half(-4.5)], dim=1)
    prediction = VModel(lambda x, noise_label: wide, VPSDE(), variance="learned").predict(X, T)
    assert torch.equal(prediction.log_var, half(-4.5))
    assert prediction.log_var_fraction is None


@pytest.mark.parametrize("variance", [None, "fixed_small", "fixed_large"])
def test_fixed_variances_leave_the_prediction_without_one(variance) -> None:
    model = EpsModel(lambda x, noise_label: x, DDPMChain.cosine(10), variance=variance)
    prediction = model.predict(X, T)
    assert prediction.log_var is None
    assert prediction.log_var_fraction is None
    assert model.variance == variance


def test_output_objects_with_a_learned_variance() -> None:
    class Output:
        sample = torch.tensor([[1.0, 2.0, 3.0, 4.0]])

    model = EpsModel(lambda x, noise_label: Output(), VPSDE(), variance="learned")
    prediction = model.predict(torch.ones(1, 2), torch.tensor([0.5]))
    assert prediction.eps.tolist() == [[1.0, 2.0]]
    assert prediction.log_var.tolist() == [[3.0, 4.0]]


def test_predictions_store_the_variance() -> None:
    one = torch.ones(2)
    built = Prediction(X, X, X, one, one, log_var=half(2.0), log_var_fraction=half(0.5))
    assert torch.equal(built.log_var, half(2.0))
    assert torch.equal(built.log_var_fraction, half(0.5))


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 9, 4, 4), (2, 6, 4, 2), (1, 6, 4, 4)], ids=str)
def test_outputs_without_a_learned_variance_raise(variance, shape) -> None:
    model = EpsModel(lambda x, noise_label: torch.zeros(shape), VPSDE(), variance=variance)
    match = r"expected an output of shape \(2, 6, 4, 4\), with a learned variance, got"
    with pytest.raises(ValueError, match=match):
        model.predict(X, T)


def test_learned_variances_require_channels() -> None:
    model = EpsModel(lambda x, noise_label: torch.zeros(4), VPSDE(), variance="learned_range")
    with pytest.raises(ValueError, match=r"expected channels .* got shape \(2,\)"):
        model.predict(torch.zeros(2), torch.tensor([0.3, 0.7]))


def test_unknown_variances_raise() -> None:
    with pytest.raises(ValueError, match="variance: expected one of 'learned_range'"):
        EpsModel(torch.nn.Identity(), VPSDE(), variance="large")


# Karras et al. 2022, table 1, VE: c_skip 1, c_out sigma, c_in 1, c_noise log(sigma / 2).
@pytest.mark.parametrize("time", [0.2, 0.9])
def test_ve_preconditioning(time) -> None:
    sigma = 0.02 * 5000**time
    x, output = f64([0.7, -1.3]), f64([0.4, 2.0])
    seen = []

    def network(x, label):
        seen.append((x, label))
        return output

    model = ScaledScoreModel(network, VESDE(0.02, 100.0))
    prediction = model.predict(x, f64(time))
    torch.testing.assert_close(prediction.x0, x + sigma * output, rtol=1e-12, atol=0)
    torch.testing.assert_close(prediction.score, output / sigma, rtol=1e-12, atol=0)
    assert torch.equal(seen[0][0], x)
    assert float(seen[0][1]) == pytest.approx(math.log(sigma / 2), rel=1e-12)


def test_scaled_scores_with_alpha_below_one() -> None:
    """The output is sigma times the score for every alpha."""
    output = f64([0.4, 2.0])
    model = ScaledScoreModel(lambda x, noise_label: output, SubVPSDE())
    x, t = f64([0.7, -1.3]), f64(0.5)
    alpha, sigma = 0.28118288079675235, 0.9209361875468394
    torch.testing.assert_close(model(x, t), output / sigma, rtol=1e-12, atol=0)
    prediction = model.predict(x, t)
    torch.testing.assert_close(prediction.x0, (x + sigma * output) / alpha, rtol=1e-12, atol=0)


def test_unexpected_variance_channels_raise() -> None:
    model = EpsModel(lambda x, noise_label: torch.zeros(2, 6, 4, 4), VPSDE())
    with pytest.raises(ValueError, match=r"expected an output of shape \(2, 3, 4, 4\), got"):
        model.predict(torch.zeros(2, 3, 4, 4), torch.tensor([0.3, 0.7]))


@pytest.mark.parametrize("kind", MODELS)
def test_data_range_is_stored(kind) -> None:
    model = kind(torch.nn.Identity(), VPSDE(), data_range=(0.0, 1.0))
    assert model.data_range == (0.0, 1.0)
    assert kind(torch.nn.Identity(), VPSDE()).data_range is None
