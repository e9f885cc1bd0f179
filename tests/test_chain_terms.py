"""The terms of a chain's variational bound, against independently computed values."""

import math

import pytest
import torch
from support import f64

from diffusionkit import DDPMChain, EpsModel
from diffusionkit._chain_terms import prior_kl, step_log_variances, step_nats
from diffusionkit.decoders import GaussianDecoder

LN2 = math.log(2)

# Steps; logarithms of the posterior variance (the first one replaced) and of beta.
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
def test_step_variances_match_independent_values(case) -> None:
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
def test_prior_kl_matches_independent_values(chain, bits, rtol) -> None:
    got = prior_kl(chain, f64(X0)) / (4 * LN2)
    assert float(got) == pytest.approx(bits, rel=rtol)


EPS, HAT, V = [0.3, -1.1, 0.8, 0.05], [0.1, -0.9, 0.9, 0.2], [-0.8, 0.1, 0.9, 0.4]

# Schedule, step, variance, whether x0 is clipped; bits per dimension with the tanh decoder.
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
def test_bound_terms_match_independent_values(schedule, step, variance, clip, bits) -> None:
    chain = VARIANCES[schedule][0]
    output = HAT + V if variance.startswith("learned") else HAT
    model = EpsModel(lambda x, noise_label: f64(output), chain, variance=variance)
    t = f64((step + 1) / chain.steps)
    alpha, sigma = chain.marginal(t)
    x0 = f64(X0)
    prediction = model.predict(alpha * x0 + sigma * f64(*EPS), t)
    decoder = GaussianDecoder(cdf="tanh")
    got = step_nats(model, prediction, x0, torch.tensor([step]), decoder, clip=clip) / (4 * LN2)
    assert float(got) == pytest.approx(bits, rel=1e-9)


def test_a_learned_log_variance_is_used_unchanged() -> None:
    """The posterior's log-variance gives the same term as "fixed_small"."""
    chain, x0 = DDPMChain.linear(1000), f64(X0)
    for step, log_var in ((0, -9.81672513529567), (500, -4.600049739984908)):
        t = f64((step + 1) / 1000)
        wide = f64([*HAT, *[log_var] * 4])
        learned = EpsModel(lambda x, noise_label, out=wide: out, chain, variance="learned")
        fixed = EpsModel(lambda x, noise_label: f64(HAT), chain, variance="fixed_small")
        got, want = (
            step_nats(m, m.predict(x0, t), x0, torch.tensor([step]), GaussianDecoder())
            for m in (learned, fixed)
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_fixed_large_uses_the_small_variance_in_step_zero() -> None:
    x0, t = f64(X0), f64(0.1, 0.2)
    chain = DDPMChain.cosine(10)
    small, large = (
        EpsModel(lambda x, noise_label: f64(HAT).expand_as(x), chain, variance=v)
        for v in ("fixed_small", "fixed_large")
    )
    terms = [
        step_nats(m, m.predict(x, t), x, torch.tensor([0, 1]), GaussianDecoder())
        for m in (small, large)
        for x in [x0.expand(2, -1)]
    ]
    assert terms[0][0] == terms[1][0]
    assert terms[0][1] != terms[1][1]
