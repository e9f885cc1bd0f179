import numpy as np
import pytest
import torch
from support import seeded

from diffusionkit import DDIM, EDMSDE, VPSDE, Ancestral, DDPMChain, PCSampler
from diffusionkit.models import EpsModel, GaussianMixtureModel, X0Model
from diffusionkit.models.denoised import Clip, DenoisedModel, DynamicThreshold
from diffusionkit.testing import check_score_model


def draw(*shape, scale=2.0):
    return scale * torch.randn(shape, generator=seeded()).double()


def test_noise_and_score_follow_the_modified_data(mixture) -> None:
    sde, x = mixture.sde, draw(5, 2)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64) * sde.T
    model = DenoisedModel(mixture, lambda x0: 0.5 * x0 + 0.1)
    prediction, before = model.predict(x, t), mixture.predict(x, t)
    alpha, sigma = (c.unsqueeze(1) for c in sde.marginal(t))
    x0 = 0.5 * before.x0 + 0.1
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, (x - alpha * x0) / sigma)
    torch.testing.assert_close(model(x, t), -(x - alpha * x0) / sigma**2)


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), DDPMChain.cosine(100)], ids=repr)
def test_passes_check_score_model(sde) -> None:
    model = GaussianMixtureModel(sde, [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3])
    assert check_score_model(DenoisedModel(model, Clip(-0.7, 0.7)), (4, 2)).ok


def test_samples_are_unchanged_without_clipping(mixture) -> None:
    x = mixture.sde.prior_sample((4, 2), generator=seeded()).double()
    runs = [
        PCSampler(model, Ancestral(), steps=30)(x, generator=seeded(1))
        for model in (mixture, DenoisedModel(mixture, Clip(-1e6, 1e6)))
    ]
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


def test_samples_stay_in_the_range(sde) -> None:
    """A mean outside the range is clipped to its end."""
    model = DenoisedModel(GaussianMixtureModel(sde, [[5.0]], [0.1]), Clip(-1.0, 1.0))
    sampler = PCSampler(model, DDIM(eta=0.5), steps=20)
    x = sampler((3, 1), generator=seeded())
    torch.testing.assert_close(x, torch.ones(3, 1), rtol=0, atol=1e-4)
    assert sampler.nfe == 21


def test_variance_and_data_range_are_passed_on(mixture) -> None:
    both = lambda x, noise_label: torch.cat([x, 0.3 * x], 1)  # noqa: E731
    x, t = draw(2, 3), torch.full((2,), 0.5).double() * mixture.sde.T
    for variance in ("learned_range", "learned"):
        inner = EpsModel(both, mixture.sde, variance=variance, data_range=(0.0, 1.0))
        model = DenoisedModel(inner, Clip())
        prediction, before = model.predict(x, t), inner.predict(x, t)
        for name in ("log_var", "log_var_fraction"):
            got, wanted = getattr(prediction, name), getattr(before, name)
            assert (got is None) == (wanted is None)
            assert got is None or torch.equal(got, wanted)
        assert (model.variance, model.data_range) == (variance, (0.0, 1.0))
    plain = DenoisedModel(mixture, Clip())
    assert (plain.variance, plain.data_range) == (None, None)


def test_conditions_and_gradients_pass_through() -> None:
    inner = X0Model(lambda x, noise_label, shift: x + shift, VPSDE())
    model = DenoisedModel(inner, lambda x0: 2 * x0)
    x = torch.zeros(2, 3, requires_grad=True)
    prediction = model.predict(x, torch.tensor([0.1, 0.9]), shift=1.0)
    prediction.x0.sum().backward()
    assert torch.equal(prediction.x0, torch.full((2, 3), 2.0))
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


def test_fn_can_record_intermediate_predictions(mixture) -> None:
    seen = []

    def record(x0):
        seen.append(x0.clone())
        return x0

    x = PCSampler(DenoisedModel(mixture, record), Ancestral(), steps=7)((2, 2))
    assert len(seen) == 8
    assert torch.equal(seen[-1], x)


