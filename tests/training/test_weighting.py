"""Weights of the noise-prediction error, against values computed with 40 digits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    EDMModel,
    EDMWeighting,
    LikelihoodWeighting,
    MinSNRWeighting,
    ScoreMatching,
    SimpleWeighting,
    SubVPSDE,
    X0Model,
)

SDES = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(), "edm": EDMSDE()}

# (process, t): g^2 / sigma^2, EDM's weight with sigma_data = 1/2, and min(snr, 5) / snr.
REFERENCE = {
    ("vp", 0.001): (1090.5556309530631, 1.0004398241788911, 0.0005497802236139353),
    ("vp", 0.3): (10.055215939318938, 7.0925180390976204, 1.0),
    ("vp", 0.8): (16.045410898641133, 2522.7526111521324, 1.0),
    ("subvp", 0.001): (2180.9913619061261, 1.00000004835601, 6.0445012560893326e-08),
    ("subvp", 0.3): (14.040431878637877, 4.6778508507921113, 1.0),
    ("subvp", 0.8): (16.070821797282267, 2518.7589458976373, 1.0),
    ("ve", 0.001): (17.034386382832475, 1.00040687211955, 0.00050859014943752278),
    ("ve", 0.3): (17.034386382832475, 1.0662890803467997, 0.08286135043349967),
    ("ve", 0.8): (17.034386382832475, 332.44540173399868, 1.0),
    ("edm", 0.02): (100.0, 1.0016, 0.002),
    ("edm", 0.3): (6.6666666666666667, 1.36, 0.45),
    ("edm", 7.0): (0.28571428571428571, 197.0, 1.0),
}


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"{case[0]}-{case[1]}")
def test_weights_against_40_digits(case: tuple[str, float]) -> None:
    name, time = case
    t = torch.tensor([time], dtype=torch.float64)
    weightings = (LikelihoodWeighting(), EDMWeighting(sigma_data=0.5), MinSNRWeighting(gamma=5.0))
    got = [float(weighting(SDES[name], t)) for weighting in weightings]
    assert got == pytest.approx(REFERENCE[case], rel=1e-12)
    assert float(SimpleWeighting()(SDES[name], t)) == 1.0


@given(
    u=st.floats(0.0, 1.0),
    name=st.sampled_from(sorted(SDES)),
    weighting=st.sampled_from(
        [SimpleWeighting(), LikelihoodWeighting(), EDMWeighting(), MinSNRWeighting()]
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_weights_are_positive_and_finite_in_the_dtype_of_t(u, name, weighting, dtype) -> None:
    sde = SDES[name]
    t = torch.tensor([sde.t_min + u * (sde.T - sde.t_min)] * 3, dtype=dtype).clamp(max=sde.T)
    weight = weighting(sde, t)
    assert weight.shape == (3,)
    assert weight.dtype == dtype
    assert bool(torch.isfinite(weight).all() and (weight > 0).all())


def test_weights_of_float32_times_are_rounded_once() -> None:
    for sde in SDES.values():
        t = (sde.t_min + (sde.T - sde.t_min) * torch.linspace(0, 1, 50)).clamp(max=sde.T)
        for weighting in (LikelihoodWeighting(), EDMWeighting(), MinSNRWeighting()):
            assert torch.equal(weighting(sde, t), weighting(sde, t.double()).float())


def test_the_likelihood_weight_is_constant_for_ve() -> None:
    weight = LikelihoodWeighting()(VESDE(0.1, 1.0), torch.linspace(0, 1, 9, dtype=torch.float64))
    torch.testing.assert_close(weight, torch.full_like(weight, 4.6051701859880914))  # 2 ln 10


def test_the_likelihood_weight_of_the_score_is_g_squared() -> None:
    """The paper's lambda(t) = g^2 multiplies the error of the score, eps error / sigma."""
    vp, t = VPSDE(), torch.tensor([0.5], dtype=torch.float64)
    _, sigma = vp.marginal(t)
    on_score = float(LikelihoodWeighting()(vp, t) * sigma**2)
    assert on_score == pytest.approx(10.05, rel=1e-12)  # beta(1/2)
    ve = VESDE(0.01, 50.0)
    _, sigma = ve.marginal(t)
    on_score = float(LikelihoodWeighting()(ve, t) * sigma**2)
    assert on_score == pytest.approx(8.517193191416238, rel=1e-12)


def test_the_edm_weight_of_the_data_is_that_of_the_paper() -> None:
    """lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 at sigma = 2, sd = 1/2 is 17/4."""
    t = torch.tensor([2.0], dtype=torch.float64)
    weight = EDMWeighting(sigma_data=0.5)(EDMSDE(), t)
    assert float(weight) / 2.0**2 == pytest.approx(4.25, rel=1e-14)


def test_the_edm_weight_of_the_network_is_one(monkeypatch) -> None:
    """The loss is the squared error of the network against EDM's target, at any noise level."""
    sd, d = 0.7, 6
    sigma = torch.tensor([[0.01], [0.7], [30.0]], dtype=torch.float64)
    g = seeded()
    x0, eps = torch.randn(2, 3, d, generator=g, dtype=torch.float64)
    output = torch.randn(3, d, generator=g, dtype=torch.float64)
    monkeypatch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: eps)
    model = EDMModel(lambda x, noise_label: output, EDMSDE(), sigma_data=sd)
    loss = ScoreMatching(EDMWeighting(sigma_data=sd))(model, x0, t=sigma[:, 0])
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    wanted = (x0 - c_skip * (x0 + sigma * eps)) / c_out
    torch.testing.assert_close(loss, (output - wanted).square().mean(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SDES)
def test_edm_has_unit_loss_at_every_noise_level(name) -> None:
    """For a network that returns 0 and data of standard deviation sigma_data, E loss = 1.

    The network's input has variance 1 too.
    """
    sde, n, sd, inputs = SDES[name], 200_000, 0.5, []

    def network(x, label):
        inputs.append(x)
        return torch.zeros_like(x)

    model = EDMModel(network, sde, sigma_data=sd)
    g = seeded(1)
    x0 = sd * torch.randn(3, n, generator=g, dtype=torch.float64)
    t = sde.t_min + (sde.T - sde.t_min) * torch.tensor([0.003, 0.2, 0.9], dtype=torch.float64)
    loss = ScoreMatching(EDMWeighting(sigma_data=sd))(model, x0, t=t, generator=g)
    standard_error = (2 / n) ** 0.5  # of the mean of n squares of standard normal numbers
    assert float((loss - 1).abs().max()) < 4 * standard_error
    assert float((inputs[0].square().mean(1) - 1).abs().max()) < 4 * standard_error


def test_min_snr_caps_the_weight_of_the_data() -> None:
    """The weight of the squared error of x0 is min(snr, gamma)."""
    sde, x0 = EDMSDE(), torch.zeros(3, 1, dtype=torch.float64)
    model = X0Model(lambda x, noise_label: torch.ones_like(x), sde)
    t = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)  # snr = 100, 4, 1/4
    loss = ScoreMatching(MinSNRWeighting(gamma=5.0))(model, x0, t=t)
    assert loss.tolist() == pytest.approx([5.0, 4.0, 0.25], rel=1e-12)
    loss = ScoreMatching(MinSNRWeighting(gamma=3.0))(model, x0, t=t)
    assert loss.tolist() == pytest.approx([3.0, 3.0, 0.25], rel=1e-12)
