"""The multi-layer perceptron."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusionkit.networks import MLP


def small(**options: Any) -> MLP:
    """Build a small network in which no part is negligible."""
    torch.manual_seed(0)
    net = MLP(**{"features": 3, "width": 16, "depth": 2, **options}).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def inputs(n: int) -> tuple[Tensor, Tensor]:
    """Draw inputs and noise labels."""
    torch.manual_seed(1)
    return torch.randn(n, 3, dtype=torch.float64), 999 * torch.rand(n, dtype=torch.float64)


def test_against_its_formula() -> None:
    net = small(depth=1, out_features=2, num_classes=2)
    x, t = inputs(4)
    class_labels = torch.tensor([0, 1, 1, 0])
    s = net.state_dict()

    def linear(name: str, a: Tensor) -> Tensor:
        return a @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, a: Tensor) -> Tensor:
        a = a - a.mean(1, keepdim=True)
        a = a / (a.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return a * s[f"{name}.weight"] + s[f"{name}.bias"]

    def silu(a: Tensor) -> Tensor:
        return a / (1 + (-a).exp())

    frequency = torch.tensor([2 ** (-2 + 6 * i / 15) for i in range(16)], dtype=torch.float64)
    angle = torch.tensor([math.asinh(v) for v in t], dtype=torch.float64)[:, None] * frequency
    features = (
        torch.cat([angle.sin(), angle.cos()], 1) + s["embedding.classes.weight"][class_labels]
    )
    emb = silu(linear("embedding.linear_2", silu(linear("embedding.linear_1", features))))
    h = linear("input", x)
    modulation = linear("layers.0.modulation", emb)
    r = norm("layers.0.norm", h) * (1 + modulation[:, :16]) + modulation[:, 16:]
    h = h + linear("layers.0.linear_2", silu(linear("layers.0.linear_1", r)))
    expected = linear("output", silu(norm("output_norm", h)))
    torch.testing.assert_close(net(x, t, class_labels), expected)


def test_a_condition_is_further_input() -> None:
    net, plain = small(condition_features=2), small(features=5, out_features=3)
    plain.load_state_dict(net.state_dict())
    x, t = inputs(4)
    condition = torch.randn(4, 2, dtype=torch.float64)
    expected = plain(torch.cat([x, condition], 1), t)
    torch.testing.assert_close(net(x, t, condition=condition), expected)
    alone = net(x[1:2], t[1:2], condition=condition[1])
    torch.testing.assert_close(alone, expected[1:2])
    assert (net(x, t, condition=2 * condition) - expected).abs().max() > 1e-3


def test_starts_near_zero() -> None:
    assert MLP(2)(torch.randn(8, 2), torch.rand(8)).abs().max() < 1e-3


@pytest.mark.parametrize("noise_label", [0.01, 0.3, -1.2, 30.0, 900.0])
def test_depends_on_noise_labels_of_every_magnitude(noise_label: float) -> None:
    net = small()
    x, _ = inputs(1)
    t = torch.tensor([noise_label], dtype=torch.float64)
    assert (net(x, t) - net(x, 1.5 * t)).abs().max() > 1e-3


def test_depends_on_class() -> None:
    net = small(num_classes=2)
    x, t = inputs(1)
    assert (net(x, t, torch.tensor([0])) - net(x, t, torch.tensor([1]))).abs().max() > 1e-3


def test_samples_do_not_mix() -> None:
    net = small()
    x, t = inputs(3)
    together = net(x, t)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], net(x[i : i + 1], t[i : i + 1]))


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    net = MLP(3, width=16, num_classes=2).double()
    x, t = inputs(4)
    net(x, t, torch.tensor([0, 1, 0, 1])).pow(2).sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_state_dict_round_trip() -> None:
    net, other = small(), MLP(3, width=16, depth=2).double()
    x, t = inputs(2)
    assert not torch.equal(net(x, t), other(x, t))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x, t), other(x, t))


def test_compiles_in_one_graph() -> None:
    net = small(num_classes=2, depth=1)
    x, t = inputs(4)
    class_labels = torch.tensor([0, 1, 1, 0])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, class_labels), net(x, t, class_labels))


def test_autocast() -> None:
    net = small(num_classes=2).float()
    x, t = (a.float() for a in inputs(4))
    class_labels = torch.tensor([0, 1, 1, 0])
    expected = net(x, t, class_labels)
    with torch.autocast("cpu", torch.bfloat16):
        error = (net(x, t, class_labels).float() - expected).norm() / expected.norm()
    assert 0 < error < 0.05


def test_learns_the_noise_of_a_two_point_mixture() -> None:
    # The data are +-(1, 0): the best noise prediction is (x - alpha x0_hat) / sigma with
    # x0_hat = tanh(alpha x_1 / sigma^2) (1, 0). Predicting zero leaves an error near 1/2.
    torch.manual_seed(0)
    net = MLP(2, width=64, depth=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    errors = []
    for _ in range(300):
        t = torch.rand(256) * 0.95 + 0.05
        alpha = torch.exp(-5 * t**2)[:, None]
        sigma = (1 - alpha**2).sqrt()
        x0 = torch.zeros(256, 2)
        x0[:, 0] = torch.randint(2, (256,)) * 2.0 - 1
        noise = torch.randn(256, 2)
        x = alpha * x0 + sigma * noise
        prediction = net(x, 999 * t)
        best = x / sigma
        best[:, :1] -= alpha / sigma * torch.tanh(alpha * x[:, :1] / sigma**2)
        errors.append((prediction - best).square().mean().item())
        optimizer.zero_grad()
        (prediction - noise).square().mean().backward()
        optimizer.step()
    assert errors[0] > 0.5
    assert sum(errors[-20:]) / 20 < 0.03


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": 0}, ValueError, "features: expected an integer >= 1, got 0"),
        ({"out_features": 0}, ValueError, "out_features: expected an integer >= 1, got 0"),
        ({"width": 1}, ValueError, "width: expected an integer >= 2, got 1"),
        ({"depth": 0}, ValueError, "depth: expected an integer >= 1, got 0"),
        ({"depth": True}, TypeError, "depth: expected an integer, got bool"),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"condition_features": 0}, ValueError, "condition_features: expected an integer >= 1"),
    ],
)
def test_constructor_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLP(**{"features": 2, **options})


X = torch.zeros(2, 3)
T = torch.zeros(2)


@pytest.mark.parametrize(
    ("x", "noise_label", "class_labels", "error", "message"),
    [
        (X[:, :2], T, None, ValueError, r"\(B, 3\), got \(2, 2\)"),
        (X[:, :, None], T, None, ValueError, r"\(B, 3\), got \(2, 3, 1\)"),
        (X[:0], T[:0], None, ValueError, "expected a non-empty batch"),
        (X, T[:1], None, ValueError, r"noise_label: expected shape \(2,\), got \(1,\)"),
        (X, T, torch.tensor([0, 0]), TypeError, "class_labels: expected None"),
    ],
)
def test_input_errors(
    x: Tensor,
    noise_label: Tensor,
    class_labels: Tensor | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        MLP(3, width=8)(x, noise_label, class_labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_input_of_another_dtype_is_cast(dtype) -> None:
    net = MLP(3).to(dtype)
    assert torch.equal(net(X, T), net(X.to(dtype), T))
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch\.int64"):
        net(X.long(), T)
