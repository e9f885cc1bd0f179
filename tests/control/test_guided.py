"""Guided predictions in half precision."""

import pytest
import torch
from support.gaussian_oracle import randn64

from diffusionkit import DDIM, DDPMChain, GaussianMixtureModel, PCSampler, Prediction, ScoreModel
from diffusionkit.control.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    GradientGuidance,
)
from diffusionkit.control.linear_gaussian import LinearGaussianGuidance


class HalfPrecisionModel(ScoreModel):
    """A mixture as a network that predicts noise or data in the dtype of the state."""

    def __init__(self, kind):
        super().__init__()
        self.sde, self.kind = DDPMChain.cosine(1000), kind
        self.all, self.one = (
            GaussianMixtureModel(self.sde, means, [0.3] * len(means))
            for means in ([[-1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0]])
        )

    def predict(self, x, t, shift=None):
        prediction = (self.all if shift is None else self.one).predict(x.double(), t)
        make = {"eps": Prediction.from_eps, "x0": Prediction.from_x0}[self.kind]
        return make(
            x, getattr(prediction, self.kind).to(x.dtype), *self.sde.perturbation_kernel(x, t)
        )


@pytest.mark.parametrize("kind", ["eps", "x0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", ["weak", "strong", "gradient", "linear", "free", "rescaled"])
def test_half_precision_where_alpha_is_tiny(kind, dtype, guidance) -> None:
    """At the end of a cosine chain alpha is 5e-5, and guided data overflow float16."""
    model = HalfPrecisionModel(kind)
    logits = lambda x, t: torch.cat([-x[:, :1], x[:, :1]], 1).double() * 4  # noqa: E731
    labels = {"class_labels": torch.arange(60) % 2}
    guided, cond = {
        "weak": (ClassifierGuidance(model, logits, 1e-3), labels),
        "strong": (ClassifierGuidance(model, logits, 2.0), labels),
        "gradient": (GradientGuidance(model, lambda x0: -2 * (x0[:, 0] - 0.3) ** 2), {}),
        "linear": (LinearGaussianGuidance(model, lambda x0: x0[:, :1], torch.ones(1, 1), 0.5), {}),
        "free": (ClassifierFreeGuidance(model, 3.0), {"shift": 1.0}),
        "rescaled": (ClassifierFreeGuidance(model, 3.0, rescale=0.7), {"shift": 1.0}),
    }[guidance]
    # Exact in either dtype. From t = 1 a half-precision noise prediction needs more than one step.
    x = (randn64(60, 2) * 16).round() / 16
    sampler = PCSampler(guided, DDIM(), steps=20)
    got, wanted = sampler(x.to(dtype), **cond), sampler(x, **cond)
    assert got.dtype == dtype
    off = (got.double() - wanted).abs() / (1 + wanted.abs())
    assert float(off.median()) < (0.02 if dtype == torch.bfloat16 else 0.004)
    assert float(off.quantile(0.95)) < 0.2
    for t in (torch.ones(60), torch.linspace(0.01, 1.0, 60)):
        prediction = guided.predict(x.to(dtype), t, **cond)
        assert {part.dtype for part in (prediction.x0, prediction.eps, prediction.score)} == {dtype}
        combined = prediction.combine(x=0.0, x0=1e-3)
        assert combined.dtype == dtype
        assert combined.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", ["gradient", "linear"])
def test_gradients_through_the_model_where_alpha_is_small(dtype, guidance) -> None:
    """A sampler gives the predicted data little weight there; they must be right all the same."""
    model = HalfPrecisionModel("x0")
    guided = {
        "gradient": GradientGuidance(model, lambda x0: -2 * (x0[:, 0] - 0.3) ** 2),
        "linear": LinearGaussianGuidance(model, lambda x0: x0[:, :1], torch.ones(1, 1), 0.5),
    }[guidance]
    x = torch.linspace(-1.5, 1.5, 14, dtype=torch.float64).view(7, 2)
    t = torch.full((7,), 0.997)
    assert 0.001 < float(model.sde.marginal(t[:1])[0]) < 0.01
    plain, wanted = model.predict(x, t).x0, guided.predict(x, t).x0
    assert (wanted - plain).abs().max() > 0.5  # guidance is not negligible
    got = guided.predict(x.to(dtype), t).x0.double()
    torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)
