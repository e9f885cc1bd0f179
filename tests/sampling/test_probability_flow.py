import pytest
import torch
from support import f64, seeded
from support.flow_values import AT_SIGMA_MIN, Z, line_mixture

from diffusionkit import (
    DDIM,
    EDMSDE,
    VPSDE,
    Ancestral,
    EpsModel,
    ForwardSDE,
    GaussianMixtureModel,
    LogSNRGrid,
    PCSampler,
    ProbabilityFlow,
    SubVPSDE,
)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_decode_preserves_quantiles(tolerance):
    flow = ProbabilityFlow(line_mixture(EDMSDE()), rtol=tolerance, atol=tolerance)
    error = (flow.decode(80 * Z).flatten() - AT_SIGMA_MIN).abs().max()
    assert float(error) < 20 * tolerance


def test_encode_inverts_decode(mixture):
    flow = ProbabilityFlow(mixture, rtol=1e-6, atol=1e-6)
    x = mixture.sample(20, generator=seeded(), dtype=torch.float64)
    z = flow.encode(x)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-3)
    # The latent code has about the scale of the prior.
    assert 0.3 < float(z.std()) / mixture.sde.prior_std < 3


def test_encoding_a_gaussian_in_closed_form(sde):
    """x_T = alpha m + (x - m_s) S_T / S_s, with S^2 = alpha^2 s^2 + sigma^2 at each end."""
    model = GaussianMixtureModel(sde, [[0.7]], [0.4])
    ends = torch.tensor([sde.t_min, sde.T], dtype=torch.float64)
    alpha, sigma = sde.marginal(ends)
    total = ((0.4 * alpha) ** 2 + sigma**2).sqrt()
    x = f64(-0.5, 0.7, 2.0).unsqueeze(1)
    expected = alpha[1] * 0.7 + (x - alpha[0] * 0.7) * total[1] / total[0]
    flow = ProbabilityFlow(model, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.encode(x), expected, rtol=1e-4, atol=1e-4)


def test_samples_the_mixture(mixture):
    x = ProbabilityFlow(mixture).sample((2000, 2), generator=seeded())
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=0.041)
    for rows, mean, std in ((right, [1.0, 0.5], 0.3), (~right, [-1.0, 0.0], 0.2)):
        error = 4 * std / int(rows.sum()) ** 0.5 + 0.002
        torch.testing.assert_close(x[rows].mean(0), torch.tensor(mean), rtol=0, atol=error)
        assert float(x[rows].std(0).mean()) == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4"])
def test_evaluations_are_counted(method):
    calls = 0

    def network(x, noise_label):
        nonlocal calls
        calls += 1
        return torch.tanh(x)

    options = {"step_size": 0.5} if method == "rk4" else None
    flow = ProbabilityFlow(EpsModel(network, VPSDE()), method, options=options)
    flow.decode(torch.ones(2, 3))
    assert flow.nfe == calls
    calls = 0
    flow.sample((2, 3))
    assert flow.nfe == calls


def test_sample_is_denoised_and_decode_is_not(mixture):
    z = mixture.sde.prior_sample((4, 2), generator=seeded())
    t_end = 0.3 * mixture.sde.T
    flow = ProbabilityFlow(mixture, t_end=t_end)
    decoded = flow.decode(z)
    expected = mixture.predict(decoded, torch.full((4,), t_end)).x0
    torch.testing.assert_close(flow.sample(z), expected)
    torch.testing.assert_close(
        ProbabilityFlow(mixture, t_end=t_end, denoise=False).sample(z), decoded
    )


def test_encoding_from_t_min_does_not_overshoot_T():
    """At t = 1e-5 sub-VP hardly changes in log sigma; torchdiffeq's first step is too long."""
    model = GaussianMixtureModel(SubVPSDE(), [[-1.0], [1.0]], [0.2, 0.2])
    assert torch.isfinite(ProbabilityFlow(model).encode(torch.tensor([[0.9]]))).all()


def test_conditions_reach_the_model():
    model = EpsModel(lambda x, noise_label, shift: x * 0 + shift, VPSDE())
    flow = ProbabilityFlow(model)
    z = torch.ones(1, 2)
    assert not torch.allclose(flow.decode(z, shift=0.0), flow.decode(z, shift=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, "rtol: expected a finite number > 0, got 0.0"),
        ({"t_end": 0.0}, r"t_end: expected a time in \(0, T\)"),
        ({"t_end": 2.0}, r"t_end: expected a time in \(0, T\)"),
    ],
)
def test_invalid_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ProbabilityFlow(EpsModel(lambda x, noise_label: x, VPSDE()), **options)


FIXED = {
    "euler": 0.5,
    "midpoint": 0.05,
    "heun2": 0.05,
    "heun3": 0.01,
    "rk4": 0.01,
    "implicit_adams": 0.01,
}


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_have_a_sensible_default(method):
    flow = ProbabilityFlow(line_mixture(EDMSDE()), method)
    error = (flow.decode(80 * Z).flatten() - AT_SIGMA_MIN).abs().max()
    assert flow.nfe >= 100
    assert float(error) < FIXED[method]


def test_a_learned_schedule_can_be_sampled():
    class Learned(torch.nn.Module, ForwardSDE):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

        def marginal(self, t):
            return torch.exp(-self.rate * t), torch.sqrt(-torch.expm1(-2 * self.rate * t))

    sde = Learned()
    model = GaussianMixtureModel(sde, [[0.0]], [0.5])
    assert sde.prior_std == pytest.approx(1.0, rel=1e-3)
    for sampler in (
        ProbabilityFlow(model).sample,
        PCSampler(model, DDIM(), steps=200, grid=LogSNRGrid()),
    ):
        x = sampler((2000, 1), generator=seeded())
        assert not x.requires_grad
        assert float(x.std()) == pytest.approx(0.5, rel=0.06)


def test_a_noise_model_without_signal_at_T_raises():
    class Straight(ForwardSDE):
        def marginal(self, t):
            return 1 - t, t

    sampler = PCSampler(EpsModel(lambda x, noise_label: x, Straight()), Ancestral(), steps=5)
    with pytest.raises(ValueError, match="model: expected a prediction of x0 or of a velocity"):
        sampler((2, 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda t: (t[:0], t), "expected alpha as a tensor of the shape of t"),
        (lambda t: (torch.ones_like(t), t / 0.0), r"expected finite values, got sigma\(1\) = inf"),
    ],
)
def test_an_invalid_marginal_is_reported(values, message):
    class Wrong(ForwardSDE):
        prior_std = 1.0

        def marginal(self, t):
            return values(t)

    flow = ProbabilityFlow(EpsModel(lambda x, noise_label: x, VPSDE()))
    flow.model.sde = Wrong()
    with pytest.raises(ValueError, match=message):
        PCSampler(flow.model, Ancestral(), steps=5)
