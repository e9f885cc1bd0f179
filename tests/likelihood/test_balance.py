"""ODELikelihood with a target standard error: its probes, its tolerance, and their cost."""

import math
import statistics

import pytest
import torch
from support import seeded

from diffusionkit import VPSDE, EDMModel, GaussianMixtureModel, evaluate_bits_per_dim
from diffusionkit.likelihood import _balance
from diffusionkit.likelihood.divergence import Divergence, ExactDivergence
from diffusionkit.likelihood.ode import ODELikelihood
from diffusionkit.networks import MLP


@pytest.fixture(scope="module")
def mixture():
    """A mixture whose Jacobian is far from diagonal, and one point of it."""
    means = torch.randn(3, 6, generator=seeded(1), dtype=torch.float64)
    model = GaussianMixtureModel(VPSDE(), means, [0.3, 0.4, 0.5])
    x = 0.8 * means[:1] + 0.2 * means[1:2]
    exact = ODELikelihood(model, divergence=ExactDivergence(), rtol=1e-7, atol=1e-7)(x)
    many = ODELikelihood(model, rtol=1e-3, atol=1e-3)(x.expand(400, -1), generator=seeded())
    return model, x, float(exact.log_prob), float(many.log_prob.std())


def test_the_target_is_met_by_few_probes_and_evaluations(mixture) -> None:
    model, x, _, spread = mixture
    target = spread / 4
    result = ODELikelihood(model, target_stderr=target)(x.expand(8, -1), generator=seeded())
    assert float(result.stderr.max()) <= target
    assert 8 < result.probes < 64
    assert result.rtol > 1e-5
    assert 0 < result.solver_error <= 0.25 * target
    again = ODELikelihood(model, target_stderr=target)(x.expand(8, -1), generator=seeded())
    assert torch.equal(again.log_prob, result.log_prob)


def test_values_are_unbiased_and_their_errors_honest(mixture) -> None:
    """Of 400 independent values at one point, with the density of the exact divergence."""
    model, x, exact, spread = mixture
    result = ODELikelihood(model, target_stderr=spread / 2)(x.expand(400, -1), generator=seeded())
    error = result.log_prob - exact
    assert abs(float(error.mean())) < 3.5 * float(error.std()) / 20 + result.solver_error
    assert float(result.stderr.square().mean().sqrt()) == pytest.approx(
        float(error.std()), rel=0.15
    )
    assert float((error.abs() < 2 * result.stderr).double().mean()) > 0.9


@pytest.mark.slow
def test_single_samples_meet_their_own_target(mixture) -> None:
    """The numbers of probes differ; the mean of 40 values stays that of the exact divergence."""
    model, x, exact, spread = mixture
    generator, values, probes = seeded(), [], []
    for _ in range(40):
        result = ODELikelihood(model, target_stderr=spread / 2)(x, generator=generator)
        assert float(result.stderr) <= spread / 2
        values.append(float(result.log_prob) - exact)
        probes.append(result.probes)
    assert len(set(probes)) > 1
    assert abs(statistics.mean(values)) < 3.5 * statistics.stdev(values) / math.sqrt(40)


def test_the_number_of_probes_is_bounded(mixture) -> None:
    model, x, _, spread = mixture
    likelihood = ODELikelihood(model, target_stderr=spread / 100, max_probes=5)
    result = likelihood(x, generator=seeded())
    assert result.probes == 5
    assert float(result.stderr) > spread / 100


@pytest.mark.parametrize("target", [0.3, 0.003])
def test_an_exact_divergence_needs_a_tolerance_only(mixture, target) -> None:
    model, x, exact, _ = mixture
    result = ODELikelihood(model, divergence=ExactDivergence(), target_stderr=target)(x)
    assert (result.probes, result.stderr) == (1, None)
    assert abs(float(result.log_prob) - exact) < target
    assert (result.rtol > 2e-5) == (target == 0.3)


def test_tolerances_to_try_end_at_the_tightest() -> None:
    solver = ODELikelihood(
        GaussianMixtureModel(VPSDE(), [[0.0]], [0.5]), rtol=3e-4, atol=1e-4
    ).solver
    factors = _balance.pilot_factors(solver)
    assert [_balance.looser(solver, f).rtol for f in factors] == pytest.approx([1e-2, 1e-3, 3e-4])
    loose = _balance.looser(solver, 100.0)
    assert _balance.pilot_factors(loose) == [10.0, 1.0]


def test_probes_are_as_many_as_a_variance_needs() -> None:
    assert _balance.needed_probes(torch.tensor(4.0), 0.5, 64) == 16
    assert _balance.needed_probes(torch.tensor(0.0), 0.5, 64) == 2
    assert _balance.needed_probes(torch.tensor(math.nan), 0.5, 64) == 64


def test_masks_conditions_and_half_precision() -> None:
    """A network of half precision, per-sample generators, a mask and a condition."""
    model = EDMModel(MLP(4, width=8), VPSDE()).to(torch.bfloat16).eval()
    x = torch.rand(3, 4)
    likelihood = ODELikelihood(model, target_stderr=0.5, rtol=1e-3, atol=1e-3, max_probes=4)
    result = likelihood(x, generator=[seeded(i) for i in range(3)])
    assert result.log_prob.shape == (3,)
    assert result.probes <= 4
    gaussian = GaussianMixtureModel(VPSDE(), torch.zeros(1, 4), [0.5])
    mask = torch.tensor([[1, 1, 0, 1]])
    part = GaussianMixtureModel(VPSDE(), torch.zeros(1, 3), [0.5])
    found = ODELikelihood(gaussian, target_stderr=0.01)(x, mask=mask, generator=seeded())
    expected = part.log_prob(x[:, [0, 1, 3]], torch.zeros(3))
    torch.testing.assert_close(found.log_prob.float(), expected, rtol=0, atol=0.02)


def test_a_data_set_is_evaluated_with_a_target(mixture) -> None:
    model, x, exact, spread = mixture
    likelihood = ODELikelihood(model, target_stderr=spread / 2)
    found = evaluate_bits_per_dim(likelihood, x.repeat(6, 1), batch_size=4, progress=False)
    unit = 6 * math.log(2)
    assert found.mean == pytest.approx(-exact / unit, abs=4 * spread / 2 / math.sqrt(6) / unit)


class Other(Divergence):
    def start(self, x, generator=None):
        return None

    def __call__(self, function, x, state):
        return function(x), torch.zeros(1, len(x))


def test_what_cannot_be_balanced_is_refused(mixture) -> None:
    model = mixture[0]
    with pytest.raises(ValueError, match=r"method: expected one of .* got 'rk4'"):
        ODELikelihood(model, target_stderr=0.1, method="rk4")
    with pytest.raises(TypeError, match=r"divergence: expected Hutchinson .* got Other"):
        ODELikelihood(model, target_stderr=0.1, divergence=Other())
    with pytest.raises(ValueError, match="target_stderr"):
        ODELikelihood(model, target_stderr=0.0)
    with pytest.raises(ValueError, match="max_probes"):
        ODELikelihood(model, max_probes=1)
