"""The bound on the SDE model's likelihood: 40-digit quadrature and closed forms."""

import math
from typing import Any

import pytest
import torch
from support import seeded
from torch import Tensor

from diffusionkit import (
    EDMSDE,
    NELBO,
    VESDE,
    VPSDE,
    EpsModel,
    ExactDivergence,
    GaussianMixtureModel,
    Hutchinson,
    ODELikelihood,
    RawScoreModel,
    SubVPSDE,
)

ENTROPY = 0.5 * math.log(2 * math.pi * math.e)

# For the exact score of N(m, s^2), averages over the data of: the prior term, path + drift, the
# last step and the bound.
REFERENCE = [
    (VPSDE(), 0, 1, 1.4189385332046727, 0.0, 2.5049766392394e-13, 1.4189385332049231),
    (SubVPSDE(), 0, 1, 1.418916941262647, 2.1091911252087966e-05, 5.00496999004505e-07,
     1.4189385336708982),
    (SubVPSDE(t_min=0.01), 0, 1, 1.418916941262647, -0.0009739175825490244, 0.0009955099947602482,
     1.4189385336748583),
    (VESDE(), 0, 1, 5.331161538632819, -3.912172959421576, -5.000351671513512e-05,
     1.4189385756945276),
    (VPSDE(), 0.3, 0.5, 1.4189242819074828, -0.6931294841522812, -1.5014854860874759e-06,
     0.7257932962697157),
    (SubVPSDE(t_min=0.01), 0.3, 0.5, 1.418902689965457, -0.6940989325448447, 0.0009895400740827585,
     0.7257932974946951),
    (VPSDE(), 0, 1e-3, 1.4189169403517354, -6.560911782549891, -0.250123875218883,
     -5.392118717417039),
    (SubVPSDE(t_min=0.01), 0, 1e-3, 1.4188953484097098, -6.1059920042355325, -0.3986014242091052,
     -5.085698080034928),
    (VESDE(), 0, 1e-3, 5.330961538832819, -8.512133697473084, -0.4950503398178776,
     -3.6762224984581433),
]  # fmt: skip


