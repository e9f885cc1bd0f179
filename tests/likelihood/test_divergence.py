import pytest
import torch
from support import seeded

from diffusionkit.likelihood.divergence import ExactDivergence, Hutchinson


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def linear(A):
    return lambda x: x @ A.T


def estimates(A, n, **settings):
    hutchinson = Hutchinson(**settings)
    x = torch.zeros(n, len(A), dtype=torch.float64)
    state = hutchinson.start(x, seeded())
    return hutchinson(linear(A), x, state)[1]


def network(shape, seed=0):
    """Return a smooth function of all entries of a sample, and the trace of its Jacobian."""
    generator = seeded(seed)
    d = torch.Size(shape).numel()
    W, V = (torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5 for _ in range(2))

    def function(x):
        return (torch.tanh(x.reshape(len(x), d) @ W) @ V).view(x.shape)

    def trace(x):
        return torch.stack(
            [
                torch.autograd.functional.jacobian(
                    lambda row: function(row.view(1, *shape)).flatten(), one.flatten()
                ).trace()
                for one in x
            ]
        )

    return function, trace


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_exact_divergence_is_the_trace(shape, chunk):
    function, trace = network(shape)
    x = torch.randn(4, *shape, dtype=torch.float64, generator=seeded(1))
    divergence = ExactDivergence(chunk)
    value, found = divergence(function, x, divergence.start(x))
    torch.testing.assert_close(value, function(x))
    torch.testing.assert_close(found, trace(x).unsqueeze(0))


def test_hutchinson_is_unbiased():
    function, trace = network((3,))
    x = torch.randn(2, 3, dtype=torch.float64, generator=seeded(1))
    for noise in ("rademacher", "gaussian"):
        hutchinson = Hutchinson(4000, noise)
        state = hutchinson.start(x, seeded(2))
        value, found = hutchinson(function, x, state)
        torch.testing.assert_close(value, function(x))
        error = found.std(0) / 4000**0.5
        assert ((found.mean(0) - trace(x)).abs() < 4 * error).all()


def test_rademacher_signs_are_balanced():
    """The frequency of -1 is 1/2, within 4 of its standard errors 1 / (2 sqrt(n)) = .0025."""
    signs = Hutchinson(probes=10).start(torch.zeros(200, 20), seeded())
    assert signs.numel() == 40_000
    assert float((signs == -1).double().mean()) == pytest.approx(0.5, abs=4 * 0.0025)


@pytest.mark.parametrize(
    ("A", "mean", "rademacher", "gaussian"),
    [
        (matrix([2, 1], [1, 3]), 5.0, 4.0, 30.0),
        (matrix([2, 2], [0, 3]), 5.0, 4.0, 30.0),  # same symmetric part
        (matrix([2, 0], [0, 3]), 5.0, 0.0, 26.0),
    ],
)
def test_variance_of_hutchinson(A, mean, rademacher, gaussian):
    """2 sum_{i != j} A_ij^2 and 2 sum_ij A_ij^2, from 40,000 estimates."""
    values = estimates(A, 40_000)
    assert float(values.mean()) == pytest.approx(mean, abs=4 * (rademacher / 40_000) ** 0.5 + 1e-12)
    assert float(values.var()) == pytest.approx(rademacher, rel=0.01, abs=1e-12)
    values = estimates(A, 40_000, noise="gaussian")
    assert float(values.mean()) == pytest.approx(mean, abs=4 * (gaussian / 40_000) ** 0.5)
    assert float(values.var()) == pytest.approx(gaussian, rel=0.08)  # kurtosis 15: 4 errors


def test_each_probe_gives_an_estimate():
    """v A v = 5 + 2 v_1 v_2 is 3 or 7, depending on the probe."""
    hutchinson = Hutchinson(probes=6)
    x = torch.zeros(5, 2)
    state = hutchinson.start(x, seeded())
    found = hutchinson(linear(matrix([2, 1], [1, 3]).float()), x, state)[1]
    assert found.shape == (6, 5)
    torch.testing.assert_close(found, 5.0 + 2.0 * state.double().prod(2))
    assert 0 < int((found == 3).sum()) < 30


def test_probes_of_a_sample_do_not_depend_on_its_batch():
    def generators(*seeds):
        return [seeded(seed) for seed in seeds]

    hutchinson = Hutchinson(probes=3)
    both = hutchinson.start(torch.zeros(2, 4, 5), generators(1, 2))
    alone = hutchinson.start(torch.zeros(1, 4, 5), generators(2))
    assert torch.equal(both[:, 1:], alone)
    assert set(both.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("divergence", [Hutchinson(3), ExactDivergence(2)])
def test_one_forward_pass_and_no_gradients_of_parameters(divergence):
    layer = torch.nn.Linear(5, 5, dtype=torch.float64)
    calls = 0

    def function(x):
        nonlocal calls
        calls += 1
        return layer(x)

    x = torch.zeros(2, 5, dtype=torch.float64)
    with torch.no_grad():
        value, found = divergence(function, x, divergence.start(x))
    assert calls == 1
    assert not any(y.requires_grad for y in (value, found, x))
    assert layer.weight.grad is None


class Unbatched(torch.autograd.Function):
    """x^3, with a derivative computed outside torch, which cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * torch.tensor(grad.tolist(), dtype=grad.dtype)


def test_functions_without_a_batching_rule():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for chunk in (1, 2):
        found = ExactDivergence(chunk)(Unbatched.apply, x, None)[1]
        assert found.tolist() == [[15.0, 75.0]]


def test_a_constant_function_has_no_divergence():
    x = torch.ones(2, 3)
    for divergence in (Hutchinson(2), ExactDivergence()):
        for function in (torch.zeros_like, lambda x: torch.ones(2, 3, requires_grad=True) * 2):
            found = divergence(function, x, divergence.start(x))[1]
            assert found.shape == (divergence.probes, 2)
            assert not found.any()


def test_sums_are_in_float64():
    """Large entries that cancel do not round away the others."""
    scale = torch.tensor([1e8, 1.0, 1.0, -1e8])
    found = Hutchinson()(lambda x: scale * x, torch.zeros(1, 4), torch.ones(1, 1, 4))[1]
    assert found.item() == 2.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hutchinson(0), ValueError, "probes: expected an integer >= 1, got 0"),
        (lambda: Hutchinson(1.0), TypeError, "probes: expected an integer, got float"),
        (
            lambda: Hutchinson(noise="cauchy"),
            ValueError,
            "noise: expected one of 'rademacher', 'gauss",
        ),
        (lambda: ExactDivergence(0), ValueError, "chunk: expected an integer >= 1, got 0"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
