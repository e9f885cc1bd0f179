import pytest
import torch

from diffusionkit import DDIM, DDPMChain, GaussianMixtureModel, PCSampler, Prediction, ScoreModel
from diffusionkit.control.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    GradientGuidance,
)
from diffusionkit.control.linear_gaussian import LinearGaussianGuidance


class Stated(ScoreModel):
    """A mixture in the words of a network of the noise or the data, in the state's dtype."""

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
@pytest.mark.parametrize("how", ["classifier", "hard", "gradient", "linear", "free", "rescaled"])
def test_half_states_where_alpha_is_tiny(kind, dtype, how) -> None:
    """At the end of a cosine chain alpha is 5e-5: what is guided there is beyond float16."""
    model = Stated(kind)
    logits = lambda x, t: torch.cat([-x[:, :1], x[:, :1]], 1).double() * 4  # noqa: E731
    y = {"y": torch.arange(60) % 2}
    guided, cond = {
        "classifier": (ClassifierGuidance(model, logits, 1e-3), y),
        "hard": (ClassifierGuidance(model, logits, 2.0), y),
        "gradient": (GradientGuidance(model, lambda x0: -2 * (x0[:, 0] - 0.3) ** 2), {}),
        "linear": (LinearGaussianGuidance(model, lambda x0: x0[:, :1], torch.ones(1, 1), 0.5), {}),
        "free": (ClassifierFreeGuidance(model, 3.0), {"shift": 1.0}),
        "rescaled": (ClassifierFreeGuidance(model, 3.0, rescale=0.7), {"shift": 1.0}),
    }[how]
    # Exact in either dtype. At t = 1 the digits of a network's own noise are too few for one step.
    x = (
        torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 16
    ).round() / 16
    sampler = PCSampler(guided, DDIM(), steps=20)
    got, wanted = sampler(x.to(dtype), **cond), sampler(x, **cond)
    assert got.dtype == dtype
    off = (got.double() - wanted).abs() / (1 + wanted.abs())
    assert float(off.median()) < (0.02 if dtype == torch.bfloat16 else 0.004)
    assert float(off.quantile(0.95)) < 0.2
    for t in (torch.ones(60), torch.linspace(0.01, 1.0, 60)):
        prediction = guided.predict(x.to(dtype), t, **cond)
        assert {part.dtype for part in (prediction.x0, prediction.eps, prediction.score)} == {dtype}
        moved = prediction.combine(x=0.0, x0=1e-3)
        assert moved.dtype == dtype
        assert moved.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["gradient", "linear"])
def test_a_push_through_the_model_where_alpha_is_small(dtype, how) -> None:
    """There a sampler forgets what was said of the data, but it is to be right all the same."""
    model = Stated("x0")
    guided = {
        "gradient": GradientGuidance(model, lambda x0: -2 * (x0[:, 0] - 0.3) ** 2),
        "linear": LinearGaussianGuidance(model, lambda x0: x0[:, :1], torch.ones(1, 1), 0.5),
    }[how]
    x = torch.linspace(-1.5, 1.5, 14, dtype=torch.float64).view(7, 2)
    t = torch.full((7,), 0.997)
    assert 0.001 < float(model.sde.marginal(t[:1])[0]) < 0.01
    plain, wanted = model.predict(x, t).x0, guided.predict(x, t).x0
    assert (wanted - plain).abs().max() > 0.5  # the push is not small
    got = guided.predict(x.to(dtype), t).x0.double()
    torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)
