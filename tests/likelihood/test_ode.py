import contextlib
import math

import pytest
import torch
from support import seeded

from diffusionkit import VPSDE, EpsModel, ForwardSDE, GaussianMixtureModel, ProbabilityFlow
from diffusionkit.likelihood.divergence import Divergence, ExactDivergence, Hutchinson
from diffusionkit.likelihood.ode import ODELikelihood

TIGHT = {"method": "dopri8", "rtol": 1e-9, "atol": 1e-9}


def normal(x, mean, std):
    """The log-density of N(mean, std^2 I), (B,)."""
    z = ((x - mean) / std).flatten(1)
    return -0.5 * z.square().sum(1) - z.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def ends(sde):
    alpha, sigma = sde.marginal(torch.tensor([sde.t_min, sde.T], dtype=torch.float64))
    return *alpha.tolist(), *sigma.tolist()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


shapes = pytest.mark.parametrize("shape", [(1,), (3, 4, 4), (1, 2, 3, 2)])


def test_one_gaussian_in_closed_form(sde):
    check_gaussian(sde, (2, 3))


@shapes
def test_one_gaussian_of_any_shape(shape):
    check_gaussian(VPSDE(), shape)


def check_gaussian(sde, shape):
    """The flow of N(m, s^2 I) is linear: one Rademacher probe gives its divergence exactly."""
    mean, std = draw(1, *shape, seed=1), 0.4
    alpha, alpha_T, sigma, sigma_T = ends(sde)
    S, S_T = math.hypot(alpha * std, sigma), math.hypot(alpha_T * std, sigma_T)
    x = alpha * mean + S * draw(3, *shape)
    latent = alpha_T * mean + (x - alpha * mean) * S_T / S
    d = mean.numel()
    expected = normal(latent, 0.0, sde.prior_std) + d * math.log(S_T / S)
    result = ODELikelihood(GaussianMixtureModel(sde, mean, [std]), **TIGHT)(x)
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-6 * d)
    torch.testing.assert_close(result.latent, latent, rtol=1e-6, atol=1e-6)
    # This is the data density at t_min, up to the mismatch of the prior at T.
    mismatch = normal(latent, 0.0, sde.prior_std) - normal(latent, alpha_T * mean, S_T)
    exact = normal(x, alpha * mean, S) + mismatch
    torch.testing.assert_close(result.log_prob, exact, rtol=0, atol=1e-6 * d)


def test_mixtures_in_closed_form(sde):
    check_mixture(sde, (2,))


@shapes
def test_mixtures_of_any_shape(shape):
    check_mixture(VPSDE(), shape)


def check_mixture(sde, shape):
    """The flow maps p_t_min to p_T, so log p(x) - log p_t_min(x) is the mismatch at x_T."""
    model = GaussianMixtureModel(sde, 0.7 * draw(2, *shape, seed=1), [0.3, 0.4], [0.3, 0.7])
    x = model.sample(4, generator=seeded(), dtype=torch.float64)
    settings = {"method": "dopri8", "rtol": 1e-7, "atol": 1e-7}
    result = ODELikelihood(model, divergence=ExactDivergence(), **settings)(x)
    z = result.latent
    first, last = (torch.full((4,), t, dtype=torch.float64) for t in (sde.t_min, sde.T))
    expected = model.log_prob(x, first) + sde.prior_log_prob(z) - model.log_prob(z, last)
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-5 * x[0].numel())
    code = ProbabilityFlow(model, **settings).encode(x)
    torch.testing.assert_close(z, code, rtol=1e-5, atol=1e-5 * sde.prior_std)


def test_a_larger_t_min():
    """The density is p_t at t_min, as the result states."""
    sde = VPSDE()
    model = GaussianMixtureModel(sde, [[0.0, 0.0]], [0.5])
    alpha, sigma = sde.marginal(torch.tensor([0.3], dtype=torch.float64))
    x = draw(3, 2)
    result = ODELikelihood(model, t_min=0.3, **TIGHT)(x)
    expected = normal(x, 0.0, math.hypot(0.5 * float(alpha), float(sigma)))
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=2e-4)  # prior mismatch
    assert result.t == 0.3
    assert result.density == "p_t at t = 0.3 (probability-flow ODE)"
    assert torch.equal(result.nats, -result.log_prob)


