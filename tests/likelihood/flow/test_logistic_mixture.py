import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit.likelihood.flow.logistic_mixture import LogisticMixture

WEIGHTS, MEANS, SCALES = [0.2, 0.5, 0.3], [-3.0, 0.5, 4.0], [0.25, 1.5, 0.5]
# x, logit F(x) and log dy/dx of this mixture, by mpmath with 60 digits, rounded.
EXACT = [
    (-10000.0, -6667.6931471805599, -0.40546510810816438),
    (-1000.0, -667.69314718055995, -0.40546510810816438),
    (-50.0, -34.359813847226613, -0.40546510810816558),
    (-3.0, -1.7808347655388637, 0.60885973141048682),
    (0.0, -0.36886927436826187, -1.0898985991903222),
    (2.5, 0.44699065831178841, -1.0635406763260613),
    (4.0, 1.4229480482767085, 0.12239999237516724),
    (50.0, 33.693147180559948, -0.40546510810816671),
    (1000.0, 667.02648051389328, -0.40546510810816438),
    (10000.0, 6667.0264805138933, -0.40546510810816438),
]


def mixture(n: int, dtype: torch.dtype) -> LogisticMixture:
    rows = [torch.tensor(values, dtype=dtype) for values in (WEIGHTS, MEANS, SCALES)]
    logits, means, scales = (row[:, None, None].expand(-1, 1, n) for row in rows)
    # Any constant may be added to the logits.
    return LogisticMixture(logits.log() + 2.0, means, scales.log())


def columns(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(EXACT, dtype=dtype).T.unsqueeze(1))


def test_logit_and_slope_match_high_precision() -> None:
    x, y, log_slope = columns(torch.float64)
    found = mixture(len(EXACT), torch.float64).logit(x)
    torch.testing.assert_close(found[0], y, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found[1], log_slope, rtol=1e-12, atol=1e-14)


def test_float32_is_accurate_far_in_the_tails() -> None:
    x, y, log_slope = columns(torch.float32)
    found = mixture(len(EXACT), torch.float32).logit(x)
    torch.testing.assert_close(found[0], y, rtol=5e-7, atol=5e-7)
    torch.testing.assert_close(found[1], log_slope, rtol=2e-6, atol=2e-6)


def test_a_gap_between_components_does_not_underflow() -> None:
    """Midway between two logistics 2000 apart, F = 1/2 and F' = exp(-1000) by symmetry."""
    means = torch.tensor([-1000.0, 1000.0])[:, None, None]
    y, log_slope = LogisticMixture(
        torch.zeros(2, 1, 1), means, torch.zeros(2, 1, 1)
    ).logit(torch.zeros(1, 1))  # fmt: skip
    assert y.item() == 0.0
    # F' / (F (1 - F)) = 4 exp(-1000) up to a relative exp(-1000).
    torch.testing.assert_close(log_slope, torch.tensor([[-998.61370564]]))


def test_standard_logistic_components_of_any_weights_are_the_identity() -> None:
    x = torch.linspace(-300, 300, 101).unsqueeze(0)
    logits = torch.randn(4, 1, 101, generator=seeded())
    y, log_slope = LogisticMixture(
        logits, torch.zeros_like(logits), torch.zeros_like(logits)
    ).logit(x)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-6)


@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1.0, 30.0, 1e3, 1e4, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_inverse_over_the_real_line(seed: int, size: float, dtype: torch.dtype) -> None:
    generator = seeded(seed)
    logits, means, log_scales, x = torch.randn(4, 3, 2, 50, generator=generator, dtype=dtype)
    m, x = LogisticMixture(logits, means, log_scales), size * x[0]
    y, log_slope = m.logit(x)
    error = (m.inverse(y) - x).abs()
    # The effect of rounding y and the differences x - mu.
    unit = torch.finfo(dtype).eps * (1 + y.abs() + (x / log_scales.exp()).abs().amax(0))
    assert bool((error <= 8 * unit * torch.exp(-log_slope).clamp_min(1.0)).all())


def test_the_inverse_has_the_gradients_of_an_inverse() -> None:
    generator = seeded(1)
    parts = torch.randn(3, 3, 1, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(1, 4, generator=generator, dtype=torch.float64).requires_grad_()
    logits, means, log_scales = (part.requires_grad_() for part in parts.unbind(0))

    def root(y, logits, means, log_scales):
        return LogisticMixture(logits, means, log_scales).inverse(y)

    assert torch.autograd.gradcheck(root, (y, logits, means, log_scales))


def test_the_gradients_of_the_inverse_are_finite_in_a_gap() -> None:
    """Where the slope is exp(-1000), the derivative of the root overflows."""
    means = torch.tensor([-1000.0, 1000.0])[:, None, None].requires_grad_()
    zeros = torch.zeros(2, 1, 1)
    LogisticMixture(zeros, means, zeros).inverse(torch.zeros(1, 1)).sum().backward()
    assert bool(torch.isfinite(means.grad).all())
