"""The score-matching objective, and its losses in nats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded
from torch import nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VLB,
    VPSDE,
    DDPMChain,
    DenoisingTarget,
    EDMModel,
    EpsModel,
    ForwardSDE,
    GaussianMixtureModel,
    ImportanceTimes,
    LikelihoodWeighting,
    LogNormalTimes,
    RawScoreModel,
    ScoreMatching,
    StableTarget,
    StratifiedTimes,
    SubVPSDE,
    TargetEstimator,
    TimeSampler,
    UniformTimes,
    VModel,
    X0Model,
)
from diffusionkit._grid_times import grid_times

SDES = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(), "edm": EDMSDE()}
MODELS = [EpsModel, X0Model, VModel, RawScoreModel, EDMModel]


def zero(x, label, **cond):
    return torch.zeros_like(x)


class Scale(nn.Module):
    """The network w x, with one parameter w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x, label):
        return self.w * x


class FixedTimes(TimeSampler):
    """A constant time and weight; records its updates."""

    def __init__(self, time: float = 0.5, weight: float = 1.0) -> None:
        self.time, self.weight, self.updates = time, weight, []

    def sample(self, sde, n, *, generator=None, device=None, dtype=None):
        t = torch.full((n,), self.time, device=device, dtype=dtype or torch.float64)
        return t, torch.full_like(t, self.weight)

    def update(self, t, loss):
        self.updates.append((t, loss))


class SpyTarget(TargetEstimator):
    """The denoising target; records its arguments."""

    def __call__(self, sample, reference=None, **cond):
        self.given = (sample, reference, cond)
        return DenoisingTarget()(sample)


def test_the_loss_of_a_zero_network_is_the_mean_square_of_the_noise() -> None:
    x0, t = torch.randn(4, 3, 2), torch.tensor([0.1, 0.3, 0.5, 0.9])
    eps = VPSDE().perturb(x0, t, generator=seeded()).eps
    loss = ScoreMatching()(EpsModel(zero, VPSDE()), x0, t=t, generator=seeded())
    torch.testing.assert_close(loss, eps.square().mean((1, 2)))


def test_the_loss_is_weighted() -> None:
    """The likelihood weight of VE(.01, 50) is 2 ln 5000 at every time."""
    model, x0 = EpsModel(zero, VESDE()), torch.randn(4, 3, dtype=torch.float64)
    plain = ScoreMatching()(model, x0, generator=seeded())
    weighted = ScoreMatching(LikelihoodWeighting())(model, x0, generator=seeded())
    torch.testing.assert_close(weighted / plain, torch.full_like(plain, 17.034386382832475))


def test_the_loss_is_weighted_by_the_time_sampler() -> None:
    model, x0 = EpsModel(zero, VPSDE()), torch.randn(4, 3, dtype=torch.float64)
    one = ScoreMatching(times=FixedTimes())(model, x0, generator=seeded())
    two = ScoreMatching(times=FixedTimes(weight=2.5))(model, x0, generator=seeded())
    torch.testing.assert_close(two, 2.5 * one)


