"""Linear operators against dense matrices and their pseudo-inverses."""

import copy
import itertools

import numpy as np
import pytest
import torch
from support.gaussian_oracle import DOUBLE, randn64
from torch.nn import functional

from diffusionkit.control.operators import (
    AveragePool,
    Blur,
    Gray,
    LinearOperator,
    Mask,
    Matrix,
    check_operator,
)

BOX = torch.ones(2, 3, dtype=DOUBLE) / 6  # even along one axis; it loses some frequencies of (4, 6)
OPERATORS = {
    "mask": (Mask(randn64(3, 4) > 0), (3, 4)),
    "mask of all channels": (Mask(randn64(3, 4) > 0), (2, 3, 4)),
    "pool": (AveragePool(2), (3, 4, 6)),
    "pool 1": (AveragePool(3, dims=1), (2, 6)),
    "pool 3": (AveragePool(2, dims=3), (2, 4, 2)),
    "gray": (Gray(), (3, 2, 2)),
    "gray of five": (Gray(5), (5, 1, 3)),
    "blur": (Blur(BOX, (4, 6)), (2, 4, 6)),
    "blur odd": (Blur(randn64(3, 2), (5, 3)), (5, 3)),
    "blur floor": (Blur(randn64(3), (9,), floor=0.5), (9,)),
    "matrix": (Matrix(randn64(3, 2, 4)), (2, 4)),
    "wide matrix": (Matrix(randn64(2, 5)[[0, 1, 0]]), (5,)),
}


@pytest.fixture(params=OPERATORS)
def case(request):
    return OPERATORS[request.param]


def dense(linear, shape):
    """Return the matrix of a linear function of tensors of a shape."""
    size = int(np.prod(shape))
    columns = [linear(e.view(shape)).flatten() for e in torch.eye(size, dtype=DOUBLE)]
    return torch.stack(columns, 1)


def test_inverse_is_the_pseudo_inverse(case):
    operator, shape = case
    forward = dense(operator, shape)
    back = dense(operator.inverse, operator(torch.zeros(shape, dtype=DOUBLE)).shape)
    # Singular values that the filters leave out are rounding errors.
    expected = np.linalg.pinv(forward.numpy(), rcond=1e-10)
    np.testing.assert_allclose(back.numpy(), expected, atol=1e-11)
    check_operator(operator, torch.zeros(shape, dtype=DOUBLE))


