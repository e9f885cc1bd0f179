"""What a network says of the variance of a step."""

import pytest
import torch

from diffusionkit import (
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    RawScoreModel,
    ScaledScoreModel,
    VModel,
    X0Model,
)
from diffusionkit.values import Prediction

KINDS = [EpsModel, X0Model, VModel, RawScoreModel, ScaledScoreModel, EDMModel]
X, T = torch.randn(2, 3, 4, 4).double(), torch.tensor([0.3, 0.7]).double()


def half(value: float) -> torch.Tensor:
    return torch.full_like(X, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_the_first_half_is_the_statement(kind, variance) -> None:
    first = torch.randn_like(X)
    wide = torch.cat([first, half(torch.nan)], dim=1)
    plain = kind(lambda x, noise_label: first, VPSDE()).predict(X, T)
    prediction = kind(lambda x, noise_label: wide, VPSDE(), variance=variance).predict(X, T)
    assert torch.equal(prediction.x0, plain.x0)
    assert torch.equal(prediction.eps, plain.eps)
    assert plain.log_var is None
    assert plain.log_var_fraction is None


@pytest.mark.parametrize(("v", "fraction"), [(-1.0, 0.0), (0.3, 0.65), (1.0, 1.0), (1.5, 1.25)])
def test_the_second_half_is_a_place_in_the_range(v, fraction) -> None:
    wide = torch.cat([half(9.0), half(v)], dim=1)
    prediction = EpsModel(lambda x, noise_label: wide, VPSDE(), variance="learned_range").predict(
        X, T
    )
    torch.testing.assert_close(prediction.log_var_fraction, half(fraction), rtol=1e-15, atol=0)
    assert prediction.log_var is None


def test_the_second_half_is_the_log_variance() -> None:
    wide = torch.cat([half(9.0), half(-4.5)], dim=1)
    prediction = VModel(lambda x, noise_label: wide, VPSDE(), variance="learned").predict(X, T)
    assert torch.equal(prediction.log_var, half(-4.5))
    assert prediction.log_var_fraction is None


@pytest.mark.parametrize("variance", [None, "fixed_small", "fixed_large"])
def test_of_fixed_variances_nothing_is_said(variance) -> None:
    model = EpsModel(lambda x, noise_label: x, DDPMChain.cosine(10), variance=variance)
    prediction = model.predict(X, T)
    assert prediction.log_var is None
    assert prediction.log_var_fraction is None
    assert model.variance == variance


def test_output_objects_too() -> None:
    class Output:
        sample = torch.tensor([[1.0, 2.0, 3.0, 4.0]])

    model = EpsModel(lambda x, noise_label: Output(), VPSDE(), variance="learned")
    prediction = model.predict(torch.ones(1, 2), torch.tensor([0.5]))
    assert prediction.eps.tolist() == [[1.0, 2.0]]
    assert prediction.log_var.tolist() == [[3.0, 4.0]]


def test_a_prediction_keeps_what_is_said_of_the_variance() -> None:
    one = torch.ones(2)
    built = Prediction(X, X, X, one, one, log_var=half(2.0), log_var_fraction=half(0.5))
    assert torch.equal(built.log_var, half(2.0))
    assert torch.equal(built.log_var_fraction, half(0.5))


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 9, 4, 4), (2, 6, 4, 2), (1, 6, 4, 4)], ids=str)
def test_outputs_without_a_learned_variance(variance, shape) -> None:
    model = EpsModel(lambda x, noise_label: torch.zeros(shape), VPSDE(), variance=variance)
    match = r"expected an output of shape \(2, 6, 4, 4\), with a learned variance, got"
    with pytest.raises(ValueError, match=match):
        model.predict(X, T)


def test_a_learned_variance_of_what_has_no_channels() -> None:
    model = EpsModel(lambda x, noise_label: torch.zeros(4), VPSDE(), variance="learned_range")
    with pytest.raises(ValueError, match=r"expected channels .* got shape \(2,\)"):
        model.predict(torch.zeros(2), torch.tensor([0.3, 0.7]))


def test_unknown_variances() -> None:
    with pytest.raises(ValueError, match=r"learned_range, learned, fixed_small, .* got 'large'"):
        EpsModel(torch.nn.Identity(), VPSDE(), variance="large")
