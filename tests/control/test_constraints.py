"""Constraints: the formula, their use in a sampler, and invalid arguments."""

import pytest
import torch
from support import seeded
from support.gaussian_oracle import DOUBLE, randn64

from diffusionkit import (
    DDIM,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    GaussianMixtureModel,
    KarrasGrid,
    Langevin,
    LogSNRGrid,
    PCSampler,
    Predictor,
    ReverseDiffusion,
    Step,
    UniformGrid,
)
from diffusionkit.control.constraints import Colorization, Inpainting, LinearMeasurement
from diffusionkit.control.operators import AveragePool, Blur, Gray, LinearOperator, Mask, Matrix
from diffusionkit.interfaces import Constraint
from diffusionkit.sampling.heun import Heun
from diffusionkit.sampling.time_travel import TimeTravel

# --- the formula --------------------------------------------------------------------------------

X = randn64(2, 3, 4, 6)
OPERATORS = {
    "mask": Mask(randn64(4, 6, seed=1) > 0),
    "pool": AveragePool(2),
    "gray": Gray(),
    "blur": Blur(torch.ones(3, 3) / 9, (4, 6)),
    "matrix": Matrix(randn64(5, 3, 4, 6)),
}


def constrained(constraint, x, alpha=1.0, sigma=0.0, **options):
    """Return a state with a constraint imposed at one noise level."""
    alpha, sigma = (torch.full((len(x),), c, dtype=DOUBLE) for c in (alpha, sigma))
    return constraint(x, alpha, sigma, **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_known_part_is_resampled_and_the_rest_kept(name):
    """A x has the distribution of alpha y + sigma A z."""
    operator, n, alpha, sigma = OPERATORS[name], 2000, 0.6, 0.3
    y, state = operator(X[:1]), 5.0 * randn64(1, 3, 4, 6, seed=2)
    constraint = LinearMeasurement(operator, y)
    x = constrained(constraint, state.expand(n, -1, -1, -1), alpha, sigma, generator=seeded())
    noise = operator(randn64(n, 3, 4, 6, seed=3)).flatten(1)
    found = operator(x).flatten(1)
    error = found.mean(0) - alpha * y.flatten()
    measured = noise.std(0) > 1e-9  # a mask measures the rest as 0
    assert float((error / (sigma * noise.std(0)))[measured].abs().max()) < 4.5 / n**0.5
    assert float(error[~measured].abs().sum()) == 0
    ratio = found.std(0)[measured] / noise.std(0)[measured]
    torch.testing.assert_close(ratio, torch.full_like(ratio, sigma), rtol=0.15, atol=0)
    spread, wanted = torch.cov(found.T) / sigma**2, torch.cov(noise.T)
    torch.testing.assert_close(spread, wanted, rtol=0, atol=0.16 * float(wanted.max()))
    rest = x - operator.inverse(operator(x))
    wanted = state - operator.inverse(operator(state))
    torch.testing.assert_close(rest, wanted.expand(n, -1, -1, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_drawn_where_sigma_is_zero(name):
    operator = OPERATORS[name]
    y, before = operator(X), torch.get_rng_state()
    constraint = LinearMeasurement(operator, y)
    for alpha in (1.0, 0.3):
        x = constrained(constraint, randn64(2, 3, 4, 6, seed=2), alpha)
        torch.testing.assert_close(operator(x), alpha * y, rtol=1e-10, atol=1e-12)
    assert torch.equal(before, torch.get_rng_state())


DEPENDENT = torch.tensor([[1.0, 2.0, 0.0], [3.0, 6.0, 0.0]])


def test_linearly_dependent_rows():
    """The second row is three times the first, and so must be its measurement."""
    rows, y = DEPENDENT, torch.tensor([[0.5, 1.5], [-2.0, -6.0], [0.0, 0.0]], requires_grad=True)
    x = constrained(LinearMeasurement(rows, y), randn64(3, 3).float())
    torch.testing.assert_close(x @ rows.T, y.detach())
    # The nearest to (1, -2) on (1, 3) is (-.5, -1.5).
    with pytest.raises(ValueError, match=r"y: .* values up to 6 that are off by 1\.5"):
        LinearMeasurement(rows, torch.tensor([[1.0, -2.0], [2.0, 6.0]], requires_grad=True))


def test_orthonormal_rows():
    """x + A^T (alpha y + sigma A z - A x)."""
    rows = torch.linalg.qr(randn64(4, 2)).Q.T.contiguous()
    y, x = randn64(3, 2, seed=1), randn64(3, 4, seed=2)
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=DOUBLE)
    sigma = torch.tensor([0.1, 0.5, 2.0], dtype=DOUBLE)
    z = torch.randn((3, 4), generator=seeded(), dtype=DOUBLE)
    target = alpha.unsqueeze(1) * y + sigma.unsqueeze(1) * (z @ rows.T)
    found = LinearMeasurement(rows, y)(x, alpha, sigma, generator=seeded())
    torch.testing.assert_close(found, x + (target - x @ rows.T) @ rows, rtol=1e-12, atol=1e-12)


def test_masks_of_every_shape():
    data, state = X, randn64(2, 3, 4, 6, seed=5)
    for known, mask in (
        (data, randn64(4, 6, seed=1) > 0),
        (data, randn64(2, 1, 4, 6, seed=1) > 0),
        (data[0], randn64(2, 3, 4, 6, seed=1) > 0),  # one image, a mask for each sample
        (data[:1], randn64(2, 1, 4, 6, seed=1) > 0),
        (data[:1], (randn64(1, 4, 1, seed=1) > 0).int()),
        (data[0], (randn64(3, 1, 6, seed=1) > 0).float()),
    ):
        x = constrained(Inpainting(known, mask), state)
        full = mask.bool().expand_as(state)
        assert torch.equal(x, torch.where(full, known.expand_as(state), state))


def test_one_measurement_or_one_for_each_sample():
    state = randn64(2, 3, 4, 6, seed=2)
    gray = X.mean(1, keepdim=True)
    each = constrained(Colorization(gray), state)
    for i in range(2):
        one = Colorization(gray[i])
        batch_of_one = Colorization(gray[i : i + 1])
        torch.testing.assert_close(constrained(one, state[i : i + 1]), each[i : i + 1])
        torch.testing.assert_close(constrained(one, state)[i], each[i])
        torch.testing.assert_close(constrained(batch_of_one, state)[i], each[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_state_keeps_its_dtype(name, dtype):
    operator = OPERATORS[name]
    constraint = LinearMeasurement(operator, operator(X))
    x = constraint(X.to(dtype), *torch.tensor([[0.5, 0.5], [0.1, 0.2]], dtype=DOUBLE))
    assert x.dtype == dtype
    x = constrained(constraint, torch.zeros_like(X, dtype=dtype))
    error = (operator(x.double()) - operator(X)).abs().max()
    assert float(error) < 40 * torch.finfo(dtype).eps * float(X.abs().max())


# --- in a sampler ------------------------------------------------------------------------------


class Recorded(Constraint):
    """A constraint that records its calls and changes nothing."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, alpha, sigma, *, generator=None):
        self.calls.append((float(x[0, 0]), float(alpha), float(sigma)))
        return x


class Marked(Predictor):
    def step(self, model, x, t, s, state=None, *, generator=None, **cond):
        return Step(x + 1, x + 0.5)


@pytest.mark.parametrize("corrector_first", [True, False])
def test_where_a_sampler_applies_a_constraint(corrector_first):
    """At the start, to state and mean after every step, and to the result."""

    class Noting(Langevin):
        def step(self, model, x, t, *, generator=None, **cond):
            return Step(x + 100, x + 50)

    sde = VPSDE()
    model = GaussianMixtureModel(sde, [[7.0]], [0.0])
    times = torch.tensor([0.9, 0.5, 0.2], dtype=DOUBLE)
    constraint = Recorded()
    sampler = PCSampler(
        model, Marked(), Noting(), grid=times, corrector_first=corrector_first,
        constraint=constraint,
    )  # fmt: skip
    sampler(torch.zeros(1, 1, dtype=DOUBLE))
    (a, b, c), (u, v, w) = (part.tolist() for part in sde.marginal(times))
    if corrector_first:
        expected = [
            (0, a, u), (0, a, 0),
            (100, a, u), (50, a, 0), (101, b, v), (100.5, b, 0),
            (201, b, v), (151, b, 0), (202, c, w), (201.5, c, 0),
            (7, 1, 0),
        ]  # fmt: skip
    else:
        expected = [
            (0, a, u), (0, a, 0),
            (1, b, v), (0.5, b, 0), (101, b, v), (51, b, 0),
            (102, c, w), (101.5, c, 0), (202, c, w), (152, c, 0),
            (7, 1, 0),
        ]  # fmt: skip
    assert len(constraint.calls) == len(expected)
    for found, wanted in zip(constraint.calls, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-12)


GRIDS = {
    "to noise": UniformGrid(),
    "to zero": KarrasGrid(to_zero=True),
    "noisy end": LogSNRGrid(t_end=0.2),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("corrector", [None, Langevin()], ids=["p", "pc"])
@pytest.mark.parametrize("predictor", [None, ReverseDiffusion(), DDIM(), Heun()], ids=str)
def test_known_entries_of_samples_equal_the_data(sde, predictor, corrector, grid):
    if predictor is None and corrector is None:
        pytest.skip("no predictor or corrector")
    model = GaussianMixtureModel(sde, torch.stack([X[0], -X[0]]).float(), [0.3, 0.2])
    known, mask = X.float(), randn64(2, 1, 4, 6, seed=1) > 0
    grids = {**GRIDS, "noisy end": LogSNRGrid(t_end=0.2 * sde.T)}
    sampler = PCSampler(
        model, predictor, corrector, steps=5, grid=grids[grid], constraint=Inpainting(known, mask)
    )
    x = sampler((2, 3, 4, 6), generator=seeded())
    assert torch.equal(x[mask.expand_as(x)], known[mask.expand_as(x)])
    assert torch.isfinite(x).all()
    plain = PCSampler(model, predictor, corrector, steps=5, grid=grids[grid])
    plain((2, 3, 4, 6))
    assert sampler.nfe == plain.nfe


@pytest.mark.parametrize("name", OPERATORS)
def test_samples_have_the_measurement(name):
    operator = OPERATORS[name]
    y = operator(X)
    model = GaussianMixtureModel(VPSDE(), torch.stack([X[0], -X[0]]), [0.3, 0.2])
    sampler = PCSampler(
        model, Ancestral(), Langevin(), steps=5, constraint=LinearMeasurement(operator, y)
    )
    x = sampler((2, 3, 4, 6), generator=seeded(), dtype=DOUBLE)
    torch.testing.assert_close(operator(x), y, rtol=1e-9, atol=1e-9)


def test_unknown_part_is_denoised(sde):
    """The data are two points; a sample with noise left would not be one of them."""
    points = torch.tensor([[-1.0, 0.5, 0.2], [-1.0, -0.7, 0.2]])
    model = GaussianMixtureModel(sde, points, [0.0, 0.0])
    grid = LogSNRGrid(t_end=float(sde.time_at_log_snr(torch.tensor([4.0], dtype=DOUBLE))))
    constraint = Inpainting(points[0], torch.tensor([1, 0, 0]))
    for corrector in (None, AnnealedLangevin()):
        sampler = PCSampler(
            model, ReverseDiffusion(), corrector, steps=60, grid=grid, constraint=constraint
        )
        *_, noisy, x = sampler.iterate((50, 3), generator=seeded(), dtype=DOUBLE)
        sigma = float(sde.marginal(sampler.times[-1:])[1])
        assert float((noisy.x[:, 2] - 0.2 * noisy.x[:, 2].sign()).std()) > 0.5 * sigma
        torch.testing.assert_close(x.x[:, 2], torch.full((50,), 0.2).double(), rtol=0, atol=1e-9)
        assert float((x.x[:, 1].unsqueeze(1) - points[:, 1]).abs().amin(1).max()) < 0.02


def test_known_entries_have_the_noise_of_their_time(sde):
    """alpha y + sigma z in states and alpha y in means, also after time travel."""
    n, y = 3000, 3.0
    model = GaussianMixtureModel(sde, [[y, 0.0]], [0.5])
    times = LogSNRGrid(t_end=0.4 * sde.T)(sde, 3)[1:]
    sampler = PCSampler(
        model, Ancestral(), AnnealedLangevin(), grid=times, denoise=False,
        time_travel=TimeTravel(1, 2),
        constraint=Inpainting(torch.tensor([y, 0.0]), torch.tensor([1, 0])),
    )  # fmt: skip
    start = torch.zeros(n, 2, dtype=DOUBLE)
    states = list(sampler.iterate(start, generator=seeded()))
    assert [state.step for state in states] == [0, 1, 0, 1, 2, 1, 2]
    for state in states:
        alpha, sigma = (float(c) for c in sde.marginal(torch.tensor([state.t], dtype=DOUBLE)))
        known = state.x[:, 0]
        assert float(known.mean()) == pytest.approx(alpha * y, abs=4 * sigma / n**0.5)
        assert float(known.std()) == pytest.approx(sigma, rel=0.05)
        torch.testing.assert_close(state.mean[:, 0], torch.full((n,), alpha * y).double())
    assert torch.equal(states[0].x[:, 1], start[:, 1])


@pytest.mark.parametrize("predictor", [ReverseDiffusion(), DDIM(eta=0.5), Heun()], ids=str)
def test_a_sample_with_its_own_generator_does_not_depend_on_its_batch(predictor):
    model = GaussianMixtureModel(VPSDE(), torch.stack([X[0], -X[0]]).float(), [0.3, 0.2])
    sampler = PCSampler(
        model, predictor, Langevin(), steps=6, time_travel=TimeTravel(2, 2),
        constraint=Colorization(X[0].mean(0, keepdim=True)),
    )  # fmt: skip
    whole, alone = (
        sampler((len(rows), 3, 4, 6), generator=[seeded(i) for i in rows]) for rows in ([0, 1], [1])
    )
    assert torch.equal(whole[1:], alone)


# --- invalid arguments ---------------------------------------------------------------------------


class Halved(LinearOperator):
    def __call__(self, x):
        return x[..., ::2]

    def inverse(self, y):
        return y.repeat_interleave(2, -1)


NAN = float("nan")
MODEL = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [1.0])
KNOWN = Inpainting(torch.tensor([NAN, 1.0]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Inpainting(X, randn64(4, 6)), ValueError, "mask: expected 0 and 1"),
        (
            lambda: Inpainting(X, torch.ones(4, 5)),
            ValueError,
            r"mask: .*\(2, 3, 4, 6\), got \(4, 5",
        ),
        (lambda: Inpainting(X[0, :, :1], torch.ones(3, 4, 6)), ValueError, "mask: expected a shap"),
        (
            lambda: Inpainting(X[:1], torch.ones(2, 2, 3, 4, 6)),
            ValueError,
            "mask: expected a shape",
        ),
        (lambda: Inpainting(X, torch.ones(1, 1, 2, 3, 4, 6)), ValueError, "mask: expected a shape"),
        (
            lambda: Inpainting(torch.tensor([NAN, 1.0]), torch.ones(2)),
            ValueError,
            "known: .* got 1 ",
        ),
        (
            lambda: Inpainting(torch.ones(2, dtype=int), torch.ones(2)),
            TypeError,
            "known: expected a f",
        ),
        (lambda: Inpainting(torch.ones(2), None), TypeError, "mask: expected a tensor"),
        (lambda: Colorization(X), ValueError, r"gray: expected images \(\.\.\., 1, H, W\)"),
        (lambda: Colorization(torch.full((1, 2, 2), NAN)), ValueError, "gray: expected finite"),
        (lambda: Colorization(torch.ones(1, 2, 2), channels=0), ValueError, "channels"),
        (
            lambda: LinearMeasurement(Gray(), torch.full((1, 2, 2), NAN)),
            ValueError,
            "y: expected fin",
        ),
        (
            lambda: LinearMeasurement(randn64(2, 4), torch.ones(3)),
            ValueError,
            r"y: expected .*2\), got",
        ),
        (
            lambda: LinearMeasurement(lambda x: x, torch.ones(3)),
            TypeError,
            "operator: expected a Lin",
        ),
        (lambda: LinearMeasurement(Gray(), [1.0]), TypeError, "y: expected a tensor"),
        (
            lambda: LinearMeasurement(Halved(), torch.ones(3)),
            ValueError,
            "expected A.* relative error",
        ),
        (
            lambda: PCSampler(MODEL, DDIM(), constraint=KNOWN.known),
            TypeError,
            "constraint: expected a C",
        ),
        (
            lambda: PCSampler(MODEL, DDIM(), constraint=KNOWN)((4, 3)),
            ValueError,
            r"x: expected a state .* Inpainting, of shape \(2,\), got \(4, 3\)",
        ),
        (
            lambda: constrained(Inpainting(X, torch.ones(4, 6)), X[:1]),
            ValueError,
            r"got \(1, 3, 4, 6\)",
        ),
    ],
)
def test_invalid_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_repr():
    assert repr(KNOWN) == "Inpainting(Mask, data of shape (2,))"
    assert repr(Colorization(X[:, :1])) == "Colorization(Gray, data of shape (2, 3, 4, 6))"