def test_leading_axes_are_independent(case):
    operator, shape = case
    x = randn64(2, 3, *shape, seed=1)
    y = operator(x)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(y[i, j], operator(x[i, j]))
        torch.testing.assert_close(operator.inverse(y)[i, j], operator.inverse(y[i, j]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(case, dtype):
    operator, shape = case
    x = randn64(2, *shape)
    y = operator(x.to(dtype))
    back = operator.inverse(y)
    assert y.dtype == back.dtype == dtype
    scale = float(operator.inverse(operator(x)).abs().max())
    error = (back.double() - operator.inverse(operator(x))).abs().max()
    assert float(error) < 60 * torch.finfo(dtype).eps * scale
    check_operator(operator, x.to(dtype))


def test_mask_ignores_unknown_entries():
    x = torch.tensor([1.0, float("nan"), 3.0])
    for mask in ([1, 0, 1], [1.0, 0.0, 1.0], [True, False, True]):
        assert Mask(torch.tensor(mask))(x).tolist() == [1.0, 0.0, 3.0]


def test_pooling_is_average_pooling():
    x = randn64(2, 3, 6, 9)
    torch.testing.assert_close(AveragePool(3)(x), functional.avg_pool2d(x, 3))
    torch.testing.assert_close(
        AveragePool(3).inverse(x), functional.interpolate(x, scale_factor=3, mode="nearest")
    )


def test_gray_is_the_mean_over_channels():
    x = randn64(2, 3, 4, 5)
    expected = (x[:, 0] + x[:, 1] + x[:, 2]) / 3
    torch.testing.assert_close(Gray()(x)[:, 0], expected)
    torch.testing.assert_close(Gray().inverse(Gray()(x))[:, 2], expected)


@pytest.mark.parametrize(("kernel", "size"), [((3, 3), (5, 4)), ((1, 2), (4, 4)), ((4, 5), (4, 5))])
def test_blur_is_a_circular_convolution(kernel, size):
    weights, x = randn64(*kernel), randn64(*size, seed=1)
    expected = torch.zeros(size, dtype=DOUBLE)
    for (a, b), (i, j) in itertools.product(np.ndindex(kernel), np.ndindex(size)):
        at = (i - (a - kernel[0] // 2)) % size[0], (j - (b - kernel[1] // 2)) % size[1]
        expected[i, j] += weights[a, b] * x[at]
    torch.testing.assert_close(Blur(weights, size, floor=1e-9)(x), expected)


def test_blur_drops_lost_frequencies():
    """cos(2 pi k i / 8) is multiplied by 2 + 4 cos(2 pi k / 8), 6 times 1, .8, .33, -.14, -.33."""
    waves = torch.cos(torch.arange(5.0).double().unsqueeze(1) * torch.arange(8) * np.pi / 4)
    kernel = torch.full((3,), 2.0, dtype=DOUBLE)
    expected = torch.tensor([1.0, (1 + 2**0.5) / 3, 1 / 3, (1 - 2**0.5) / 3, -1 / 3])
    expected = 6 * expected.double()
    for floor, lost in ((0.01, []), (0.2, [3]), (0.4, [2, 3, 4])):
        operator = Blur(kernel, (8,), floor)
        gain = torch.stack([(operator(w) @ w) / (w @ w) for w in waves])
        factor = expected.clone()
        factor[lost] = 0.0
        torch.testing.assert_close(gain, factor, rtol=1e-6, atol=1e-12)
        # The blurred signal may contain the lost frequencies.
        blurred = Blur(kernel, (8,), 1e-9)(waves.sum(0))
        kept = waves[[k for k in range(5) if k not in lost]].sum(0)
        torch.testing.assert_close(operator.inverse(blurred), kept, rtol=1e-6, atol=1e-9)


FRESH = {
    "mask": lambda: Mask(torch.tensor([1, 0, 1, 1])),
    "blur": lambda: Blur(torch.ones(3), (4,)),
    "matrix": lambda: Matrix(randn64(3, 4)),
}


@pytest.mark.parametrize("name", FRESH)
def test_tables_are_converted_once(name, monkeypatch):
    """Once for each dtype, when calls alternate between dtypes."""
    operator, x = FRESH[name](), randn64(2, 4)
    data = [x, x.float()]
    wanted = [operator.inverse(operator(z)) for z in data]
    used, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a: used.append(self) or to(self, *a))
    for z, expected in zip(data, wanted, strict=True):
        assert torch.equal(operator.inverse(operator(z)), expected)
    assert all(one.shape == x.shape for one in used)  # only the data, no table


@pytest.mark.parametrize(
    "around", [torch.inference_mode(), torch.func.grad, torch.func.vmap], ids=["mode", "grad", "vm"]
)
@pytest.mark.parametrize("name", FRESH)
def test_tables_first_used_in_a_transform(name, around):
    """Gradients and copies of the operator work afterwards."""
    operator, x = FRESH[name](), randn64(2, 4).float()

    def size(x):
        return operator.inverse(operator(x)).square().sum()

    around(size)(x)
    x.requires_grad_()
    size(x).backward()
    copied = copy.deepcopy(operator)
    # A^+ A is an orthogonal projection.
    torch.testing.assert_close(x.grad, 2 * copied.inverse(copied(x.detach())))


def test_repr():
    assert repr(Mask(torch.ones(4, 6))) == "Mask(of shape (4, 6))"
    assert repr(AveragePool(4)) == "AveragePool(4, dims=2)"
    assert repr(Gray()) == "Gray(channels=3)"
    assert repr(Blur(BOX, (4, 6))) == "Blur(kernel of shape (2, 3), size=(4, 6))"
    assert repr(Matrix(randn64(3, 2, 4))) == "Matrix(rows of shape (3, 2, 4))"


class Pair(LinearOperator):
    def __init__(self, forward, inverse):
        self.forward, self.backward = forward, inverse

    def __call__(self, x):
        return self.forward(x)

    def inverse(self, y):
        return self.backward(y)


A = torch.tensor([[0.6, 0.8, 0.0]], dtype=DOUBLE)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        # Rows of length 2 with their adjoint: A A^T A = 4 A.
        (Pair(lambda x: x @ (2 * A).T, lambda y: y @ (2 * A)), r"A = A, .* error of 3.0e\+00"),
        (
            Pair(lambda x: x @ A.T, lambda y: 0 * (y @ A)),
            r"A A\^\+ A = A, .* 1.0e\+00 with Pair",
        ),
        (
            Pair(lambda x: x @ A.T, lambda y: y @ (A + torch.tensor([0.8, -0.6, 0.0]))),
            "symmetric",
        ),
        (Pair(lambda x: x @ A.T + 1, lambda y: y @ A), r"A A\^\+ A = A"),
        (Pair(lambda x: x.relu(), lambda y: y), r"A\^\+ A A\^\+"),
        (Pair(lambda x: x * float("nan"), lambda y: y), "A = A, got a relative error of nan"),
        (Pair(lambda x: x @ A.T, lambda y: y), r"returns data of shape \(4, 3\), got \(4, 1\)"),
    ],
)
def test_inverse_must_be_the_pseudo_inverse(operator, message):
    with pytest.raises(ValueError, match="operator: expected .*" + message):
        check_operator(operator, torch.zeros(4, 3, dtype=DOUBLE))


def test_inverse_that_returns_too_much():
    """A A^+ A = A holds, A^+ A A^+ = A^+ does not."""
    odd = Pair(lambda x: torch.cat([x[..., :1], 0 * x[..., :1]], -1), lambda y: y)
    with pytest.raises(ValueError, match=r"A\^\+ A A\^\+ = A\^\+"):
        check_operator(odd, torch.zeros(2, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Mask(torch.tensor([0.0, 0.5, 2.0])), ValueError, "0 and 1.* got 0.5 and 1 more"),
        (lambda: Mask(torch.tensor([0.0, float("nan")])), ValueError, "got nan and 0 more"),
        (lambda: Mask([0, 1]), TypeError, "mask: expected a tensor, got list"),
        (lambda: AveragePool(0), ValueError, "factor: expected an integer >= 1"),
        (lambda: AveragePool(2, dims=0), ValueError, "dims: expected"),
        (lambda: AveragePool(2.0), TypeError, "factor: expected an integer, got float"),
        (lambda: AveragePool(2)(torch.zeros(1, 4, 5)), ValueError, r"multiples of 2, .*4, 5"),
        (lambda: AveragePool(2)(torch.zeros(4)), ValueError, r"2 last axes .* got shape \(4,\)"),
        (lambda: Gray(0), ValueError, "channels"),
        (lambda: Gray()(torch.zeros(2, 4, 4)), ValueError, r"images \(\.\.\., 3, H, W\)"),
        (lambda: Gray().inverse(torch.zeros(3, 4, 4)), ValueError, r"gray: .*\(\.\.\., 1, H, W\)"),
        (lambda: Gray()(torch.zeros(3, 4)), ValueError, "expected images"),
        (lambda: Blur([1.0], (4,)), TypeError, "kernel: expected a tensor"),
        (lambda: Blur(torch.ones(5), (4,)), ValueError, r"no longer than the data's, \(4,\)"),
        (lambda: Blur(torch.ones(3, 3), (4,)), ValueError, "kernel: expected 1 axes"),
        (lambda: Blur(torch.ones(3), 4), TypeError, "size: expected a sequence, got int"),
        (lambda: Blur(torch.zeros(3), (4,)), ValueError, "non-zero"),
        (lambda: Blur(torch.tensor([float("nan")]), (4,)), ValueError, "kernel: expected finite"),
        (lambda: Blur(torch.ones(3), (4,), floor=1.0), ValueError, r"floor: .*\(0, 1\), got 1"),
        (lambda: Blur(torch.ones(3), (4,), floor=0.0), ValueError, "floor: .* got 0.0"),
        (lambda: Blur(torch.ones(3), (4,), floor="a"), TypeError, "floor: expected a number"),
        (lambda: Blur(torch.ones(3), (4,))(torch.zeros(2, 5)), ValueError, r"last axes \(4,\)"),
        (lambda: Matrix(torch.ones(3)), ValueError, r"rows: expected shape \(m, \*D\)"),
        (lambda: Matrix([[1.0]]), TypeError, "rows: expected a tensor"),
        (lambda: Matrix(torch.tensor([[float("inf")]])), ValueError, "rows: expected finite"),
        (lambda: Matrix(torch.ones(2, 3))(torch.zeros(2)), ValueError, r"data of shape \(3,\)"),
        (lambda: Matrix(torch.ones(2, 3)).inverse(torch.zeros(3)), ValueError, r"\(\.\.\., 2\)"),
        (lambda: check_operator(lambda x: x, torch.zeros(2)), TypeError, "LinearOperator"),
    ],
)
def test_invalid_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()
