"""Importance-sampled times, and objectives in nats."""

import math

import pytest
import torch

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EpsModel,
    ForwardSDE,
    GaussianMixtureModel,
    ImportanceTimes,
    LikelihoodWeighting,
    LogNormalTimes,
    ScoreMatching,
    StableTarget,
    StratifiedTimes,
    SubVPSDE,
    UniformTimes,
)

# 40-digit values: Z, and the times below which a tenth and a half of the law lie.
REFERENCE = [
    (VPSDE(), 23.864472365469528, 0.00010770140347459272, 0.11442144872953759),
    (VPSDE(t_min=5e-5), 22.251064280830285, 0.0004452868882902662, 0.1667941416784567),
    (VPSDE(t_min=1e-2), 16.26607037612435, 0.02723929951599541, 0.4493643128129915),
    (SubVPSDE(), 37.67894573193406, 6.543369468483156e-05, 0.030550228368014506),
    (SubVPSDE(t_min=5e-5), 34.45213358653557, 0.0002738842516292164, 0.04792961945723497),
    (SubVPSDE(t_min=1e-2), 22.484135752248697, 0.020319549378567187, 0.22890112358890474),
    (VESDE(), 17.034216038968648, 0.100009, 0.500005),
    (VESDE(t_min=1e-2), 16.86404251900415, 0.109, 0.505),
]


class Polynomial(ForwardSDE):
    """A user's own process: only alpha and sigma are known."""

    t_min = 1e-3

    def marginal(self, t):
        return torch.cos(1.5 * t), torch.sin(1.5 * t) ** 2 + 0.1 * t


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("sde", "z", "tenth", "half"), REFERENCE)
def test_normaliser_and_quantiles(sde, z, tenth, half) -> None:
    law = ImportanceTimes()
    assert law.normaliser(sde) == pytest.approx(z, rel=1e-12)
    times = law.quantile(sde, torch.tensor([0.1, 0.5], dtype=torch.float64))
    assert times.tolist() == pytest.approx([tenth, half], rel=1e-10)
    ends = law.quantile(sde, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([sde.t_min, sde.T], rel=1e-9)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), Polynomial()])
def test_the_log_snr_is_uniform(sde, stratified) -> None:
    n = 4000
    t, _ = ImportanceTimes(stratified=stratified).sample(sde, n, generator=seeded())
    ends = sde.log_snr(torch.tensor([sde.T, sde.t_min], dtype=torch.float64))
    u = ((sde.log_snr(t) - ends[0]) / (ends[1] - ends[0])).sort().values
    gap = float((u - torch.arange(n, dtype=u.dtype) / n).abs().max())
    assert gap < (1.5 / n if stratified else 1.63 / math.sqrt(n))
    if not stratified:
        assert gap > 2 / n


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(t_min=1e-2), VESDE(), Polynomial()])
def test_weights_keep_the_mean_over_uniform_times(sde) -> None:
    # E[weight h] for h that vanishes where the weight is large; 1/n^2 converges for strata.
    n = 200_000
    t, weight = ImportanceTimes().sample(sde, n, generator=seeded())
    share = (t - sde.t_min) / (sde.T - sde.t_min)
    assert float((weight * share).mean()) == pytest.approx(1 / 2, abs=2e-3)
    assert float((weight * share**3).mean()) == pytest.approx(1 / 4, abs=2e-3)


def test_the_normaliser_is_the_integral_of_the_weighting() -> None:
    sde = Polynomial()
    t = torch.linspace(sde.t_min, sde.T, 200_001, dtype=torch.float64)
    integral = torch.trapezoid(LikelihoodWeighting()(sde, t), t)
    assert ImportanceTimes().normaliser(sde) == pytest.approx(float(integral), rel=1e-5)


def test_with_likelihood_weighting_all_times_weigh_the_same() -> None:
    for sde in (VPSDE(), SubVPSDE(), VESDE(), Polynomial()):
        t, weight = ImportanceTimes().sample(sde, 50, generator=seeded())
        product = weight * LikelihoodWeighting()(sde, t) * (sde.T - sde.t_min)
        z = ImportanceTimes().normaliser(sde)
        assert product.tolist() == pytest.approx([z] * 50, rel=1e-9)


def test_dtype_and_generators() -> None:
    law = ImportanceTimes(stratified=False)
    t, weight = law.sample(VPSDE(), 3, generator=[seeded(i) for i in range(3)], dtype=torch.float32)
    assert t.dtype == weight.dtype == torch.float32
    alone = law.sample(VPSDE(), 1, generator=[seeded(2)], dtype=torch.float32)[0]
    assert torch.equal(t[2:], alone)
    with pytest.raises(TypeError, match="ImportanceTimes shares one shift"):
        ImportanceTimes().sample(VPSDE(), 2, generator=[seeded(), seeded()])


def test_a_singular_start_is_named() -> None:
    with pytest.raises(ValueError, match="finite log-SNR at t_min = 0"):
        ImportanceTimes().sample(VPSDE(t_min=0.0), 4)


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
    # The sample variance's own relative error is about sqrt(kurtosis / n), below 1%.
    assert variance is None or float((2 * nats).var()) == pytest.approx(variance, rel=0.04)


def test_importance_sampling_lowers_the_variance_as_it_should() -> None:
    # Sub-VP from t = .01: 3066.4 with uniform times, 616.7 with importance: 4.97 times.
    sde, n = SubVPSDE(t_min=1e-2), 400_000
    model, variances = gaussian(sde), []
    for times in (UniformTimes(), ImportanceTimes(stratified=False)):
        g = seeded(2)
        x = torch.randn(n, 1, generator=g, dtype=torch.float64)
        nats = ScoreMatching(LikelihoodWeighting(), times=times).nats(model, x, generator=g)
        assert float(nats.mean()) == pytest.approx(6.2170914585418, abs=0.15)
        variances.append(float((2 * nats).var()))
    assert variances[0] / variances[1] == pytest.approx(4.972560813832785, rel=0.08)


def test_stratified_times_estimate_nats_too() -> None:
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


def test_nats_want_the_likelihoods_weighting_and_honest_times() -> None:
    x = torch.randn(2, 1)
    with pytest.raises(TypeError, match="expected the weighting LikelihoodWeighting"):
        ScoreMatching().nats(gaussian(VPSDE()), x)
    objective = ScoreMatching(LikelihoodWeighting(), times=LogNormalTimes())
    with pytest.raises(ValueError, match="LogNormalTimes"):
        objective.nats(gaussian(VPSDE()), x)


@pytest.mark.parametrize("make", [VPSDE, SubVPSDE, VESDE])
def test_t_min_is_checked(make) -> None:
    for bad in (-1e-3, 1.0, float("nan")):
        with pytest.raises(ValueError, match="t_min: expected a time"):
            make(t_min=bad)
    assert make(t_min=1e-2).t_min == 1e-2
    assert make(t_min=1e-2).t_stop >= 1e-2


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
    # One reference of each class is the denoising target: the noise itself.
    plain = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes(stratified=False))
    expected = plain.nats(model, data, class_labels=options["class_labels"], generator=seeded(7))
    torch.testing.assert_close(nats, expected)
