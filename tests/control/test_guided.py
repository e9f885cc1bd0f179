"""Guidance of networks in half precision."""

import pytest
import torch
from support.gaussian_oracle import randn64
from torch import nn

from diffusionkit import DDIM, DDPMChain, GaussianMixtureModel, PCSampler, Prediction, ScoreModel
from diffusionkit.control.classifier_free import ClassifierFreeGuidance
from diffusionkit.control.guidance import ClassifierGuidance, GradientGuidance
from diffusionkit.control.linear_gaussian import LinearGaussianGuidance


class HalfPrecisionModel(ScoreModel):
    """A mixture as a network in half precision that predicts noise or data."""

    def __init__(self, kind, dtype):
        super().__init__()
        self.sde, self.kind = DDPMChain.cosine(1000), kind
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.all, self.one = (
            GaussianMixtureModel(self.sde, means, [0.3] * len(means))
            for means in ([[-1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0]])
        )

    def predict(self, x, t, shift=None):
        rounded = x.to(self.weight.dtype).double()
        prediction = (self.all if shift is None else self.one).predict(rounded, t)
        output = getattr(prediction, self.kind).to(self.weight.dtype)
        make = {"eps": Prediction.from_eps, "x0": Prediction.from_x0}[self.kind]
        return make(x, output, *self.sde.perturbation_kernel(x, t))


def log_likelihood(x0):
    return -2 * (x0[:, 0] - 0.3) ** 2


def first(x0):
    return x0[:, :1]


@pytest.mark.parametrize("kind", ["eps", "x0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", ["weak", "strong", "gradient", "linear", "free", "rescaled"])
def test_half_precision_where_alpha_is_tiny(kind, dtype, guidance) -> None:
    """At the end of a cosine chain alpha is 5e-5, and guided data overflow float16."""
    model, exact = HalfPrecisionModel(kind, dtype), HalfPrecisionModel(kind, torch.float64)
    logits = lambda x, t: torch.cat([-x[:, :1], x[:, :1]], 1).double() * 4  # noqa: E731
    labels = {"class_labels": torch.arange(60) % 2}
    make, cond = {
        "weak": (lambda model: ClassifierGuidance(model, logits, 1e-3), labels),
        "strong": (lambda model: ClassifierGuidance(model, logits, 2.0), labels),
        "gradient": (lambda model: GradientGuidance(model, log_likelihood), {}),
        "linear": (lambda model: LinearGaussianGuidance(model, first, torch.ones(1, 1), 0.5), {}),
        "free": (lambda model: ClassifierFreeGuidance(model, 3.0), {"shift": 1.0}),
        "rescaled": (lambda model: ClassifierFreeGuidance(model, 3.0, rescale=0.7), {"shift": 1.0}),
    }[guidance]
    # Exact in either dtype. From t = 1 a half-precision noise prediction needs more than one step.
    x, guided = (randn64(60, 2) * 16).round() / 16, make(model)
    # The gradient of noise predictions has digits only where alpha is above their rounding.
    begin = 0.9 if (guidance, kind) == ("gradient", "eps") else 1.0
    grid = torch.linspace(begin, model.sde.t_stop, 21)
    got, wanted = (
        PCSampler(one, DDIM(), grid=grid)(x.to(wide), **cond)
        for one, wide in ((guided, torch.float32), (make(exact), torch.float64))
    )
    off = (got.double() - wanted).abs() / (1 + wanted.abs())
    assert float(off.median()) < (0.02 if dtype == torch.bfloat16 else 0.004)
    assert float(off.quantile(0.95)) < 0.2
    for t in (torch.ones(60), torch.linspace(0.01, 1.0, 60)):
        prediction = guided.predict(x.to(dtype), t, **cond)
        parts = (prediction.x0, prediction.eps, prediction.score)
        assert {part.dtype for part in parts} == {torch.float32}
        assert all(part.isfinite().all() for part in parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", ["gradient", "linear"])
def test_gradients_through_the_model_where_alpha_is_small(dtype, guidance) -> None:
    """A sampler gives the predicted data little weight there; they must be right all the same."""
    model, exact = (HalfPrecisionModel("x0", kind) for kind in (dtype, torch.float64))
    make = {
        "gradient": lambda model: GradientGuidance(model, log_likelihood),
        "linear": lambda model: LinearGaussianGuidance(model, first, torch.ones(1, 1), 0.5),
    }[guidance]
    x = torch.linspace(-1.5, 1.5, 14, dtype=torch.float64).view(7, 2)
    t = torch.full((7,), 0.997)
    assert 0.001 < float(model.sde.marginal(t[:1])[0]) < 0.01
    plain, wanted = exact.predict(x, t).x0, make(exact).predict(x, t).x0
    assert (wanted - plain).abs().max() > 0.5  # guidance is not negligible
    got = make(model).predict(x.float(), t).x0.double()
    torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)