def test_a_zero_prediction_leaves_the_linear_drift(sde):
    """For eps = 0, x_T = x alpha(T) / alpha(t_min), and one probe gives the divergence exactly."""
    alpha, alpha_T, _, _ = ends(sde)
    x = draw(3, 2, 2)
    model = EpsModel(lambda x, noise_label: torch.zeros_like(x), sde)
    if alpha_T == 0:
        with pytest.raises(ValueError, match=r"model: expected .*alpha = 0.*x0 or a velocity"):
            ODELikelihood(model)(x)
        return
    result = ODELikelihood(model, method="dopri8", rtol=1e-7, atol=1e-7)(x)
    growth = math.log(alpha_T / alpha)
    expected = normal(x * alpha_T / alpha, 0.0, sde.prior_std) + 4 * growth
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-5)


def test_the_error_decreases_with_the_tolerance(mixture):
    """Root mean square over samples, in nats per dimension, as in the solver."""
    x = mixture.sample(16, generator=seeded(), dtype=torch.float64)

    def run(**settings):
        return ODELikelihood(mixture, divergence=ExactDivergence(), **settings)(x).log_prob / 2

    exact = run(method="dopri8", rtol=1e-7, atol=1e-7)
    for tolerance in (1e-3, 1e-6):
        error = (run(rtol=tolerance, atol=tolerance) - exact).square().mean().sqrt()
        assert float(error) < 100 * tolerance


def test_stderr_matches_the_spread():
    """4000 estimates with 3 probes each at one point, against the exact trace."""
    model = GaussianMixtureModel(VPSDE(), [[-1.0, -1.0], [1.0, 1.0]], [0.3, 0.3])
    x = torch.tensor([[0.2, 0.4]], dtype=torch.float64)
    settings = {"rtol": 1e-4, "atol": 1e-4}
    exact = ODELikelihood(model, divergence=ExactDivergence(), **settings)(x)
    assert exact.stderr is None
    likelihood = ODELikelihood(model, divergence=Hutchinson(3), **settings)
    n = 4000
    result = likelihood(x.expand(n, -1), generator=seeded())
    spread = float(result.log_prob.std())
    assert spread > 0.05
    assert float(result.log_prob.mean() - exact.log_prob) == pytest.approx(
        0, abs=4 * spread / n**0.5 + 5e-3
    )
    # The relative error of either variance is at most about sqrt(2 / 4000) = 2.2 per cent.
    assert float(result.stderr.square().mean()) == pytest.approx(spread**2, rel=0.12)
    assert ODELikelihood(model, **settings)(x).stderr is None


def test_evaluations_are_counted():
    calls = 0

    def network(x, label):
        nonlocal calls
        calls += 1
        return torch.tanh(x)

    for divergence in (Hutchinson(3), ExactDivergence()):
        calls = 0
        result = ODELikelihood(EpsModel(network, VPSDE()), divergence=divergence)(torch.ones(2, 3))
        assert result.nfe == calls > 20


@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_other_solvers(method):
    model = GaussianMixtureModel(VPSDE(), [[0.3]], [0.5])
    x = torch.tensor([[0.1], [0.8]], dtype=torch.float64)
    found, expected = (ODELikelihood(model, **kw)(x).log_prob for kw in ({"method": method}, TIGHT))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


