"""The variance of regression targets at each noise level."""

import math

import pytest
import torch
from support import seeded
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from diffusionkit import EDMSDE, VPSDE, EmpiricalModel, ForwardSDE, GaussianMixtureModel, Perturbed
from diffusionkit.diagnostics import (
    dsm_variance,
    posterior_divergence,
    stf_variance,
    target_variances,
)
from diffusionkit.training.stable_target import StableTarget

POINTS = torch.tensor([[-1.0], [1.0]])

# Variances of the target in x0 for the data -1 and 1, by sigma and n (n = 1 is DSM): exact, from
# binomial sums and quadrature.
EXACT = {
    1.0: {
        1: 0.4495995092066729,
        2: 0.22479975460333648,
        4: 0.09788584048027271,
        16: 0.020569182858776874,
        64: 0.004991525432673267,
        256: 0.0012393313357087188,
    },
    4.0: {
        1: 0.9410540244594089,
        2: 0.47052701222970456,
        4: 0.23041421809655732,
        16: 0.0561994379902408,
        64: 0.013956047716052826,
        256: 0.0034831278930131217,
    },
}
# The same at sigma = 0.25, where one state in a few thousand dominates.
RARE = 9.821868401813184e-05


def at(sde, ratio):
    """The time at which sigma / alpha = ratio, (1,)."""
    return sde.time_at_log_snr(torch.tensor([-2 * math.log(ratio)], dtype=torch.float64))


def check(found, exact, relative):
    """Check that an estimate is within 4 standard errors, and that these are small."""
    assert float(found.stderr) < relative * exact
    assert float(found.value) == pytest.approx(exact, abs=4 * float(found.stderr))


@pytest.mark.parametrize("ratio", EXACT)
def test_dsm_variance_of_two_points_for_every_process(sde, ratio) -> None:
    found = dsm_variance(
        sde, POINTS, at(sde, ratio), units="x0", samples=20_000, generator=seeded()
    )
    check(found, EXACT[ratio][1], 0.01)
    assert float(found.noise) == pytest.approx(ratio, rel=1e-2)  # a chain has only its steps


def test_dsm_variance_where_few_states_dominate() -> None:
    found = dsm_variance(
        EDMSDE(), POINTS, torch.tensor([0.25]), units="x0", samples=1_000_000, generator=seeded()
    )
    check(found, RARE, 0.2)


@pytest.mark.parametrize("n", EXACT[1.0])
@pytest.mark.parametrize("ratio", EXACT)
def test_stf_variance_of_two_points(ratio, n) -> None:
    found = stf_variance(
        VPSDE(), POINTS, at(VPSDE(), ratio), n, units="x0", samples=10_000, generator=seeded(n)
    )
    check(found, EXACT[ratio][n], 0.05)


def test_stf_variance_is_that_of_the_stable_target() -> None:
    """Compared with `StableTarget` over reference batches, given the noisy state."""
    sde, generator = EDMSDE(), seeded(1)
    data = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.8], dtype=torch.float64)
    exact_model, spreads = EmpiricalModel(sde, data), []
    for _ in range(300):
        x = sde.perturb(data[torch.randint(5, (1,), generator=generator)], t, generator=generator).x
        posterior = torch.softmax(-(x - data).square().sum(1) / (2 * t**2), 0)
        torch.testing.assert_close(posterior @ data, exact_model.predict(x, t).x0[0])
        found = []
        for _ in range(2):
            source = torch.multinomial(posterior, 1, generator=generator)
            others = torch.randint(5, (2,), generator=generator)
            x0 = data[source]
            sample = Perturbed(x0, (x - x0) / t, x, t, torch.ones_like(t), t)
            found.append(StableTarget()(sample, data[torch.cat([source, others])]).x0)
        spreads.append(float((found[0] - found[1]).square().sum() / 2))
    spreads = torch.tensor(spreads)
    exact = stf_variance(sde, data, t, 3, units="x0", samples=20_000, generator=generator)
    error = float(spreads.std() / 300**0.5)
    assert float(exact.stderr) < error / 4
    assert error < 0.15 * float(exact.value)
    assert float(spreads.mean()) == pytest.approx(float(exact.value), abs=4 * error)


def test_more_draws_lower_the_standard_error() -> None:
    t = torch.tensor([4.0])
    few, many = (
        stf_variance(
            EDMSDE(), POINTS, t, 4, units="x0", samples=5000, draws=draws, generator=seeded()
        )
        for draws in (1, 16)
    )
    for found in (few, many):
        check(found, EXACT[4.0][4], 0.05)
    assert float(many.stderr) < 0.4 * float(few.stderr)


