"""The terms of a chain's bound, against tables computed with other code and closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusionkit import DDPMChain, EpsModel
from diffusionkit._chain_terms import prior_kl, step_log_variances, step_nats
from diffusionkit._gaussian import gaussian_kl, log_normal_cdf
from diffusionkit.decoders import GaussianDecoder

LN2 = math.log(2)

# x, mean, log of the scale; exact log-likelihood (40 digits), that of the tanh form.
ROWS = [
    (-1.0, -1.0, -6.0, -0.05849428929869401, -0.05862264931098335),
    (-1.0, -0.2, -6.0, -51578.87235614245, -27.631021115928547),
    (-1.0, -0.2, -2.0, -20.018481868566983, -23.909789942628787),
    (-1.0, 0.9, -6.0, -292568.52595831756, -27.631021115928547),
    (-1.0, 1.0, -6.0, -324241.9362731584, -27.631021115928547),
    (-1.0, 1.0, -2.0, -112.3831673608805, -27.631021115928547),
    (-0.9921568627450981, -0.2, -6.0, -50567.667749640175, -27.631021115928547),
    (-0.9921568627450981, 0.0, -2.0, -30.63221931855212, -27.631021115928547),
    (-0.9921568627450981, 0.9, -6.0, -290153.16812283156, -27.631021115928547),
    (-0.9921568627450981, 1.0, -6.0, -321698.92782894184, -27.631021115928547),
    (-0.0039215686274509665, -1.0, -2.0, -30.84501085039101, -27.631021115928547),
    (-0.0039215686274509665, -0.2, -6.0, -3010.0697707833356, -27.631021115928547),
    (-0.0039215686274509665, 0.0, -6.0, -0.6947037714259012, -0.6944852283279843),
    (-0.0039215686274509665, 0.9, -2.0, -26.066330353973733, -27.631021115928547),
    (0.0039215686274509665, -1.0, -6.0, -81384.31465417928, -27.631021115928547),
    (0.0039215686274509665, -0.2, -2.0, -4.902082066169761, -4.9000282951460585),
    (0.0039215686274509665, 0.0, -2.0, -3.7676145382129187, -3.7676173039081804),
    (0.0039215686274509665, 0.9, -6.0, -64778.6439208336, -27.631021115928547),
    (0.0039215686274509665, 1.0, -2.0, -30.84501085039101, -27.631021115928547),
    (0.9921568627450981, -0.2, -6.0, -114904.08983880676, -27.631021115928547),
    (0.9921568627450981, 0.0, -2.0, -30.63221931855212, -27.631021115928547),
    (0.9921568627450981, 1.0, -6.0, -2.8679489700745155, -2.8658066726625995),
    (1.0, -1.0, -6.0, -324241.9362731584, -27.631021115928547),
    (1.0, -1.0, -2.0, -112.3831673608805, -27.631021115928547),
    (1.0, 0.0, -6.0, -80747.30811954959, -27.631021115928547),
    (1.0, 0.9, -6.0, -755.777039894813, -27.631021115928547),
    (1.0, 0.9, -2.0, -1.4318186108278363, -1.43147729937292),
]


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_exact_likelihoods(dtype, rtol) -> None:
    x, mean, log_scale, exact, _ = torch.tensor(ROWS, dtype=torch.float64).to(dtype).T
    got = GaussianDecoder().log_prob(x, mean, 2 * log_scale)
    torch.testing.assert_close(got, exact, rtol=rtol, atol=rtol)


def test_likelihoods_of_the_tanh_form() -> None:
    x, mean, log_scale, _, tanh = torch.tensor(ROWS, dtype=torch.float64).T
    got = GaussianDecoder(cdf="tanh").log_prob(x, mean, 2 * log_scale)
    torch.testing.assert_close(got, tanh, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("parts", [(256, -1.0, 1.0), (2, -1.0, 1.0), (17, 0.0, 3.0)])
@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 0.5])
def test_levels_share_out_all_probability(cdf, parts, log_scale) -> None:
    decoder = GaussianDecoder(*parts, cdf=cdf)
    x = decoder.encode(torch.arange(parts[0]), dtype=torch.float64)
    assert x[0] == parts[1]
    assert x[-1] == pytest.approx(parts[2], abs=1e-14)
    for mean in (0.1, -0.95, 1.2):
        total = decoder.log_prob(x, f64(mean), f64(2 * log_scale)).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-9)


def test_levels_of_images_of_eight_bits() -> None:
    images = torch.tensor([[0, 1, 100, 255]], dtype=torch.uint8)
    expected = f64(0.0, 1.0, 100.0, 255.0) / 127.5 - 1
    got = GaussianDecoder().encode(images, dtype=torch.float64)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("log_scale", [-10.0, -6.0, -3.0, -1.0, 0.0, 0.5, 1.0, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("mean", [-40.0, -1.3, -0.2, 0.0039, 0.0, 0.5, 1.0, 30.0])
def test_single_precision_follows_double(mean, log_scale) -> None:
    """Wherever double precision has digits to spare: narrow bins, wide bins, both tails."""
    x = GaussianDecoder().encode(torch.tensor([1, 127, 200, 254]), dtype=torch.float64).float()
    many = [c.double() for c in (x, torch.tensor(mean), torch.tensor(2 * log_scale))]
    want, got = (GaussianDecoder().log_prob(*parts) for parts in (many, [c.float() for c in many]))
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("z", [-3e4, -300.0, -8.0, -1.0, 0.0, 2.0, 12.0])
def test_log_normal_cdf_and_its_slope(z, dtype) -> None:
    """Values and hazards of the normal law, by its asymptotic series far out."""
    at = torch.tensor(z, dtype=dtype, requires_grad=True)
    value = log_normal_cdf(at)
    (slope,) = torch.autograd.grad(value, at)
    if z < -20:
        series = 1 - z**-2 + 3 * z**-4
        log_phi = -0.5 * z * z - 0.5 * math.log(2 * math.pi) - math.log(-z) + math.log(series)
        hazard = -z / series
    else:
        log_phi = math.log(0.5 * math.erfc(-z / math.sqrt(2)))
        if z > 8:
            log_phi = -0.5 * math.erfc(z / math.sqrt(2))
        hazard = math.exp(-0.5 * z * z - log_phi) / math.sqrt(2 * math.pi)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    assert float(value.detach()) == pytest.approx(log_phi, rel=rtol, abs=1e-37)
    assert float(slope) == pytest.approx(hazard, rel=rtol, abs=1e-37)


@pytest.mark.parametrize("log_scale", [-14.0, -6.0, -2.0, 1.0, 30.0])
def test_gradients_are_finite_and_point_home(log_scale) -> None:
    """In float32, in both tails, at the open ends, and where a bin holds next to nothing."""
    x = GaussianDecoder().encode(torch.tensor([0, 1, 127, 254, 255]))
    mean = torch.tensor([0.5, 1.0, -0.7, -1.0, 0.1], requires_grad=True)
    log_var = torch.full((5,), 2 * log_scale, requires_grad=True)
    ll = GaussianDecoder().log_prob(x, mean, log_var)
    assert bool(torch.isfinite(ll).all())
    of_mean, of_log_var = torch.autograd.grad(ll.sum(), [mean, log_var])
    assert bool(torch.isfinite(of_log_var).all())
    assert torch.equal(torch.sign(of_mean), torch.sign(x - mean))
    if log_scale == 30.0:  # of a bin far narrower than the scale, log s less: -1/2
        torch.testing.assert_close(of_log_var[1:4], torch.full((3,), -0.5))
    if log_scale == -6.0:  # the nearer edge pulls
        edge = (x[1] + 1 / 255 - mean[1].detach()) * math.exp(-2 * log_scale)
        assert float(of_mean[1]) == pytest.approx(float(edge), rel=1e-3)


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ({"levels": 1}, ValueError, "levels: expected an integer >= 2, got 1"),
        ({"low": 1.0}, ValueError, "expected finite low < high, got 1.0 and 1.0"),
        ({"cdf": "erf"}, ValueError, 'cdf: expected "exact" or "tanh", got \'erf\''),
    ],
)
def test_bad_decoders(parts, error, match) -> None:
    with pytest.raises(error, match=match):
        GaussianDecoder(**parts)


def test_data_between_levels() -> None:
    decoder = GaussianDecoder()
    decoder.check(decoder.encode(torch.arange(256)))
    for bad in (0.0, 1.01, -1.004):
        with pytest.raises(ValueError, match="expected data on 256 levels from -1 to 1"):
            decoder.check(torch.tensor([[1.0, bad]]))


def test_divergence_of_gaussians() -> None:
    torch.manual_seed(0)
    m1, m2, lv1, lv2 = torch.randn(4, 50).double()
    want = kl_divergence(Normal(m1, (0.5 * lv1).exp()), Normal(m2, (0.5 * lv2).exp()))
    torch.testing.assert_close(gaussian_kl(m1 - m2, lv1, lv2), want, rtol=1e-12, atol=1e-14)
    near = gaussian_kl(f64(0.0), f64(1e-6), f64(0.0))  # delta^2 / 4
    assert float(near) == pytest.approx(2.5e-13, rel=1e-3)


# Steps; log of the posterior's variance (the first replaced) and of beta.
VARIANCES = {
    "linear": (
        DDPMChain.linear(1000),
        [0, 1, 2, 500, 999],
        [-9.81672513529567, -9.81672513529567, -9.36712149736664, -4.600049739984908,
         -3.912023829100455],
        [-9.210340371976182, -9.028686371949341, -8.875012791367775, -4.5991920944417295,
         -3.912023005428146],
    ),
    "cosine": (
        DDPMChain.cosine(4000),
        [0, 1, 2, 2000, 3999],
        [-12.204537145969704, -12.204537145969704, -11.88720820365687, -7.145595369398858,
         -0.001000651979843922],
        [-11.526434420040466, -11.49612588305962, -11.466708709149307, -7.144825921683327,
         -0.0010005003335835344],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANCES)
def test_variances_of_steps(case) -> None:
    chain, steps, posterior, forward = VARIANCES[case]
    i = f64(*steps)
    got = step_log_variances(chain, i / chain.steps, (i + 1) / chain.steps)
    for one, want in zip(got, (posterior, forward), strict=True):
        torch.testing.assert_close(one, f64(*want), rtol=1e-11, atol=1e-13)


X0 = [-1.0, 1.0, -0.21568627450980393, -0.8666666666666667]
PRIORS = [
    (DDPMChain.linear(1000), 2.0362001193722305e-05, 1e-8),
    (DDPMChain.linear(4000), 2.142569782761833e-05, 1e-8),
    (DDPMChain.cosine(1000), 1.225352175072345e-09, 1e-5),
    (DDPMChain.cosine(4000), 7.658456905999707e-11, 1e-5),
]


@pytest.mark.parametrize(("chain", "bits", "rtol"), PRIORS, ids=str)
def test_divergence_from_the_prior(chain, bits, rtol) -> None:
    got = prior_kl(chain, f64(*X0).unsqueeze(0)) / (4 * LN2)
    assert float(got) == pytest.approx(bits, rel=rtol)


EPS, HAT, V = [0.3, -1.1, 0.8, 0.05], [0.1, -0.9, 0.9, 0.2], [-0.8, 0.1, 0.9, 0.4]
# Schedule, step, kind of variance, whether x0 is clipped: bits per dimension, with tanh.
TERMS = [
    ("linear", 0, "fixed_small", False, 1.0279503477921128),
    ("linear", 0, "learned_range", True, 1.203190268440343),
    ("linear", 1, "fixed_large", False, 0.18618950352274247),
    ("linear", 500, "fixed_small", True, 0.0001819857920371064),
    ("linear", 500, "learned_range", False, 0.00022377935313038467),
    ("linear", 999, "fixed_large", True, 1.2823732709883962e-06),
    ("cosine", 0, "learned_range", False, 0.22373223833836398),
    ("cosine", 1, "fixed_large", True, 0.15517121603701853),
    ("cosine", 2000, "learned_range", True, 3.0270332215704253e-05),
    ("cosine", 3999, "fixed_large", False, 20.267611116565114),
    ("cosine", 3999, "fixed_large", True, 2.3608818166365784e-07),
]


@pytest.mark.parametrize(("schedule", "step", "variance", "clip", "bits"), TERMS)
def test_terms(schedule, step, variance, clip, bits) -> None:
    chain = VARIANCES[schedule][0]
    output = HAT + V if variance.startswith("learned") else HAT
    model = EpsModel(lambda x, noise_label: f64(*output).unsqueeze(0), chain, variance=variance)
    t = f64((step + 1) / chain.steps)
    alpha, sigma = chain.marginal(t)
    x0 = f64(*X0).unsqueeze(0)
    prediction = model.predict(alpha * x0 + sigma * f64(*EPS), t)
    decoder = GaussianDecoder(cdf="tanh")
    got = step_nats(model, prediction, x0, torch.tensor([step]), decoder, clip=clip) / (4 * LN2)
    assert float(got) == pytest.approx(bits, rel=1e-9)


def test_a_learned_log_variance_is_taken_as_it_is() -> None:
    """One that names the posterior's own costs what "fixed_small" costs."""
    chain, x0 = DDPMChain.linear(1000), f64(*X0).unsqueeze(0)
    for step, log_var in ((0, -9.81672513529567), (500, -4.600049739984908)):
        t = f64((step + 1) / 1000)
        wide = torch.cat([f64(*HAT), torch.full((4,), log_var).double()]).unsqueeze(0)
        learned = EpsModel(lambda x, noise_label, out=wide: out, chain, variance="learned")
        fixed = EpsModel(
            lambda x, noise_label: f64(*HAT).unsqueeze(0), chain, variance="fixed_small"
        )
        got, want = (
            step_nats(m, m.predict(x0, t), x0, torch.tensor([step]), GaussianDecoder())
            for m in (learned, fixed)
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_the_fixed_large_variance_of_the_first_step_is_the_small_one() -> None:
    x0, t = f64(*X0).unsqueeze(0), f64(0.1, 0.2)
    chain = DDPMChain.cosine(10)
    small, large = (
        EpsModel(lambda x, noise_label: f64(*HAT).expand_as(x), chain, variance=v)
        for v in ("fixed_small", "fixed_large")
    )
    costs = [
        step_nats(m, m.predict(x, t), x, torch.tensor([0, 1]), GaussianDecoder())
        for m in (small, large)
        for x in [x0.expand(2, -1)]
    ]
    assert costs[0][0] == costs[1][0]
    assert costs[0][1] != costs[1][1]