@pytest.mark.parametrize("kind", [EpsModel, RawScoreModel])
@pytest.mark.parametrize("name", SDES)
def test_zero_as_predicted_noise_has_loss_one(name, kind) -> None:
    n = 200_000
    loss = ScoreMatching()(kind(zero, SDES[name]), torch.randn(4, n // 4), generator=seeded())
    assert float(loss.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / n))


def test_the_loss_of_zero_as_predicted_data() -> None:
    """eps_hat = x / sigma, so the error is alpha x0 / sigma for any noise."""
    x0 = torch.tensor([[1.0, 3.0]] * 2, dtype=torch.float64)  # mean square 5
    t = torch.tensor([0.5, 4.0], dtype=torch.float64)
    loss = ScoreMatching()(X0Model(zero, EDMSDE()), x0, t=t)
    assert loss.tolist() == pytest.approx([20.0, 0.3125], rel=1e-12)
    # alpha^2 / sigma^2 of VP(.1, 20) at 1/2, computed with 40 digits, times 5
    loss = ScoreMatching()(X0Model(zero, VPSDE()), x0[:1], t=t[:1])
    assert loss.tolist() == pytest.approx([5 * 0.08585156444310038], rel=1e-12)


def test_the_loss_of_zero_as_predicted_velocity(monkeypatch) -> None:
    """With alpha = 1, sigma = 2: v = eps - 2 x0, and eps_hat - eps = -v / (alpha^2 + sigma^2)."""
    eps = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    monkeypatch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: eps)
    x0, t = torch.tensor([[3.0, 2.0]], dtype=torch.float64), torch.tensor([2.0])
    loss = ScoreMatching()(VModel(zero, EDMSDE()), x0, t=t)
    assert loss.tolist() == pytest.approx([1.0], rel=1e-12)  # v = (-5, -5), errors (1, 1)


@pytest.mark.parametrize("name", SDES)
def test_the_expected_loss_of_the_exact_model(name) -> None:
    """For data from N(0, s^2) it is alpha^2 s^2 / (alpha^2 s^2 + sigma^2).

    The errors are Gaussian, so the mean of n squares has relative standard error sqrt(2 / n).
    """
    sde, s, n = SDES[name], 0.6, 60_000
    model = GaussianMixtureModel(sde, means=torch.zeros(1, n), stds=[s])
    t = sde.time_at_log_snr(torch.tensor([5.0, 1.0, -2.0], dtype=torch.float64))
    x0 = s * torch.randn(3, n, generator=seeded(), dtype=torch.float64)
    loss = ScoreMatching()(model, x0, t=t, generator=seeded(1))
    # s^2 snr / (1 + s^2 snr) for snr = e^5, e, e^-2 and s^2 = .36, computed with 40 digits
    expected = torch.tensor([0.981627352571, 0.494587399557, 0.0464572711055], dtype=torch.float64)
    assert float((loss / expected - 1).abs().max()) < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_does_not_depend_on_the_parameterization(kind) -> None:
    """The network of each class returns its output for the denoiser x0_hat = 0.3 x."""
    sde, x0 = VPSDE(), torch.randn(5, 4, generator=seeded(), dtype=torch.float64)
    t = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.95], dtype=torch.float64)
    alpha, sigma = (c.view(5, 1) for c in sde.marginal(t))
    noisy = sde.perturb(x0, t, generator=seeded(1)).x
    x0_hat = 0.3 * noisy
    eps_hat = (noisy - alpha * x0_hat) / sigma
    ratio, sd = sigma / alpha, 0.5
    outputs = {
        EpsModel: eps_hat,
        X0Model: x0_hat,
        VModel: alpha * eps_hat - sigma * x0_hat,
        RawScoreModel: -eps_hat / sigma,
        EDMModel: (x0_hat - sd**2 / (ratio**2 + sd**2) * noisy / alpha)
        / (ratio * sd / (ratio**2 + sd**2).sqrt()),
    }
    model = kind(lambda x, noise_label: outputs[kind], sde)
    loss = ScoreMatching()(model, x0, t=t, generator=seeded(1))
    eps = (noisy - alpha * x0) / sigma
    torch.testing.assert_close(loss, (eps_hat - eps).square().mean(1), rtol=1e-9, atol=0)