@pytest.mark.parametrize("n", [None, 3])
def test_units_differ_by_their_factors(sde, n) -> None:
    t = at(sde, 0.7)
    alpha, sigma = (float(c) for c in sde.marginal(t))
    values = {
        units: (
            dsm_variance(sde, POINTS, t, units=units, samples=100, generator=seeded())
            if n is None
            else stf_variance(sde, POINTS, t, n, units=units, samples=100, generator=seeded())
        )
        for units in ("x0", "noise", "score")
    }
    for name in ("value", "stderr"):
        x0, noise, score = (float(getattr(values[units], name)) for units in values)
        assert noise == pytest.approx(alpha**2 / sigma**2 * x0, rel=1e-12)
        assert score == pytest.approx(alpha**2 / sigma**4 * x0, rel=1e-12)
    assert [found.quantity for found in values.values()] == [
        "variance (x0)", "variance (noise)", "variance (score)",
    ]  # fmt: skip


# V_DSM by quadrature, the others as means over 200,000 or more states.
@pytest.mark.parametrize(
    ("sigma", "variance", "distance", "stable"),
    [
        (0.25, 0.1000857510470422, 0.82263, 0.041944),
        (1.0, 0.6821136549528464, 0.52522, 0.077588),
        (4.0, 3.588995146611067, 0.19743, 0.20894),
    ],
)
def test_a_sample_approximates_its_distribution(sigma, variance, distance, stable) -> None:
    mixture = GaussianMixtureModel(EDMSDE(), means=[[2.0, 0.0], [-2.0, 0.0]], stds=[0.5, 0.5])
    data, t = mixture.sample(5000, generator=seeded()), torch.tensor([sigma])
    found = dsm_variance(EDMSDE(), data, t, units="x0", samples=1000, generator=seeded())
    assert float(found.value) == pytest.approx(variance, rel=0.06)
    found = stf_variance(EDMSDE(), data, t, 16, units="x0", samples=1000, generator=seeded())
    assert float(found.value) == pytest.approx(stable, rel=0.08)
    found = posterior_divergence(EDMSDE(), data, t, kind="tv", samples=1000, generator=seeded())
    assert float(found.value) == pytest.approx(distance, abs=0.015)


def test_divergence_of_two_gaussians() -> None:
    """0.3019 is a mean over many states with the exact p0, which the sample approximates."""
    mixture = GaussianMixtureModel(EDMSDE(), means=[[2.0, 0.0], [-2.0, 0.0]], stds=[0.5, 0.5])
    found = posterior_divergence(
        EDMSDE(), mixture.sample(5000, generator=seeded()), torch.tensor([4.0]), generator=seeded()
    )
    assert float(found.value) == pytest.approx(0.3019, abs=4 * float(found.stderr))
    assert float(found.stderr) < 0.03
    assert found.quantity == "divergence"


def test_divergence_of_a_posterior_at_one_point() -> None:
    """With all weight on one of N points, it adds (N - 1)^2 and each other 8 / (27 N)."""
    data, n = 100.0 * torch.arange(5.0)[:, None], 5
    t = torch.tensor([0.01])
    found = posterior_divergence(EDMSDE(), data, t, samples=10, generator=seeded())
    assert float(found.value) == pytest.approx((n - 1) ** 2 + (n - 1) * 8 / (27 * n), rel=1e-9)
    found = posterior_divergence(EDMSDE(), data, t, kind="tv", samples=10, generator=seeded())
    assert float(found.value) == pytest.approx(1 - 1 / n, rel=1e-9)


def test_f_divergence_of_given_weights() -> None:
    """N w_k = 2, 0.8, 0.64 and 0.56: two are above 2 / 3, where y < 3 / 2."""
    log = torch.log(torch.tensor([[0.5, 0.2, 0.16, 0.14]], dtype=torch.float64))
    exact = 0.5 * 1.0**2 + 0.2 * 0.2**2
    exact += 0.16 * (8 / 27 / 0.64 - 1 / 3) + 0.14 * (8 / 27 / 0.56 - 1 / 3)
    assert float(target_variances._f_divergence(log, POINTS)) == pytest.approx(exact, rel=1e-12)


def test_divergence_of_two_points() -> None:
    """Weights w and 1 - w, on both sides of y = 3 / 2, averaged by quadrature."""
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = (torch.exp(-((x - 1) ** 2) / 2) + torch.exp(-((x + 1) ** 2) / 2)) / math.sqrt(
        8 * math.pi
    )
    total, distance = torch.zeros_like(x), torch.zeros_like(x)
    for w in (torch.sigmoid(2 * x), torch.sigmoid(-2 * x)):
        y = 1 / (2 * w)
        total += w * torch.where(y < 1.5, (1 / y - 1) ** 2, 8 * y / 27 - 1 / 3)
        distance += (w - 0.5).abs() / 2
    for kind, integrand in (("f", total), ("tv", distance)):
        exact = float(torch.trapezoid(density * integrand, x))
        found = posterior_divergence(
            EDMSDE(), POINTS, torch.tensor([1.0]), kind=kind, samples=20_000, generator=seeded()
        )
        check(found, exact, 0.01)