def spread(m: float, s: float, n: int) -> Tensor:
    """Points m - s and m + s: the bound is quadratic in x, so it has the same mean as N(m, s^2)."""
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(n // 2)
    return (m + s * signs).unsqueeze(1)


@pytest.mark.parametrize("case", REFERENCE)
@pytest.mark.parametrize("divergence", [None, ExactDivergence(), Hutchinson()])
def test_terms_with_an_exact_score(case, divergence) -> None:
    sde, m, s, prior, path, small, total = case
    n = 20_000
    bound = NELBO(GaussianMixtureModel(sde, [[m]], [s]), samples=6, divergence=divergence)
    terms = bound(spread(m, s, n), generator=seeded())
    assert float(terms.prior.mean()) == pytest.approx(prior, rel=1e-12)
    error = float(terms.stderr.square().mean().sqrt()) / math.sqrt(n)
    assert error < 0.1
    assert abs(float((terms.path + terms.drift).mean()) - path) < 4 * error
    small_error = float(terms.smallest_time.std()) / math.sqrt(n)
    assert abs(float(terms.smallest_time.mean()) - small) < 4 * small_error + 1e-12
    assert abs(float(terms.nats.mean()) - total) < 4 * error
    parts = terms.prior + terms.path + terms.drift + terms.smallest_time
    torch.testing.assert_close(terms.nats, parts)


def test_closed_form_with_little_signal_left_at_t_min() -> None:
    """The last step, and the bound: KL(p_T || prior) + H[p_t] + E[-log p(x | x_t)] - H[x_t | x].

    At t_min = .3 of VP, log alpha is -.46 in each dimension.
    """
    m, s, d, n = 0.3, 0.5, 2, 20_000
    (alpha, square), (alpha_T, square_T) = (
        (math.exp(log_alpha), math.exp(2 * log_alpha) * s**2 - math.expm1(2 * log_alpha))
        for log_alpha in (-0.5 * (0.1 * t + 9.95 * t**2) for t in (0.3, 1.0))
    )
    last = -math.log(alpha) + 0.5 * alpha**2 * s**2 / square - 0.5
    mismatch = 0.5 * (square_T + (alpha_T * m) ** 2 - 1 - math.log(square_T))
    model = GaussianMixtureModel(VPSDE(), [[m] * d], [s])
    terms = NELBO(model, samples=6, t_min=0.3)(spread(m, s, n).expand(n, d), generator=seeded())
    error = float(terms.stderr.square().mean().sqrt()) / math.sqrt(n)
    assert error < 0.01
    assert float(terms.smallest_time.mean()) == pytest.approx(d * last, abs=4 * error)
    total = d * (last + ENTROPY + 0.5 * math.log(square) + mismatch)
    assert float(terms.nats.mean()) == pytest.approx(total, abs=4 * error)


def test_the_drift_is_exact() -> None:
    for sde, nats in ((VPSDE(), 5.0249994995025), (VESDE(), 0.0), (EDMSDE(), 0.0)):
        bound = NELBO(GaussianMixtureModel(sde, torch.zeros(1, 3), [1.0]))
        drift = bound(torch.zeros(2, 3), generator=seeded()).drift
        assert drift.tolist() == pytest.approx([3 * nats] * 2, rel=1e-12)


def test_the_prior_term_of_a_point() -> None:
    # KL(p(x_T | x) || N(0, 1)) is the prior term minus the entropy of x_T.
    for sde, x, kl in (
        (VPSDE(), 0.0, 4.662656545450391e-10),
        (VPSDE(), 1.0, 2.1593340795825196e-05),
        (SubVPSDE(), 1.0, 2.159473956594069e-05),
    ):
        terms = NELBO(GaussianMixtureModel(sde, [[0.0]], [1.0]))(
            torch.tensor([[x]], dtype=torch.float64)
        )
        sigma = sde.marginal(torch.ones(1, dtype=torch.float64))[1]
        assert float(terms.prior - ENTROPY - torch.log(sigma)) == pytest.approx(kl, rel=2e-6)


def test_a_wrong_score_separates_the_sde_from_the_ode() -> None:
    """N(0, 1) data, score -.8 x: KL_SDE = .0552 <= J_SM = .2010 < KL_ODE = .5720."""
    model = RawScoreModel(lambda x, noise_label: -0.8 * x, VPSDE())
    x, n = spread(0.0, 1.0, 40_000), 40_000
    terms = NELBO(model, samples=10)(x, generator=seeded())
    error = float(terms.stderr.square().mean().sqrt()) / math.sqrt(n)
    j_sm = float(terms.nats.mean()) - ENTROPY
    assert error < 0.03
    assert j_sm == pytest.approx(0.2010, abs=4 * error)
    kl_ode = -float(ODELikelihood(model)(x[:2]).log_prob.mean()) - ENTROPY
    assert kl_ode == pytest.approx(0.5720, abs=1e-3)
    assert 0.0552 < j_sm < kl_ode


@pytest.mark.parametrize("shape", [(2,), (2, 5), (1, 4, 4), (1, 3, 2, 2)])
def test_the_bound_is_tight_for_data_of_any_shape(shape) -> None:
    sde = VPSDE()
    means = torch.stack([torch.full(shape, -0.5), torch.full(shape, 0.7)])
    model = GaussianMixtureModel(sde, means, [0.3, 0.5])
    x = model.sample(400, generator=seeded(), dtype=torch.float64)
    terms = NELBO(model, samples=40)(x, generator=seeded(1))
    truth = -model.log_prob(x, torch.zeros(len(x), dtype=torch.float64))
    assert terms.nats.shape == (400,)
    error = float(terms.stderr.square().mean().sqrt()) / 20
    assert abs(float((terms.nats - truth).mean())) < 4 * error + 1e-3
    assert error < 0.12 * math.sqrt(math.prod(shape))


@pytest.mark.parametrize("divergence", [None, Hutchinson()])
@pytest.mark.parametrize(
    "sde", [VPSDE(), VESDE(0.5, 0.6)]
)  # noise mostly from the path, from the last step
def test_the_standard_error_matches_the_spread(divergence, sde) -> None:
    model = GaussianMixtureModel(sde, torch.zeros(1, 4), [0.5])
    x = torch.full((3000, 4), 0.4, dtype=torch.float64)
    terms = NELBO(model, samples=42, divergence=divergence)(x, generator=seeded())
    stated = float(terms.stderr.square().mean().sqrt())
    # Neighboring control variates err in opposite directions: the error is rather overstated.
    low, high = (0.95, 1.15) if divergence else (0.85, 1.4)
    assert low < stated / float(terms.nats.std()) < high
    assert NELBO(model)(x[:2]).stderr is None


def test_stratification_reduces_the_variance() -> None:
    model = GaussianMixtureModel(VPSDE(), torch.zeros(1, 4), [0.5])
    x = torch.full((3000, 4), 0.4, dtype=torch.float64)
    one, many = (NELBO(model, samples=k)(x, generator=seeded()).path.std() for k in (1, 16))
    assert float(many) < 0.8 * float(one) / 4


def test_gradients_flow_to_data_and_parameters() -> None:
    network = torch.nn.Linear(3, 3)
    model = EpsModel(lambda x, noise_label: network(x), VPSDE())
    x = torch.randn(4, 3, requires_grad=True)
    NELBO(model)(x, generator=seeded()).nats.sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert float(network.weight.grad.abs().sum()) > 0


def test_a_sample_does_not_depend_on_its_batch() -> None:
    bound = NELBO(GaussianMixtureModel(VPSDE(), torch.zeros(1, 3), [0.5]), samples=3)
    x = torch.randn(4, 3, dtype=torch.float64)
    every = bound(x, generator=[seeded(i) for i in range(4)]).nats
    alone = bound(x[2:3], generator=[seeded(2)]).nats
    torch.testing.assert_close(alone, every[2:3], rtol=1e-12, atol=0)


def test_conditions_reach_the_model() -> None:
    def network(x: Tensor, label: Tensor, class_labels: Any = None) -> Tensor:
        return x * class_labels.view(-1, 1)

    bound = NELBO(EpsModel(network, VPSDE()))
    x = torch.ones(2, 3)
    nats = bound(x, generator=[seeded(), seeded()], class_labels=torch.tensor([0.0, 1.0])).nats
    assert float(nats[0]) != float(nats[1])


def test_an_error_names_the_time_of_a_prediction_that_is_not_finite() -> None:
    model = EpsModel(lambda x, noise_label: x * torch.nan, VPSDE())
    for divergence in (None, Hutchinson()):
        with pytest.raises(ValueError, match="NaN or infinity at t = "):
            NELBO(model, divergence=divergence)(torch.ones(2, 3))


@pytest.mark.parametrize("likelihood", [NELBO, ODELikelihood])
def test_data_outside_the_range_of_the_model(likelihood) -> None:
    model = EpsModel(lambda x, noise_label: x, VPSDE(), data_range=(-1.0, 1.0))
    likelihood(model)(torch.tensor([[-1.0], [1.0]]))
    with pytest.raises(ValueError, match=r"range \[-1, 1\], got values from -1 to 255"):
        likelihood(model)(torch.tensor([[-1.0], [255.0]]))


def test_bad_input() -> None:
    model = GaussianMixtureModel(VPSDE(), torch.zeros(1, 3), [0.5])
    with pytest.raises(TypeError, match="model: expected a ScoreModel"):
        NELBO(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="samples"):
        NELBO(model, samples=0)
    with pytest.raises(TypeError, match="divergence"):
        NELBO(model, divergence="hutchinson")
    with pytest.raises(ValueError, match="t_min"):
        NELBO(model, t_min=2.0)
    with pytest.raises(ValueError, match="t_min: expected a time with noise, got 0"):
        NELBO(model, t_min=0.0)(torch.ones(2, 3))
    with pytest.raises(TypeError, match="floating-point"):
        NELBO(model)(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite"):
        NELBO(model)(torch.full((2, 3), torch.nan))