def test_the_gradient_in_closed_form() -> None:
    """For eps_hat = w x, d loss / d w = 2 mean((w x - eps) x)."""
    net, t = Scale(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    x0 = torch.randn(2, 3, dtype=torch.float64)
    sample = VPSDE().perturb(x0, t, generator=seeded())
    loss = ScoreMatching()(EpsModel(net, VPSDE()), x0, t=t, generator=seeded())
    loss.sum().backward()
    expected = 2 * ((0.5 * sample.x - sample.eps) * sample.x).mean(1).sum()
    torch.testing.assert_close(net.w.grad, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_gets_a_gradient(kind) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    model = kind(lambda x, noise_label: net(x), VPSDE())
    ScoreMatching()(model, torch.randn(6, 3), generator=seeded()).mean().backward()
    for p in net.parameters():
        assert bool(torch.isfinite(p.grad).all())
        assert float(p.grad.abs().max()) > 0


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    kind=st.sampled_from(MODELS),
    name=st.sampled_from(sorted(SDES)),
)
def test_samples_of_any_shape_have_one_finite_loss_each(shape, dtype, kind, name) -> None:
    loss = ScoreMatching()(kind(zero, SDES[name]), torch.ones(shape, dtype=dtype))
    assert loss.shape == (shape[0],)
    assert loss.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    assert bool(torch.isfinite(loss).all())


def test_conditions_are_passed_to_network_and_target() -> None:
    seen, target, class_labels = {}, SpyTarget(), torch.arange(4)

    def network(x, label, **cond):
        seen.update(cond)
        return torch.zeros_like(x)

    options = {"class_labels": class_labels, "scale": 3}
    ScoreMatching(target=target)(EpsModel(network, VPSDE()), torch.randn(4, 2), **options)
    assert seen["class_labels"] is class_labels
    assert seen["scale"] == 3
    assert target.given[2]["class_labels"] is class_labels


def test_the_reference_is_passed_to_the_target() -> None:
    target, reference, x0 = SpyTarget(), torch.randn(9, 2), torch.randn(4, 2)
    objective = ScoreMatching(target=target)
    objective(EpsModel(zero, VPSDE()), x0, reference=reference)
    assert target.given[1] is reference
    assert target.given[0].x0 is x0
    objective(EpsModel(zero, VPSDE()), x0)
    assert target.given[1] is None


def test_the_time_sampler_is_updated_with_losses_without_its_weight() -> None:
    times, net = FixedTimes(weight=3.0), Scale()
    x0 = torch.randn(4, 2, dtype=torch.float64)
    loss = ScoreMatching(LikelihoodWeighting(), times=times)(EpsModel(net, VESDE()), x0)
    ((t, passed),) = times.updates
    assert torch.equal(t, torch.full((4,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(passed, loss.detach() / 3)
    assert not passed.requires_grad


def test_given_times_are_used_with_weight_one() -> None:
    target = SpyTarget()
    t = torch.tensor([0.2, 0.4])
    objective = ScoreMatching(target=target, times=FixedTimes(0.9, weight=7.0))
    loss = objective(EpsModel(zero, VPSDE()), torch.randn(2, 50), t=t, generator=seeded())
    assert torch.equal(target.given[0].t, t)
    torch.testing.assert_close(loss, target.given[0].eps.square().mean(1))


@pytest.mark.parametrize("objective", [ScoreMatching(), VLB()])
def test_models_get_tensors_at_times_of_a_sampler(objective) -> None:
    kernels = []

    class Spy(EpsModel):
        def predict(self, x, t, **cond):
            kernels.extend(self.sde.perturbation_kernel(x, t))
            return super().predict(x, t, **cond)

    chain, x0 = DDPMChain.cosine(10), torch.ones(2, 3)
    (t,) = grid_times(chain, torch.tensor([0.5]), x0)
    assert objective(Spy(zero, chain), x0, t=t).shape == (2,)
    assert [c.shape for c in kernels] == [(2,), (2,)]


def test_a_sample_with_its_own_generator_does_not_depend_on_the_batch() -> None:
    target = SpyTarget()
    objective = ScoreMatching(target=target, times=UniformTimes())
    model, x0 = EpsModel(zero, VPSDE()), torch.randn(7, 6)
    together = objective(model, x0, generator=[seeded(i) for i in range(7)])
    t, x = target.given[0].t, target.given[0].x
    for i in range(7):
        alone = objective(model, x0[i : i + 1], generator=[seeded(i)])
        assert torch.equal(target.given[0].t, t[i : i + 1])
        assert torch.equal(target.given[0].x, x[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])


def test_the_generator_determines_times_and_noise() -> None:
    model, x0, objective = EpsModel(zero, VPSDE()), torch.randn(3, 2), ScoreMatching()
    first, second, other = (objective(model, x0, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    objective(model, x0, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_stratified_times_lower_the_variance_of_the_mean_loss() -> None:
    """The loss of x0_hat = 0 is alpha^2 / sigma^2 x0^2: it varies with the times only."""
    sde, x0 = EDMSDE(sigma_min=1.0, sigma_max=3.0), torch.ones(16, 1)
    model, spread = X0Model(zero, sde), []
    for times in (UniformTimes(), StratifiedTimes()):
        objective, g = ScoreMatching(times=times), seeded()
        spread.append(torch.stack([objective(model, x0, generator=g).mean() for _ in range(100)]))
    # The mean of 1 / sigma^2 over [1, 3] is 1/3.
    assert float(spread[1].mean()) == pytest.approx(1 / 3, abs=0.005)
    assert float(spread[1].std()) < 0.5 * float(spread[0].std())


def test_the_defaults_are_the_simple_loss() -> None:
    assert repr(ScoreMatching()) == (
        "ScoreMatching(SimpleWeighting(), target=DenoisingTarget(), times=UniformTimes())"
    )


def gaussian(sde: ForwardSDE) -> GaussianMixtureModel:
    return GaussianMixtureModel(sde, means=[[0.0]], stds=[1.0])


# J_DSM at the optimum for N(0, 1) data, and the variance of twice the estimate, 40 digits.
OPTIMA = [
    (VPSDE(), 6.907236683232264, 726.5954256833179),
    (SubVPSDE(), 13.81449445837578, 2246.7005381010995),
    (SubVPSDE(t_min=1e-2), 6.2170914585418, 616.6574395255789),
    (VESDE(), 4.604935060062747, 334.74993971502397),
    # From t = .5: log(2500 / 2501 * 1.5 / .5) / 2.
    (VESDE(t_min=0.5), 0.5 * math.log(7500 / 2501), None),
]


@pytest.mark.parametrize(("sde", "optimum", "variance"), OPTIMA)
def test_nats_of_an_exact_score_and_their_variance(sde, optimum, variance) -> None:
    n = 200_000
    model = gaussian(sde)
    objective = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes(stratified=False))
    g = seeded(1)
    x = torch.randn(n, 1, generator=g, dtype=torch.float64)
    nats = objective.nats(model, x, generator=g)
    error = math.sqrt((variance / 4 if variance else float(nats.var())) / n)
    assert abs(float(nats.mean()) - optimum) < 4 * error
    # The relative error of the sample variance is about sqrt(kurtosis / n), below 1%.
    assert variance is None or float((2 * nats).var()) == pytest.approx(variance, rel=0.04)


def test_importance_sampling_lowers_the_variance_by_the_exact_ratio() -> None:
    # Sub-VP from t = .01: 3066.4 with uniform times, 616.7 with importance sampling.
    sde, n = SubVPSDE(t_min=1e-2), 400_000
    model, variances = gaussian(sde), []
    for times in (UniformTimes(), ImportanceTimes(stratified=False)):
        g = seeded(2)
        x = torch.randn(n, 1, generator=g, dtype=torch.float64)
        nats = ScoreMatching(LikelihoodWeighting(), times=times).nats(model, x, generator=g)
        assert float(nats.mean()) == pytest.approx(6.2170914585418, abs=0.15)
        variances.append(float((2 * nats).var()))
    assert variances[0] / variances[1] == pytest.approx(4.972560813832785, rel=0.08)


def test_stratified_times_estimate_the_same_nats() -> None:
    objective = ScoreMatching(LikelihoodWeighting(), times=StratifiedTimes())
    x = torch.randn(100_000, 1, generator=seeded(3), dtype=torch.float64)
    nats = objective.nats(gaussian(VESDE()), x, generator=seeded(4))
    assert float(nats.mean()) == pytest.approx(4.604935060062747, abs=0.12)


def test_nats_scale_with_the_dimension() -> None:
    sde = VPSDE()
    model = GaussianMixtureModel(sde, means=torch.zeros(1, 3, 4, 4), stds=[1.0])
    objective = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes())
    x = torch.randn(4000, 3, 4, 4, generator=seeded(5))
    nats = objective.nats(model, x, generator=seeded(6))
    assert float(nats.mean()) / 48 == pytest.approx(6.907236683232264, rel=0.02)


def test_nats_require_the_likelihood_weighting_and_unbiased_times() -> None:
    x = torch.randn(2, 1)
    with pytest.raises(TypeError, match="weighting: expected LikelihoodWeighting"):
        ScoreMatching().nats(gaussian(VPSDE()), x)
    objective = ScoreMatching(LikelihoodWeighting(), times=LogNormalTimes())
    with pytest.raises(ValueError, match=r"times: expected .* got LogNormalTimes"):
        objective.nats(gaussian(VPSDE()), x)


def test_nats_with_references_of_the_same_class() -> None:
    model = EpsModel(lambda x, noise_label, class_labels=None: torch.zeros_like(x), VESDE())
    objective = ScoreMatching(
        LikelihoodWeighting(), target=StableTarget(), times=ImportanceTimes(stratified=False)
    )
    data = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    options = {"class_labels": torch.tensor([0, 1]), "generator": seeded(7)}
    nats = objective.nats(
        model, data, reference=data, reference_class_labels=torch.tensor([0, 1]), **options
    )
    # With one reference per class it is the denoising target.
    plain = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes(stratified=False))
    expected = plain.nats(model, data, class_labels=options["class_labels"], generator=seeded(7))
    torch.testing.assert_close(nats, expected)


def masks() -> dict[str, torch.Tensor]:
    """Masks of sequences (4, 2, 9) of lengths 9, 5, 1 and 7."""
    kept = torch.arange(9) < torch.tensor([9, 5, 1, 7]).unsqueeze(1)
    return {
        "booleans": kept.unsqueeze(1).expand(4, 2, 9),
        "one channel": kept.unsqueeze(1),
        "integers": kept.unsqueeze(1).long(),
        "weights": kept.unsqueeze(1) * torch.rand((4, 2, 9), generator=seeded(3)),
        "all alike": torch.rand((1, 2, 9), generator=seeded(4)),
    }


@pytest.mark.parametrize("padding", [0.0, 7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", masks())
def test_a_masked_loss_is_the_mean_over_what_is_not_masked(name, padding):
    mask, sde = masks()[name], VPSDE()
    x0 = torch.randn((4, 2, 9), generator=seeded())
    filled = x0.masked_fill(mask == 0, padding)
    clean = x0.masked_fill(mask == 0, 0.0)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95])
    model = VModel(lambda x, noise_label: 0.3 * x, sde)
    objective = ScoreMatching(LikelihoodWeighting())
    got = objective(model, filled, mask=mask, t=t, generator=seeded(1))
    # By hand: eps_hat = sigma x + alpha v, and g^2 / sigma^2.
    alpha, sigma = (c.view(4, 1, 1) for c in sde.marginal(t.double()))
    eps = torch.randn((4, 2, 9), generator=seeded(1)).double()
    x = alpha * clean.double() + sigma * eps
    error = (sigma * x + alpha * 0.3 * x - eps).square() * mask
    weight = LikelihoodWeighting()(sde, t.double())
    whole = mask.expand(4, 2, 9).double()
    right = weight * error.sum((1, 2)) / whole.sum((1, 2))
    torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-7)


def test_masked_losses_in_nats_sum_over_what_is_not_masked():
    mask = masks()["weights"]
    x0 = torch.randn((4, 2, 9), generator=seeded())
    objective = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes())
    nats = objective.nats(GAUSSIAN, x0, mask=mask, generator=seeded(1))
    loss = objective(GAUSSIAN, x0, mask=mask, generator=seeded(1))
    sde = GAUSSIAN.sde
    torch.testing.assert_close(nats, 0.5 * (sde.T - sde.t_min) * mask.sum((1, 2)) * loss)


GAUSSIAN = EpsModel(lambda x, noise_label: 0.5 * x, VPSDE())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("x", "mask: expected a tensor or None, got str"),
        (torch.ones(4, 3), r"mask: expected shape \(4, 2, 9\)"),
        (torch.ones(9), r"mask: expected shape \(4, 2, 9\)"),
        (torch.ones(3, 2, 9), r"mask: expected shape \(4, 2, 9\)"),
        (-torch.ones(4, 2, 9), "mask: expected numbers >= 0, got -1"),
        (torch.zeros(4, 2, 9), "mask: expected an entry > 0 in each sample"),
        (torch.full((4, 2, 9), float("nan")), "mask: expected finite values"),
        (torch.ones(4, 2, 9, dtype=torch.complex64), "mask: expected booleans or numbers"),
    ],
)
def test_invalid_masks_raise(mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ScoreMatching()(GAUSSIAN, torch.zeros(4, 2, 9), mask=mask)


def test_data_outside_the_models_range_raise():
    model = EpsModel(zero, VPSDE(), data_range=(-1, 1))
    x0 = torch.rand((8, 4), generator=seeded())
    assert ScoreMatching()(model, 2 * x0 - 1).shape == (8,)
    with pytest.raises(ValueError, match=r"x0: expected data within .*; scale 8-bit images first"):
        ScoreMatching()(model, 255 * x0)
    with pytest.raises(ValueError, match=r"x0: expected data within the model's range \[-1, 1\]"):
        ScoreMatching()(model, x0 - 2)
    mask = torch.ones(8, 4)
    mask[:, 2] = 0  # what is masked may be anything
    x0[:, 2] = 100.0
    assert ScoreMatching()(model, x0, mask=mask).shape == (8,)


def test_a_networks_nan_is_a_loss_that_training_can_skip():
    """`clipped_step` skips it; only infinities of the library's own making raise."""
    model = EpsModel(lambda x, noise_label: x * float("nan"), VPSDE())
    assert bool(ScoreMatching()(model, torch.zeros(2, 3)).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_of_large_images_in_half_precision(dtype):
    """float16 cannot count beyond 65,504."""
    x0 = torch.zeros(2, 3, 200, 200, dtype=dtype)
    whole = ScoreMatching(LikelihoodWeighting()).nats(GAUSSIAN, x0, generator=seeded(1))
    for mask in (torch.ones_like(x0), torch.ones(2, 1, 200, 200, dtype=torch.bool)):
        got = ScoreMatching(LikelihoodWeighting()).nats(
            GAUSSIAN, x0, mask=mask, generator=seeded(1)
        )
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_masks_of_numbers_and_under_vmap():
    """One-dimensional batches have masks, too; the losses of samples may be mapped."""
    model = EpsModel(zero, VPSDE(), data_range=(-9, 9))
    assert ScoreMatching()(model, torch.zeros(4), mask=torch.ones(4)).shape == (4,)
    x0, mask = torch.zeros(4, 3), torch.tensor([1.0, 0.0, 2.0]).expand(4, 3)

    def one(x0, mask):
        t = torch.full((1,), 0.5)
        return ScoreMatching()(model, x0[None], mask=mask[None], t=t).squeeze(0)

    assert bool(torch.vmap(one, randomness="different")(x0, mask).isfinite().all())


def test_references_are_in_the_models_range_and_have_one_mask():
    model = EpsModel(zero, VPSDE(), data_range=(-1, 1))
    x0, objective = torch.zeros(4, 3), ScoreMatching(target=StableTarget())
    with pytest.raises(ValueError, match="reference: expected data within the model's range"):
        objective(model, x0, reference=255 * torch.rand(8, 3))
    with pytest.raises(ValueError, match=r"mask: expected one mask for all samples, \(1, \*D\)"):
        objective(model, x0, reference=torch.zeros(8, 3), mask=torch.ones(4, 3))


def test_infinite_weights_of_times_raise():
    class Times(UniformTimes):
        def sample(self, *args, **kwargs):
            t, weight = super().sample(*args, **kwargs)
            return t, weight / 0

    with pytest.raises(ValueError, match="times: expected finite weights"):
        ScoreMatching(times=Times())(GAUSSIAN, torch.zeros(2, 3))


@pytest.mark.parametrize("d", [3, 20])  # scored by differences, and by products
def test_stable_targets_with_a_mask_are_those_of_the_kept_elements(d):
    """Land and sea: the posterior mean and the loss are those of data without the land."""
    sea = torch.rand(1, 2 * d, generator=seeded(4)).argsort(1) < d
    data = torch.randn(32, 2 * d, generator=seeded(5), dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9])
    model = EpsModel(lambda x, noise_label: 0.3 * x, VPSDE(), data_range=(-6.0, 6.0))
    objective = ScoreMatching(target=StableTarget())
    noise = torch.randn(4, 2 * d, generator=seeded(6), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: noise)
        land = data.masked_fill(~sea, float("nan"))
        got = objective(model, land[:4], reference=land, mask=sea, t=t)
        patch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: noise[:, sea[0]])
        right = objective(model, data[:4, sea[0]], reference=data[:, sea[0]], t=t)
    torch.testing.assert_close(got, right)