def test_standard_errors_match_the_spread_of_estimates() -> None:
    t = torch.tensor([1.0]).expand(400)
    for found, exact in (
        (dsm_variance(EDMSDE(), POINTS, t, samples=100, generator=seeded()), EXACT[1.0][1]),
        (stf_variance(EDMSDE(), POINTS, t, 2, samples=100, generator=seeded()), EXACT[1.0][2]),
    ):
        z = (found.value - exact) / found.stderr
        assert abs(float(z.mean())) < 0.25
        assert 0.85 < float(z.std()) < 1.15


def test_the_variance_is_not_rounded_where_the_posterior_is_one_point() -> None:
    far = 3 * torch.randn(20, 50, generator=seeded())
    found = dsm_variance(EDMSDE(), far, torch.tensor([0.01]), samples=100, generator=seeded())
    assert float(found.value) < 1e-100
    wide = dsm_variance(EDMSDE(), POINTS, torch.tensor([0.5]), generator=seeded())
    moved = dsm_variance(EDMSDE(), POINTS.double() + 100, torch.tensor([0.5]), generator=seeded())
    assert float(moved.value) == pytest.approx(float(wide.value), rel=1e-8)


def test_tensors_data_sets_and_loaders_give_the_same_estimates() -> None:
    data = torch.randn(10, 2, 3, generator=seeded())
    t, class_labels = torch.tensor([0.3, 2.0]), torch.arange(10)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    holders = [
        data,
        data.flatten(1),
        list(data),
        TensorDataset(data, class_labels),
        DataLoader(TensorDataset(data, class_labels), batch_size=4),
        DataLoader(Stream(), batch_size=3),
    ]
    first, *others = (
        dsm_variance(VPSDE(), held, t / 2, samples=20, generator=seeded()) for held in holders
    )
    assert first.value.shape == first.stderr.shape == first.noise.shape == (2,)
    for other in others:
        assert torch.equal(first.value, other.value)


def test_chunks_together_have_all_samples(monkeypatch) -> None:
    monkeypatch.setattr(target_variances, "_NUMBERS", 70)
    seen = []

    def progress(steps):
        seen.extend(steps)
        return steps

    t = torch.tensor([4.0, 4.0])
    found = stf_variance(
        EDMSDE(), POINTS, t, 4, units="x0", samples=3001, generator=seeded(), progress=progress
    )
    assert len(seen) == 2 * math.ceil(3001 / (70 // 8))
    for value, stderr in zip(found.value, found.stderr, strict=True):
        assert float(value) == pytest.approx(EXACT[4.0][4], abs=4 * float(stderr))
        assert 0 < float(stderr) < 0.05 * EXACT[4.0][4]


def test_without_a_generator_estimates_differ() -> None:
    torch.manual_seed(0)
    first = stf_variance(EDMSDE(), POINTS, torch.tensor([1.0]), 16, samples=50)
    second = stf_variance(EDMSDE(), POINTS, torch.tensor([1.0]), 16, samples=50)
    assert first.label == "STF, n = 16"
    assert float(first.value) != float(second.value)


class Fading(ForwardSDE):
    def marginal(self, t):
        return 1 - t, t.clone()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sde": "vp"}, TypeError, "sde: expected a ForwardSDE"),
        ({"data": 3}, TypeError, "data: expected a tensor, a data set or a loader"),
        ({"data": []}, ValueError, "data: expected at least one item"),
        ({"data": torch.zeros(0, 2)}, ValueError, "data: expected a non-empty batch"),
        ({"data": torch.zeros(3)}, ValueError, r"data: expected shape \(N, \*D\)"),
        ({"data": torch.tensor([[math.nan]])}, ValueError, "data: expected finite values"),
        ({"data": torch.zeros(3, 1).long()}, TypeError, "data: expected a floating-point"),
        ({"t": torch.zeros(1)}, ValueError, "sigma > 0 at each"),
        ({"sde": Fading()}, ValueError, "alpha > 0 and sigma > 0 at each"),
        ({"t": torch.zeros(0)}, ValueError, "at least one time"),
        ({"t": torch.tensor([2e3])}, ValueError, "t: expected times within"),
        ({"t": 0.5}, TypeError, "t: expected a tensor"),
        ({"units": "eps"}, ValueError, "units: expected one of .*'noise'.*, got 'eps'"),
        ({"samples": 1}, ValueError, "samples: expected an integer >= 2"),
        ({"generator": [seeded()]}, TypeError, "generator: expected a Generator"),
        ({"n": 0}, ValueError, "n: expected an integer >= 1"),
        ({"draws": 0}, ValueError, "draws: expected an integer >= 1"),
    ],
)
def test_invalid_arguments(change, error, message) -> None:
    usual = {"sde": EDMSDE(), "data": POINTS, "t": torch.tensor([1.0]), "n": 2}
    with pytest.raises(error, match=message):
        stf_variance(**{**usual, **change})


def test_an_unknown_kind_raises() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of .*'tv'.*, got 'kl'"):
        posterior_divergence(EDMSDE(), POINTS, torch.tensor([1.0]), kind="kl")
