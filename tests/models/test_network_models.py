import math

import pytest
import torch
from torch import nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EDMModel,
    EpsModel,
    IndexLabel,
    LogSigmaLabel,
    NetworkModel,
    RawScoreModel,
    ScaledScoreModel,
    SigmaLabel,
    TimeLabel,
    VModel,
    X0Model,
)

MODELS = [EpsModel, X0Model, VModel, RawScoreModel, ScaledScoreModel, EDMModel]


class Recorder(nn.Module):
    """Returns a fixed tensor and keeps what it was called with."""

    def __init__(self, output=None):
        super().__init__()
        self.output, self.calls = output, []

    def forward(self, x, label, **cond):
        self.calls.append((x, label, cond))
        return torch.zeros_like(x) if self.output is None else self.output


def state(sde, batch=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(batch, 3, 2, generator=g, dtype=dtype)
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64) * sde.T
    return sde.perturb(x0, t, generator=g)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_network_that_states_the_truth_predicts_it(model_class, sde):
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


def test_what_each_class_predicts():
    sample = state(VPSDE())
    alpha, sigma = sample.alpha.view(-1, 1, 1), sample.sigma.view(-1, 1, 1)
    output = torch.randn(sample.x.shape, generator=torch.Generator().manual_seed(1)).double()

    def predict(model_class):
        return model_class(Recorder(output), VPSDE()).predict(sample.x, sample.t)

    torch.testing.assert_close(predict(EpsModel).eps, output)
    torch.testing.assert_close(predict(X0Model).x0, output)
    torch.testing.assert_close(predict(RawScoreModel).score, output)
    torch.testing.assert_close(predict(VModel).v, output, rtol=1e-6, atol=1e-6)
    prediction = predict(VModel)
    torch.testing.assert_close(
        prediction.x0, alpha * sample.x - sigma * output, rtol=1e-6, atol=1e-6
    )


# Karras et al. 2022, table 1, at sigma_data = .5: c_skip, c_out, c_in, c_noise.
@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out", "c_in", "c_noise"),
    [
        (0.002, 0.9999840002559959, 0.0019999840001919972, 1.9999840001919975, -1.5536520246055479),
        (1.0, 0.2, 0.4472135954999579, 0.8944271909999159, 0.0),
    ],
)
def test_edm_preconditioning(sigma, c_skip, c_out, c_in, c_noise):
    x = torch.tensor([[0.7, -1.3]], dtype=torch.float64)
    network = Recorder(torch.tensor([[0.4, 2.0]], dtype=torch.float64))
    prediction = EDMModel(network, EDMSDE()).predict(x, torch.tensor([sigma], dtype=torch.float64))
    torch.testing.assert_close(
        prediction.x0, c_skip * x + c_out * network.output, rtol=1e-12, atol=0
    )
    seen, label, _ = network.calls[0]
    torch.testing.assert_close(seen, c_in * x, rtol=1e-12, atol=0)
    assert float(label) == pytest.approx(c_noise, rel=1e-12, abs=1e-15)


def test_edm_model_serves_every_process(sde):
    """With zero output it is the best linear denoiser of data of variance sigma_data^2."""
    sample = state(sde)
    prediction = EDMModel(Recorder(), sde, sigma_data=0.7).predict(sample.x, sample.t)
    alpha, sigma = sample.alpha.view(-1, 1, 1), sample.sigma.view(-1, 1, 1)
    gain = alpha * 0.49 / (alpha**2 * 0.49 + sigma**2)
    torch.testing.assert_close(prediction.x0, gain * sample.x, rtol=1e-9, atol=1e-12)


def test_edm_model_gives_the_network_unit_variance(sde):
    g = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(2, 20000, generator=g, dtype=torch.float64)
    t = sde.time_at_log_snr(torch.tensor([3.0, -3.0], dtype=torch.float64))
    network = Recorder()
    EDMModel(network, sde).predict(sde.perturb(x0, t, generator=g).x, t)
    # 20000 normals: the standard error of a standard deviation is .5%.
    torch.testing.assert_close(
        network.calls[0][0].std(1), torch.ones(2).double(), rtol=0.02, atol=0
    )


def test_default_labels():
    t = torch.tensor([0.25], dtype=torch.float64)

    def told(model_class, sde):
        network = Recorder()
        model_class(network, sde).predict(torch.zeros(1, 2), t)
        return float(network.calls[0][1])

    assert told(EpsModel, VPSDE()) == pytest.approx(249.75)
    assert told(VModel, EDMSDE(sigma_max=80.0)) == pytest.approx(999 * 0.25 / 80)
    sigma = 0.01 * 5000**0.25
    assert told(RawScoreModel, VESDE()) == pytest.approx(sigma, rel=1e-6)
    assert told(EDMModel, VESDE()) == pytest.approx(math.log(sigma) / 4, rel=1e-6)


def test_labels_of_the_users_choice():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(TimeLabel(scale=1.0)(VPSDE(), t), t)
    ratio = SigmaLabel()(VPSDE(), t[1:])
    torch.testing.assert_close(
        ratio[0], torch.tensor(0.9596542020680362 / 0.28118288079675235).double()
    )
    torch.testing.assert_close(LogSigmaLabel()(VPSDE(), t[1:]), ratio.log() / 4)
    table = [50.0, 5.0, 0.5, 0.05, 0.01]  # NCSN's order: level 0 is the largest noise
    assert IndexLabel(table)(VESDE(), t).tolist() == [4.0, 2.0, 0.0]
    assert IndexLabel(table[::-1])(VESDE(), t).tolist() == [0.0, 2.0, 4.0]


def test_label_has_the_state_dtype_and_cond_arrives():
    network = Recorder()
    EpsModel(network, VPSDE()).predict(
        torch.zeros(2, 3, dtype=torch.float32),
        torch.tensor([0.1, 0.2]).double(),
        class_labels="cat",
    )
    _, label, cond = network.calls[0]
    assert label.dtype == torch.float32
    assert cond == {"class_labels": "cat"}


def test_output_objects_with_a_sample_are_networks_too():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    class Diffusers(nn.Module):
        def forward(self, sample, timestep):
            return Output(2 * sample)

    prediction = EpsModel(Diffusers(), VPSDE()).predict(torch.ones(1, 2), torch.tensor([0.5]))
    assert prediction.eps.tolist() == [[2.0, 2.0]]


def test_a_parameterisation_of_ones_own():
    class SumModel(NetworkModel):
        def parameterization(self, alpha, sigma):
            return 1.0, 1.0

    sample = state(VPSDE())
    prediction = SumModel(Recorder(sample.x0 + sample.eps), VPSDE()).predict(sample.x, sample.t)
    torch.testing.assert_close(prediction.x0, sample.x0, rtol=1e-6, atol=1e-6)


def test_network_parameters_belong_to_the_model():
    model = EpsModel(nn.Linear(2, 2), VPSDE())
    assert [name for name, _ in model.named_parameters()] == ["network.weight", "network.bias"]
