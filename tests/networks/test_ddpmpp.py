"""DDPM++ as a whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusionkit.networks import DDPMpp

TINY: dict[str, Any] = {"channels": 2, "width": 8, "multipliers": (1, 2), "blocks": 1}


def tiny(**options: Any) -> DDPMpp:
    """Build a small network, in evaluation mode, all of whose parts matter."""
    torch.manual_seed(0)
    net = DDPMpp(**{**TINY, **options}).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Draw an input and labels."""
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64), 999 * torch.rand(shape[0], dtype=torch.float64)


@pytest.mark.parametrize(("blocks", "count"), [(4, 61_804_419), (8, 106_632_579)])
def test_parameter_count(blocks: int, count: int) -> None:
    with torch.device("meta"):
        net = DDPMpp(channels=3, blocks=blocks)
    assert sum(p.numel() for p in net.parameters()) == count


def test_starts_near_zero() -> None:
    x, t = torch.randn(2, 2, 8, 8), torch.rand(2)
    assert DDPMpp(**TINY)(x, t).abs().max() < 1e-3


@pytest.mark.parametrize(("dims", "spatial"), [(1, (12,)), (2, (4, 8)), (3, (4, 8, 12))])
def test_shapes_in_every_dimension(dims: int, spatial: tuple[int, ...]) -> None:
    net = tiny(dims=dims, multipliers=(1, 2, 2), attention_levels=(1, 2), out_channels=5)
    x, t = inputs(2, 2, *spatial)
    out = net(x, t)
    assert out.shape == (2, 5, *spatial)
    assert out.isfinite().all()


def test_attention_sits_at_its_levels() -> None:
    def attentions(levels: tuple[int, ...]) -> list[str]:
        net = DDPMpp(1, width=8, multipliers=(1, 2, 3), blocks=2, attention_levels=levels)
        return [n.removesuffix(".attention.qkv") for n, _ in net.named_modules() if "qkv" in n]

    assert attentions(()) == ["middle.0"]
    encoder, decoder = ["encoder.1.stages.0", "encoder.1.stages.1"], ["decoder.1.stages.2"]
    assert attentions((1,)) == [*encoder, "middle.0", *decoder]


def test_depends_on_label_and_class() -> None:
    net = tiny(num_classes=2)
    x, t = inputs(1, 2, 4, 4)
    zero, one = torch.tensor([0]), torch.tensor([1])
    out = net(x, t, zero)
    assert (net(x, t + 1, zero) - out).abs().max() > 1e-3
    assert (net(x, t, one) - out).abs().max() > 1e-3


def test_samples_do_not_mix() -> None:
    net = tiny(num_classes=3)
    x, t = inputs(3, 2, 4, 4)
    labels = torch.tensor([0, 1, 2])
    together = net(x, t, labels)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    net = DDPMpp(**TINY, num_classes=2).double()  # as initialised: nothing may be switched off
    x, t = inputs(2, 2, 4, 4)
    net(x, t, torch.tensor([0, 1])).pow(2).sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_state_dict_round_trip() -> None:
    net, other = tiny(), DDPMpp(**TINY).double().eval()
    x, t = inputs(2, 2, 4, 4)
    assert not torch.equal(net(x, t), other(x, t))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x, t), other(x, t))


def test_channels_last() -> None:
    net = tiny()
    x, t = inputs(2, 2, 4, 4)
    expected = net(x, t)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = net(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_autocast() -> None:
    net = tiny().float()
    x, t = (a.float() for a in inputs(2, 2, 4, 4))
    expected = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, t)
        with pytest.raises(TypeError, match="uint8"):
            net(x.to(torch.uint8), t)
    assert got.dtype == torch.bfloat16
    error = (got.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.05


def test_compiles_in_one_graph() -> None:
    net = tiny(num_classes=2)
    x, t = inputs(2, 2, 4, 4)
    labels = torch.tensor([0, 1])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, labels), net(x, t, labels))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of inductor itself
def test_compiles_with_inductor() -> None:
    net = tiny().float()
    x, t = (a.float() for a in inputs(2, 2, 4, 4))
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x, t), net(x, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"channels": 1.5}, TypeError, "channels must be an int, got 1.5"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"),
        ({"dims": 4}, ValueError, "dims must be 1, 2 or 3, got 4"),
        ({"width": 7}, ValueError, "width must be even and at least 4, got 7"),
        ({"multipliers": ()}, ValueError, "multipliers .* got none"),
        ({"multipliers": (1, 0)}, ValueError, "multipliers must be at least 1, got 0"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1, got 0"),
        ({"attention_levels": (2,)}, ValueError, r"attention_levels must be in \[0, 2\).*got 2"),
        ({"attention_levels": (-1,)}, ValueError, "attention_levels .* got -1"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ],
)
def test_constructor_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DDPMpp(**{**TINY, **options})


X = torch.zeros(2, 2, 4, 4)
T = torch.zeros(2)


@pytest.mark.parametrize(
    ("x", "label", "error", "message"),
    [
        (X[:, :1], T, ValueError, r"\(B, 2, H, W\), got \(2, 1, 4, 4\)"),
        (X[0], T, ValueError, r"\(B, 2, H, W\), got \(2, 4, 4\)"),
        (X[:0], T[:0], ValueError, r"must not be empty, got shape \(0, 2, 4, 4\)"),
        (X[..., :3], T, ValueError, r"divisible by 2, got \(4, 3\)"),
        (X.double(), T, TypeError, "torch.float32 like the network, got torch.float64"),
        (X.to(torch.uint8), T, TypeError, "torch.float32 like the network, got torch.uint8"),
        (X.to("meta"), T, ValueError, "x must be on cpu like the network, got meta"),
        (X, T[0], ValueError, r"label must have shape \(2,\), got \(\)"),
        (X, T[:, None], ValueError, r"label must have shape \(2,\), got \(2, 1\)"),
        (X, T[:1], ValueError, r"label must have shape \(2,\), got \(1,\)"),
        (X, T.bool(), TypeError, "label must be real, got torch.bool"),
        (X, T.to("meta"), ValueError, "label must be on cpu like x, got meta"),
    ],
)
def test_input_errors(x: Tensor, label: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DDPMpp(**TINY)(x, label)


@pytest.mark.parametrize(
    ("num_classes", "labels", "error", "message"),
    [
        (None, torch.tensor([0, 1]), TypeError, r"num_classes=None.*got a tensor of shape \(2,\)"),
        (3, None, TypeError, "num_classes=3, got None"),
        (3, torch.tensor([0.0, 1.0]), TypeError, "torch.int64, got torch.float32"),
        (3, torch.tensor([0, 1], dtype=torch.int32), TypeError, "torch.int64, got torch.int32"),
        (3, torch.tensor([0]), ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        (3, torch.tensor([0, 3]), ValueError, r"in \[0, 3\), got values 0 to 3"),
        (3, torch.tensor([-1, 2]), ValueError, r"in \[0, 3\), got values -1 to 2"),
        (3, torch.tensor([0, 1], device="meta"), ValueError, "labels must be on cpu .* got meta"),
    ],
)
def test_class_errors(
    num_classes: int | None, labels: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DDPMpp(**TINY, num_classes=num_classes)(X, T, labels)
