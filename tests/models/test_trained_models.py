"""What networks of the papers are told and what they say: labels, variances, ranges."""

import math

import pytest
import torch

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    LogSigmaLabel,
    RawScoreModel,
    ScaledScoreModel,
    StepLabel,
    SubVPSDE,
    VModel,
    X0Model,
)

KINDS = [EpsModel, X0Model, VModel, RawScoreModel, ScaledScoreModel, EDMModel]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_steps_of_a_chain() -> None:
    t = f64(0.1, 0.25, 1.0)
    assert StepLabel(10)(DDPMChain.cosine(10), t).tolist() == pytest.approx([0, 1.5, 9])
    assert StepLabel(10, scale=100.0)(DDPMChain.cosine(10), t).tolist() == pytest.approx(
        [0, 150, 900]
    )
    # On a process of another end, and before the first step.
    assert StepLabel(10)(EDMSDE(sigma_max=80.0), 80 * t).tolist() == pytest.approx([0, 1.5, 9])
    assert StepLabel(10)(VPSDE(), f64(0.0, 0.05)).tolist() == [0.0, 0.0]
    assert StepLabel(10)(VPSDE(), t.float()).dtype == torch.float32


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 10, "scale": 0.0}], ids=str)
def test_steps_of_no_chain(options) -> None:
    with pytest.raises(ValueError, match=r"steps|scale"):
        StepLabel(**options)
    with pytest.raises(TypeError, match="steps"):
        StepLabel(10.0)


def test_log_sigma_over_a_reference() -> None:
    t = f64(0.5, 1.0)
    sigma = f64(math.sqrt(0.5), 50.0)
    told = LogSigmaLabel(1.0, reference=2.0)(VESDE(), t)
    torch.testing.assert_close(told, (sigma / 2).log(), rtol=1e-12, atol=0)
    told = LogSigmaLabel(3.0, reference=0.1)(VESDE(), t)
    torch.testing.assert_close(told, 3 * (10 * sigma).log(), rtol=1e-12, atol=0)
    # sigma is sigma over alpha, that of VP(.1, 20) at 1/2 with 40 digits.
    told = LogSigmaLabel(1.0, reference=2.0)(VPSDE(), t[:1])
    ratio = 0.9596542020680362 / 0.28118288079675235
    assert float(told) == pytest.approx(math.log(ratio / 2), rel=1e-12)
    for options in ({"reference": 0.0}, {"reference": math.inf}, {"scale": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LogSigmaLabel(**options)


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


def test_scaled_scores_where_data_shrink() -> None:
    """The output is sigma times the score, whatever alpha is."""
    output = f64([0.4, 2.0])
    model = ScaledScoreModel(lambda x, noise_label: output, SubVPSDE())
    x, t = f64([0.7, -1.3]), f64(0.5)
    alpha, sigma = 0.28118288079675235, 0.9209361875468394
    torch.testing.assert_close(model(x, t), output / sigma, rtol=1e-12, atol=0)
    prediction = model.predict(x, t)
    torch.testing.assert_close(prediction.x0, (x + sigma * output) / alpha, rtol=1e-12, atol=0)


def test_wide_outputs_that_nobody_announced() -> None:
    model = EpsModel(lambda x, noise_label: torch.zeros(2, 6, 4, 4), VPSDE())
    with pytest.raises(ValueError, match=r"expected an output of shape \(2, 3, 4, 4\), got"):
        model.predict(torch.zeros(2, 3, 4, 4), torch.tensor([0.3, 0.7]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_range_of_the_data_is_kept(kind) -> None:
    model = kind(torch.nn.Identity(), VPSDE(), data_range=(0.0, 1.0))
    assert model.data_range == (0.0, 1.0)
    assert kind(torch.nn.Identity(), VPSDE()).data_range is None