def test_losses_are_linear_in_weights_and_gradients_ignore_what_is_masked():
    draw = seeded(7)
    x0 = torch.randn(6, 2, 5, generator=draw)
    masks = [torch.rand(6, 2, 5, generator=draw) + 0.1 for _ in range(2)]
    sums = [
        ScoreMatching()(GAUSSIAN, x0, mask=m, generator=seeded(1)) * m.sum((1, 2))
        for m in (*masks, masks[0] + 3 * masks[1])
    ]
    torch.testing.assert_close(sums[0] + 3 * sums[1], sums[2])

    keep = torch.rand(6, 2, 5, generator=draw) < 0.6
    keep[:, 0, 0] = True
    gradients = []
    for padding in (float("nan"), float("inf"), 0.0):
        scale = torch.tensor(0.3, requires_grad=True)
        model = EpsModel(lambda x, noise_label, scale=scale: scale * x, VPSDE())
        noisy = x0.masked_fill(~keep, padding).requires_grad_()
        ScoreMatching()(model, noisy, mask=keep, generator=seeded(1)).mean().backward()
        gradients.append((scale.grad, noisy.grad))
    for scale, data in gradients:
        assert torch.equal(scale, gradients[-1][0])
        assert torch.equal(data, gradients[-1][1])
        assert bool((data[~keep] == 0).all())


def test_predictions_under_the_mask_may_be_nan():
    """Attention whose keys are all masked returns NaN there, which is no part of the loss."""
    keep = torch.tensor([[True, True, False]])
    model = EpsModel(lambda x, noise_label: torch.where(keep, 0.3 * x, float("nan")), VPSDE())
    loss = ScoreMatching()(model, torch.randn(4, 3, generator=seeded(2)), mask=keep)
    assert bool(loss.isfinite().all())


def test_given_noise_and_a_mask_give_the_loss_of_the_shorter_samples():
    """Pairs of reflow, padded: the noise of the padding has no part."""
    draw, t = seeded(8), torch.full((4,), 0.4)
    x0, eps = torch.randn(2, 4, 6, generator=draw)
    keep = torch.arange(6).expand(4, 6) < 3
    model = VModel(lambda x, noise_label: 0.3 * x, VPSDE())
    padded = x0.masked_fill(~keep, float("nan"))
    got = ScoreMatching()(model, padded, mask=keep, eps=eps, t=t)
    torch.testing.assert_close(got, ScoreMatching()(model, x0[:, :3], eps=eps[:, :3], t=t))
