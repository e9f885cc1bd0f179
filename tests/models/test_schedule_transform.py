"""A model of one process, used with another."""

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    GaussianMixtureModel,
    LogSNRGrid,
    PCSampler,
)
from diffusionkit.models.schedule_transform import ScheduleTransformedModel
from diffusionkit.testing import check_score_model

MIXTURE = {"means": [[-1.0, 0.0], [1.0, 0.5]], "stds": [0.2, 0.3], "weights": [0.3, 0.7]}


@pytest.mark.parametrize(
    "other", [EDMSDE(sigma_min=0.02, sigma_max=15.0), VPSDE(0.1, 10.0, t_min=0.01)], ids=str
)
def test_the_exact_model_stays_exact(sde, other):
    """The score of a mixture is known on both processes."""
    transformed = ScheduleTransformedModel(GaussianMixtureModel(sde, **MIXTURE), other)
    exact = GaussianMixtureModel(other, **MIXTURE)
    x = 3 * torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    t = other.time_at_log_snr(torch.linspace(7.0, -4.9, 50, dtype=torch.float64))
    ours, theirs = transformed.predict(x, t), exact.predict(x, t)
    torch.testing.assert_close(ours.x0, theirs.x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.eps, theirs.eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(transformed(x, t), exact(x, t), rtol=1e-6, atol=1e-6)


def test_passes_check_score_model():
    transformed = ScheduleTransformedModel(GaussianMixtureModel(VPSDE(), **MIXTURE), EDMSDE())
    check_score_model(transformed, (4, 2), exact=True)


def test_ddim_samples_do_not_depend_on_the_process():
    """The same noise-to-signal ratios give the same samples."""
    model = GaussianMixtureModel(VPSDE(), **MIXTURE)
    ratio = LogSNRGrid(t_end=0.01)(EDMSDE(sigma_max=152.0), 30)
    times = VPSDE().time_at_log_snr(-2 * torch.log(ratio))
    alpha, _ = VPSDE().marginal(times)
    z = torch.randn(20, 2, generator=seeded(), dtype=torch.float64)
    own = PCSampler(model, DDIM(), grid=times)
    transformed = PCSampler(
        ScheduleTransformedModel(model, EDMSDE(sigma_max=152.0)), DDIM(), grid=ratio
    )
    start = VPSDE().perturb(z, times[:1].expand(20), generator=seeded(1)).x
    torch.testing.assert_close(own(start), transformed(start / alpha[0]), rtol=1e-7, atol=1e-7)
    assert own.nfe == transformed.nfe == 31


def test_dtypes_and_conditions():
    def network(x, label, *, class_labels):
        assert class_labels == "cat"
        assert x.dtype == torch.float32
        assert label.dtype == torch.float32
        return x

    transformed = ScheduleTransformedModel(EDMModel(network, EDMSDE(sigma_max=160.0)), VPSDE())
    prediction = transformed.predict(torch.ones(3, 2), torch.full((3,), 0.5), class_labels="cat")
    assert prediction.x0.dtype == torch.float32


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        (VPSDE(), EDMSDE(sigma_max=200.0), r"process, 0 to 152\.2, got 0\.002 to 200"),
        (VESDE(0.01, 50.0), EDMSDE(sigma_max=40.0), r"process, 0\.01 to 50, got 0\.002 to 40"),
    ],
)
def test_noise_levels_outside_the_models_range_raise(own, other, message):
    with pytest.raises(ValueError, match=message):
        ScheduleTransformedModel(EpsModel(lambda x, noise_label: x, own), other)


def test_invalid_arguments_raise():
    transformed = ScheduleTransformedModel(EpsModel(lambda x, noise_label: x, VPSDE()), EDMSDE())
    with pytest.raises(ValueError, match=r"t: expected times within \[0, T\] = \[0, 80\]"):
        transformed.predict(torch.ones(1, 2), torch.tensor([81.0]))
    with pytest.raises(ValueError, match=r"one time for each sample, shape \(1,\), got \(2,\)"):
        transformed.predict(torch.ones(1, 2), torch.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match="x: expected a tensor"):
        transformed.predict(3, torch.tensor([1.0]))
    with pytest.raises(TypeError, match="model: expected a ScoreModel, got function"):
        ScheduleTransformedModel(lambda x, t: x, EDMSDE())
    with pytest.raises(TypeError, match="sde: expected a ForwardSDE, got float"):
        ScheduleTransformedModel(transformed, 80.0)


def test_learned_variance_is_preserved():
    """The fraction between two log-variances does not depend on the scale."""
    chain = DDPMChain.cosine(100)
    model = EpsModel(lambda x, noise_label: torch.cat([x, 0.5 * torch.ones_like(x)], 1), chain,
                     variance="learned_range")  # fmt: skip
    x, t = torch.randn(3, 2, 4), torch.full((3,), 2.0)
    fraction = ScheduleTransformedModel(model, EDMSDE()).predict(x, t).log_var_fraction
    torch.testing.assert_close(fraction, torch.full_like(x, 0.75))