class Dropping(torch.nn.Module):
    """A small network in float32, with dropout, a condition and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(3, 16), torch.nn.Linear(16, 3)
        self.embedding = torch.nn.Embedding(2, 16)
        self.dropout = torch.nn.Dropout(0.5)
        self.seen = set()

    def forward(self, x, label, class_labels=None):
        self.seen |= {x.dtype, label.dtype}
        h = torch.tanh(self.first(x))
        h = h if class_labels is None else h + self.embedding(class_labels)
        return self.last(self.dropout(h))


def test_the_network_keeps_its_dtype_and_the_state_is_float64():
    network = Dropping()
    result = ODELikelihood(EpsModel(network, VPSDE()))(draw(2, 3), generator=seeded())
    assert network.seen == {torch.float32}
    assert result.log_prob.dtype == result.latent.dtype == torch.float64
    single = ODELikelihood(EpsModel(network, VPSDE()))(draw(2, 3).float(), generator=seeded())
    assert (single.log_prob.dtype, single.latent.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.log_prob, result.log_prob, rtol=0, atol=1e-3)


def test_a_learned_process_does_not_determine_the_dtype():
    class Learned(torch.nn.Module, ForwardSDE):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

        def marginal(self, t):
            return torch.exp(-self.rate * t), torch.sqrt(-torch.expm1(-2 * self.rate * t))

    seen = set()

    def network(x, label):
        seen.add(x.dtype)
        return torch.tanh(x)

    model = EpsModel(network, Learned())
    result = ODELikelihood(model)(torch.ones(2, 3))
    assert seen == {torch.float32}
    assert torch.isfinite(result.log_prob).all()
    assert not result.log_prob.requires_grad
    assert model.sde.rate.grad is None
    oracle = GaussianMixtureModel(Learned(), [[0.0]], [0.5])
    exact = ODELikelihood(oracle)(torch.tensor([[0.5]])).log_prob
    torch.testing.assert_close(exact, normal(draw(1, 1) * 0 + 0.5, 0.0, 0.5), rtol=0, atol=0.01)


def test_modes_conditions_and_gradients():
    network = Dropping()
    likelihood = ODELikelihood(EpsModel(network, VPSDE()))
    network.embedding.eval()
    x, class_labels = draw(2, 3).float(), torch.tensor([0, 1])
    plain = likelihood(x, generator=seeded(), class_labels=class_labels)
    assert network.training
    assert network.dropout.training
    assert not network.embedding.training
    assert all(p.grad is None for p in network.parameters())
    # Dropout is off, and the caller's gradient mode does not matter.
    for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with context():
            again = likelihood(x.clone(), generator=seeded(), class_labels=class_labels.clone())
        assert torch.equal(again.log_prob, plain.log_prob)
    other = likelihood(x, generator=seeded(), class_labels=1 - class_labels)
    assert not torch.allclose(other.log_prob, plain.log_prob, atol=1e-2)


def test_a_sample_does_not_depend_on_its_batch():
    mixture = GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    likelihood = ODELikelihood(mixture, rtol=1e-7, atol=1e-7)
    x = mixture.sample(3, generator=seeded(), dtype=torch.float64)
    generators = [seeded(i) for i in range(3)]
    together = likelihood(x, generator=generators).log_prob
    alone = likelihood(x[1:2], generator=[seeded(1)]).log_prob
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


def test_a_custom_divergence():
    """v = 0 for standard normal data; a constant divergence of 3 adds 3 times the angle."""

    class Known(Divergence):
        def start(self, x, generator=None):
            return 3.0

        def __call__(self, function, x, state):
            return function(x), torch.full((1, len(x)), state)

    sde = VPSDE()
    x = draw(2, 3)
    found = ODELikelihood(GaussianMixtureModel(sde, [[0.0] * 3], [1.0]), divergence=Known())(x)
    alpha, alpha_T, sigma, sigma_T = ends(sde)
    angle = math.atan2(sigma_T, alpha_T) - math.atan2(sigma, alpha)
    torch.testing.assert_close(found.log_prob, normal(x, 0.0, sde.prior_std) + 3 * angle)


def test_networks_in_distributed_data_parallel(tmp_path):
    """The wrapper would wait for other ranks; it is bypassed, and restored afterwards."""
    network = Dropping()
    x = draw(2, 3).float()
    plain = ODELikelihood(EpsModel(network, VPSDE()))(x, generator=seeded())
    code = ProbabilityFlow(EpsModel(network, VPSDE())).encode(x)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(network)
        wrapped.register_forward_pre_hook(lambda *_: pytest.fail("the wrapper was called"))
        model = EpsModel(wrapped, VPSDE())
        result = ODELikelihood(model)(x, generator=seeded())
        assert torch.equal(result.log_prob, plain.log_prob)
        assert torch.equal(ProbabilityFlow(model).encode(x), code)
        assert torch.isfinite(ProbabilityFlow(model).sample(x)).all()
        assert model.network is wrapped
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_names_the_time_of_a_prediction_that_is_not_finite(value):
    """The network fails above t = 0.5, so the error names such a time and not the end."""

    def network(x, label):
        return torch.where(label.view(-1, 1) > 0.5 * 999, value, x)

    for run in (
        ODELikelihood(EpsModel(network, VPSDE())),
        ProbabilityFlow(EpsModel(network, VPSDE())).encode,
    ):
        with pytest.raises(ValueError, match=r"NaN or infinity at t = 0\.[5-9]"):
            run(torch.ones(2, 3))


def test_a_derivative_that_is_not_finite_is_an_error():
    model = EpsModel(lambda x, noise_label: x.square().sqrt(), VPSDE())
    with pytest.raises(ValueError, match=r"expected finite predictions and derivatives.*at t = "):
        ODELikelihood(model)(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rtol": 0.0}, ValueError, "rtol: expected a finite number > 0, got 0.0"),
        ({"atol": -1.0}, ValueError, "atol: expected a finite number > 0, got -1.0"),
        ({"method": "RK45"}, ValueError, "method: expected one of .*'dopri5'.*, got 'RK45'"),
        (
            {"t_min": 0.0},
            ValueError,
            "got t = 0, where sigma = 0 and the probability flow is singular.*t_min =",
        ),
        ({"t_min": 1.0}, ValueError, r"t_min: expected a time in \[0, T\) = \[0, 1\), got 1.0"),
        ({"t_min": -0.1}, ValueError, r"t_min: expected a time in \[0, T\)"),
        ({"t_min": math.nan}, ValueError, r"t_min: expected a time in \[0, T\)"),
        ({"t_min": "0"}, TypeError, "t_min: expected a number, got str"),
        ({"divergence": "exact"}, TypeError, "divergence: expected a Divergence, got the string"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ODELikelihood(EpsModel(lambda x, noise_label: x, VPSDE()), **settings)


def test_a_network_is_not_a_model():
    with pytest.raises(TypeError, match="model: expected a ScoreModel, got Linear"):
        ODELikelihood(torch.nn.Linear(2, 2))


class Straight(ForwardSDE):
    """No signal remains at the end, where the log-SNR is -inf and the angle pi / 2."""

    def marginal(self, t):
        return 1 - t, t


def test_a_process_without_signal_at_the_end():
    """Models of the data or the velocity work, and the prior is exact. t_min = 1e-5."""
    model = GaussianMixtureModel(Straight(), [[0.4, 0.1]], [0.5])
    x = draw(3, 2)
    result = ODELikelihood(model, **TIGHT)(x)
    expected = normal(x, torch.tensor([[0.4, 0.1]]), 0.5)
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-3)
    x = ProbabilityFlow(model, **TIGHT).decode(result.latent)
    torch.testing.assert_close(x, draw(3, 2), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="model: expected a prediction of x0 or of a velocity"):
        ProbabilityFlow(EpsModel(lambda x, noise_label: x, Straight())).decode(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), TypeError, "x: expected a floating-point tensor"),
        (torch.tensor([[0.0, math.nan]]), ValueError, "x: expected finite values, got 1"),
        (torch.zeros(0, 3), ValueError, "x: expected a non-empty batch"),
        ([1.0], TypeError, "x: expected a tensor"),
    ],
)
def test_bad_data(x, error, message):
    with pytest.raises(error, match=message):
        ODELikelihood(EpsModel(lambda x, noise_label: x, VPSDE()))(x)


def test_one_generator_too_few():
    with pytest.raises(ValueError, match="one generator for each of the 2 samples, got 1"):
        ODELikelihood(EpsModel(lambda x, noise_label: x, VPSDE()))(
            torch.ones(2, 3), generator=[torch.Generator()]
        )