def test_clip_clips_to_the_range() -> None:
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.7, 3.0]])
    assert torch.equal(Clip()(x), torch.tensor([[-1.0, -0.5, 0.0, 0.7, 1.0]]))
    assert torch.equal(Clip(0.0, 0.5)(x), torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.5]]))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_matches_numpy(quantile, low, high) -> None:
    x0 = draw(3, 2, 4, 5, scale=4.0)
    got = DynamicThreshold(quantile, low, high)(x0)
    center, half = (low + high) / 2, (high - low) / 2
    for row, result in zip(x0.numpy(), got.numpy(), strict=True):
        z = (row - center) / half
        s = max(1.0, np.quantile(np.abs(z), quantile))
        np.testing.assert_allclose(result, center + half * np.clip(z, -s, s) / s, rtol=1e-12)
    assert got.min() >= low - 1e-12
    assert got.max() <= high + 1e-12


def test_dynamic_thresholding_keeps_data_in_range() -> None:
    x0 = draw(4, 6, scale=0.2)
    assert x0.abs().max() < 1
    torch.testing.assert_close(DynamicThreshold()(x0), x0)
    half = DynamicThreshold(0.9)(x0.to(torch.bfloat16) * 10)
    assert half.dtype == torch.bfloat16
    assert DynamicThreshold(0.5)(torch.tensor([4.0, 0.5])).tolist() == [1.0, 0.5]


def test_dynamic_thresholding_up_to_a_largest_quantile() -> None:
    x0 = torch.tensor([[-8.0, 3.0, 1.0], [0.2, 1.5, -0.1]])
    got = DynamicThreshold(1.0, largest=2.0)(x0)
    torch.testing.assert_close(
        got, torch.tensor([[-1.0, 1.0, 0.5], [0.2, 1.5, -0.1]]).div(torch.tensor([[1.0], [1.5]]))
    )


@pytest.mark.slow
def test_dynamic_thresholding_of_large_batches() -> None:
    """torch.quantile raises above 2^24 values."""
    x0 = torch.zeros(5, 1, 1).expand(5, 1900, 1900).contiguous()
    assert DynamicThreshold()(x0).shape == x0.shape


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: DenoisedModel(lambda x, t: x, Clip()), TypeError, "model: expected a ScoreM"),
        (lambda m: DenoisedModel(m, None), TypeError, "fn: expected a callable, got NoneType"),
        (lambda m: Clip(1.0, 1.0), ValueError, "expected low < high, got 1.0 and 1.0"),
        (lambda m: Clip(float("nan")), ValueError, "expected low < high"),
        (lambda m: Clip(None), TypeError, "low: expected a number"),
        (lambda m: DynamicThreshold(0.0), ValueError, r"quantile: expected .* \(0, 1\], got 0.0"),
        (lambda m: DynamicThreshold(1.5), ValueError, "quantile: expected"),
        (lambda m: DynamicThreshold(largest=0.5), ValueError, "largest: expected a number >= 1"),
        (lambda m: DynamicThreshold(low=2.0), ValueError, "finite low < high, got 2.0 and 1.0"),
        (lambda m: DynamicThreshold(high=float("inf")), ValueError, "finite low < high"),
    ],
)
def test_invalid_arguments_raise(mixture, make, error, match) -> None:
    with pytest.raises(error, match=match):
        make(mixture)


@pytest.mark.parametrize("fn", [lambda x0: x0[:1], lambda x0: x0.float(), lambda x0: x0.sum(1)])
def test_functions_that_change_shape_or_dtype_raise(mixture, fn) -> None:
    t = torch.full((3,), 0.5).double() * mixture.sde.T
    with pytest.raises(ValueError, match=r"fn: expected data of shape \(3, 2\), .*64, got"):
        DenoisedModel(mixture, fn).predict(draw(3, 2), t)
