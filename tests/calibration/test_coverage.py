"""Expected coverage: exact posteriors pass at the test's level, wrong ones fail with power."""

import math

import pytest
import torch

from diffusionkit.calibration import expected_coverage
from diffusionkit.calibration._uniform import uniform_p_value


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(seed, n=300, m=20, scale=1.0, shift=0.0, prior=False):
    """A posterior N(data, I) in the plane, and samples of another width and place."""
    draws = torch.randn(n, m + 1, 2, generator=seeded(seed))
    data = torch.randn(n, 1, 2, generator=seeded(seed + 10_000))
    samples = math.sqrt(2) * draws[:, 1:] if prior else data + scale * draws[:, 1:] + shift
    return samples, (data + draws[:, :1])[:, 0], data[:, 0]


def rejected(runs, references=None, **options):
    count = 0
    for i in range(runs):
        samples, truth, data = case(i, **options)
        chosen = None if references is None else references(data)
        found = expected_coverage(samples, truth, references=chosen, generator=seeded(i))
        count += found.p_value < 0.05
    return count / runs


def far(data):
    return torch.full_like(data, 6.0)


@pytest.mark.parametrize("references", [None, far, lambda data: data], ids=["box", "far", "data"])
def test_exact_posteriors_are_rejected_at_the_level_of_the_test(references):
    for m in (1, 20):
        p_values = torch.tensor(
            [
                expected_coverage(
                    *(found := case(i, n=100, m=m))[:2],
                    references=None if references is None else references(found[2]),
                    generator=seeded(i),
                ).p_value
                for i in range(60)
            ]
        )
        # Uniform on [0, 1]: as far from it as one in a thousand.
        assert float(uniform_p_value(p_values)) > 1e-3


def test_overconfident_and_too_wide_posteriors_are_rejected():
    assert rejected(40, scale=0.75) > 0.8
    assert rejected(40, scale=1.35) > 0.8


def test_which_references_find_which_faults():
    """A shift averages out in the box, and the prior passes there: found as the page says."""
    assert rejected(40, shift=0.2) < 0.3
    assert rejected(40, far, shift=0.2) > 0.9
    assert rejected(40, prior=True) < 0.3
    assert rejected(40, lambda data: data, prior=True) == 1.0


def test_the_curve_is_the_closed_form():
    """References at infinity: coverage of the normal distribution's own tails."""
    scale, n = 0.5, 20_000
    draws = torch.randn(n, 100, 1, generator=seeded())
    reference = torch.full((n, 1), 1e4)
    found = expected_coverage(
        scale * draws[:, 1:].double(),
        draws[:, 0].double(),
        references=reference,
        generator=seeded(1),
    )
    # The share of the narrow posterior above the truth is below c with probability
    # P(y > scale z_c), z_c the upper quantile.
    z = torch.special.ndtri(found.levels)
    right = torch.special.ndtr(scale * z)
    gap = (found.coverage - right)[1:-1]
    assert bool((gap.abs() < 4 * found.stderr[1:-1] + 0.005).all())
    assert bool((found.coverage[1:10] > found.levels[1:10]).all())  # above at small levels
    assert bool((found.coverage[11:20] < found.levels[11:20]).all())


def test_standard_errors_are_those_of_a_bootstrap_over_cases():
    samples, truth, _ = case(0)
    levels = torch.tensor([0.1, 0.5, 0.9])
    found = expected_coverage(samples, truth, levels=levels, generator=seeded())
    rows = torch.randint(300, (400, 300), generator=seeded(1))
    shares = (found.credibility[rows].unsqueeze(2) < levels).double().mean(1)
    torch.testing.assert_close(shares.std(0), found.stderr, rtol=0.15, atol=1e-3)


def test_units_of_the_parameters_do_not_matter():
    samples, truth, _ = case(2)
    units = torch.tensor([1e-3, 50.0])
    one = expected_coverage(samples, truth, generator=seeded())
    other = expected_coverage(samples * units + 7.0, truth * units + 7.0, generator=seeded())
    torch.testing.assert_close(one.credibility, other.credibility, atol=0.06, rtol=0.0)
    shaped = samples.view(300, 20, 2, 1), truth.view(300, 2, 1)
    assert torch.equal(expected_coverage(*shaped, generator=seeded()).coverage, one.coverage)


def test_a_constant_parameter_is_no_division_by_zero():
    samples, truth, _ = case(2)
    fixed = (
        torch.cat([samples, torch.ones(300, 20, 1)], 2),
        torch.cat([truth, torch.ones(300, 1)], 1),
    )
    assert math.isfinite(expected_coverage(*fixed, generator=seeded()).p_value)


def test_what_does_not_fit_is_refused():
    samples, truth, _ = case(0, n=10)
    for options, message in (
        ({"levels": torch.tensor([0.5, 1.5])}, r"levels: expected shape \(K,\) and values within"),
        ({"levels": torch.tensor([[0.5]])}, r"levels: expected shape \(K,\)"),
        ({"references": torch.zeros(10, 3)}, "references: expected the shape of truth"),
        ({"references": torch.full((10, 2), math.nan)}, "references: expected finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            expected_coverage(samples, truth, **options)
    with pytest.raises(ValueError, match="truth: expected at least two cases"):
        expected_coverage(samples[:1], truth[:1])
