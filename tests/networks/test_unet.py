"""Properties of all U-Nets, and the stages and levels they consist of."""

from typing import Any

import pytest
import torch
from support.tiny_networks import CLASSES, FAMILIES, TINY, arguments, fill, tiny
from torch import Tensor, nn

from diffusionkit.networks.unet import DecoderLevel, EncoderLevel, Stage

kinds = pytest.mark.parametrize("kind", FAMILIES)
classes = pytest.mark.parametrize("kind", CLASSES)


@classes
@pytest.mark.parametrize(("dims", "spatial"), [(1, (12,)), (2, (4, 8)), (3, (4, 8, 12))])
def test_shapes_in_every_dimension(kind: str, dims: int, spatial: tuple[int, ...]) -> None:
    net = tiny(kind, dims=dims, multipliers=(1, 2, 2), attention_levels=(1, 2), out_channels=5)
    out = net(**arguments(net, *spatial, batch=3))
    assert out.shape == (3, 10 if kind == "ADMUNet" else 5, *spatial)
    assert out.isfinite().all()
    assert net.dims == dims


@classes
@pytest.mark.parametrize("channels", [1, 5, 7])
def test_odd_numbers_of_channels(kind: str, channels: int) -> None:
    options = {"ADMUNet": {"learn_sigma": False}, "EDM2UNet": {"head_channels": 6}}.get(kind, {})
    net = tiny(kind, channels=channels, width=6, multipliers=(1, 3), **options)
    given = arguments(net)
    out = net(**given)
    assert out.shape == given["x"].shape == (2, channels, 4, 6)
    assert out.std() > 0.01


def starts_at_zero(kind: str) -> bool:
    return "ADM" in kind or "EDM2" in kind


@kinds
def test_starts_near_zero(kind: str) -> None:
    cls, options = FAMILIES[kind]
    torch.manual_seed(0)
    net = cls(**TINY | options)
    out = net(**arguments(net, dtype=torch.float32))
    assert out.abs().max() < 1e-3
    assert bool(out.any()) == (not starts_at_zero(kind))


@kinds
def test_samples_do_not_mix(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net, batch=3)
    together = net(**given)
    for i in range(3):
        alone = net(**{name: value[i : i + 1] for name, value in given.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


@kinds
def test_output_depends_on_every_input(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    out = net(**given)
    for name, value in given.items():
        if name == "noise_label" and kind == "separate FIR":
            continue  # it has no embedding
        changed = net(**given | {name: value.flip(0)})
        assert (changed - out).abs().flatten(1).amax(1).min() > 1e-4, name


def test_without_an_embedding_the_noise_label_is_ignored() -> None:
    net = tiny("separate FIR")
    given = arguments(net)
    assert torch.equal(net(**given), net(given["x"], torch.tensor([999, 0])))


@pytest.mark.parametrize("kind", ["everything", "ADM updown", "EDM2 everything"])
def test_a_missing_condition_equals_zeros(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    zeros = net(**given | {"condition": torch.zeros_like(given["condition"])})
    torch.testing.assert_close(net(**given | {"condition": None}), zeros)


@classes
def test_data_range_is_mapped_to_the_published_range(kind: str) -> None:
    plain, net = tiny(kind), tiny(kind, data_range=(-1.0, 4.0))
    given = arguments(net)
    moved = given | {"x": (given["x"] + 1) * 2.5 - 1}
    torch.testing.assert_close(net(**moved), plain(**given))


@kinds
def test_gradient_reaches_every_trained_parameter(kind: str) -> None:
    cls, options = FAMILIES[kind]
    torch.manual_seed(0)
    net = cls(**TINY | options).double()
    if starts_at_zero(kind):
        fill(net)
    net(**arguments(net)).pow(2).sum().backward()
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or not p.grad.any()] == []
    fourier = net.config.get("embedding") in ("fourier", "fourier_linear") or "EDM2" in kind
    assert len(list(net.parameters())) - len(trained) == fourier


@kinds
def test_state_dict_round_trip(kind: str) -> None:
    net = tiny(kind)
    other = type(net)(**net.config).double().eval()
    given = arguments(net)
    assert not torch.equal(net(**given), other(**given))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(**given), other(**given))


@classes
def test_dropout_acts_in_training_only(kind: str) -> None:
    net = tiny(kind, dropout=0.5)
    given = arguments(net)
    assert torch.equal(net(**given), net(**given))
    net.train()
    assert not torch.equal(net(**given), net(**given))
    probabilities = {m.p for m in net.modules() if isinstance(m, nn.Dropout)}
    assert probabilities == {0.5}
    # In every residual block of the network.
    count = sum(isinstance(m, nn.Dropout) for m in net.modules())
    assert count == sum(name.endswith("conv_1") for name, _ in net.named_modules())


@classes
def test_no_dropout_draws_no_random_numbers(kind: str) -> None:
    net = tiny(kind, dropout=0.0).train()
    given = arguments(net)
    state = torch.get_rng_state()
    net(**given)
    assert torch.equal(torch.get_rng_state(), state)


@classes
def test_integer_labels(kind: str) -> None:
    net = tiny(kind)
    given = arguments(net)
    noise_label = torch.tensor([3, 700])
    torch.testing.assert_close(
        net(**given | {"noise_label": noise_label}),
        net(**given | {"noise_label": noise_label.double()}),
        rtol=1e-4, atol=1e-4,  # integers are embedded in float32
    )  # fmt: skip


def test_inputs_are_not_modified() -> None:
    for kind in FAMILIES:
        net = tiny(kind)
        given = arguments(net)
        before = {name: value.clone() for name, value in given.items()}
        net(**given)
        assert all(torch.equal(given[name], before[name]) for name in given)


X, T = torch.zeros(2, 2, 4, 4), torch.ones(2)


def plain(options: dict[str, Any] | None = None) -> Any:
    cls, _ = FAMILIES["NCSNpp"]
    return cls(**TINY | (options or {}))


@pytest.mark.parametrize(
    ("x", "noise_label", "error", "message"),
    [
        (X[:, :1], T, ValueError, r"x: expected shape \(B, 2, H, W\), got \(2, 1, 4, 4\)"),
        (X[0], T, ValueError, r"x: expected shape \(B, 2, H, W\), got \(2, 4, 4\)"),
        (X[:0], T[:0], ValueError, r"expected a non-empty batch, got shape \(0, 2, 4, 4\)"),
        (X[..., :0], T, ValueError, r"expected a non-empty batch, got shape \(2, 2, 4, 0\)"),
        (X[..., :3], T, ValueError, r"divisible by 2, got \(4, 3\)"),
        (X[:, :, :1], T, ValueError, r"divisible by 2, got \(1, 4\)"),
        (X.to(torch.uint8), T, TypeError, "expected a floating-point tensor, got torch.uint8"),
        (X.to("meta"), T, ValueError, "x: expected the device of the network, cpu, got meta"),
        (X, T[0], ValueError, r"noise_label: expected shape \(2,\), got \(\)"),
        (X, T[:, None], ValueError, r"noise_label: expected shape \(2,\), got \(2, 1\)"),
        (X, T[:1], ValueError, r"noise_label: expected shape \(2,\), got \(1,\)"),
        (X, T.bool(), TypeError, "noise_label: expected real numbers, got torch.bool"),
        (X, T.to(torch.complex64), TypeError, "expected real numbers, got torch.complex64"),
        (X, T.to("meta"), ValueError, "noise_label: expected the device of x, cpu, got meta"),
    ],
)
def test_input_errors(x, noise_label, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain()(x, noise_label)


def test_shapes_are_named_in_every_dimension() -> None:
    for dims, letters in ((1, "L"), (3, "D, H, W")):
        with pytest.raises(ValueError, match=rf"\(B, 2, {letters}\), got \(2, 2, 4, 4\)"):
            plain({"dims": dims})(X, T)
    with pytest.raises(ValueError, match=r"divisible by 4, got \(4, 6\)"):
        plain({"multipliers": (1, 1, 1)})(torch.zeros(2, 2, 4, 6), T)


@pytest.mark.parametrize(
    ("num_classes", "class_labels", "error", "message"),
    [
        (None, torch.tensor([0, 1]), TypeError, r"num_classes=None.*got a tensor of shape \(2,\)"),
        (3, None, TypeError, "num_classes=3, got None"),
        (3, torch.tensor([0.0, 1.0]), TypeError, "torch.int64, got torch.float32"),
        (3, torch.tensor([0, 1], dtype=torch.int32), TypeError, "torch.int64, got torch.int32"),
        (3, torch.tensor([0]), ValueError, r"class_labels: expected shape \(2,\), got \(1,\)"),
        (3, torch.tensor([0, 3]), ValueError, r"in \[0, 3\), got values from 0 to 3"),
        (3, torch.tensor([-1, 2]), ValueError, r"in \[0, 3\), got values from -1 to 2"),
        (
            3,
            torch.tensor([0, 1], device="meta"),
            ValueError,
            "expected the device of x, cpu, got meta",
        ),
    ],
)
def test_class_errors(num_classes, class_labels, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain({"num_classes": num_classes})(X, T, class_labels)
    if num_classes is None:
        with pytest.raises(error, match=message):
            plain({"embedding": None})(X, T, class_labels)


C = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("features", "condition", "error", "message"),
    [
        (None, C, TypeError, r"condition_features=None.*got a tensor of shape \(2, 5\)"),
        (5, C.repeat(2, 1), ValueError, r"expected shape \(2, 5\), or \(5,\) .*, got \(4, 5\)"),
        (5, C[:, :4], ValueError, r"expected shape \(2, 5\), or \(5,\) .*, got \(2, 4\)"),
        (5, C.long(), TypeError, "condition: expected a floating-point tensor, got torch.int64"),
        (5, C.to("meta"), ValueError, "condition: expected the device of x, cpu, got meta"),
    ],
)
def test_condition_errors(features, condition, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain({"condition_features": features})(X, T, condition=condition)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conditions_are_converted_to_the_network(dtype) -> None:
    """A condition need not have the dtype that a score model gives to the input."""
    net = plain({"condition_features": 5, "low_res_channels": 1}).to(torch.bfloat16)
    given = {"condition": torch.ones(2, 5), "low_res": torch.ones(2, 1, 2, 2)}
    x = X.bfloat16()
    wanted = net(x, T, **{name: value.bfloat16() for name, value in given.items()})
    got = net(x, T, **{name: value.to(dtype) for name, value in given.items()})
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=1e-6)


L = torch.zeros(2, 1, 2, 2)


@pytest.mark.parametrize(
    ("channels", "low_res", "error", "message"),
    [
        (None, L, TypeError, r"low_res_channels=None.*got a tensor of shape \(2, 1, 2, 2\)"),
        (1, None, TypeError, "low_res_channels=1, got None"),
        (1, L[:1], ValueError, r"low_res: expected shape \(2, 1, H, W\), got \(1, 1, 2, 2\)"),
        (3, L, ValueError, r"low_res: expected shape \(2, 3, H, W\), got \(2, 1, 2, 2\)"),
        (1, L[..., 0], ValueError, r"low_res: expected shape .*got \(2, 1, 2\)"),
        (1, L[..., :0], ValueError, r"low_res: expected shape .*got \(2, 1, 2, 0\)"),
        (1, L.long(), TypeError, "low_res: expected a floating-point tensor, got torch.int64"),
        (1, L.to("meta"), ValueError, "low_res: expected the device of x, cpu, got meta"),
    ],
)
def test_low_resolution_errors(channels, low_res, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain({"low_res_channels": channels})(X, T, low_res=low_res)


@classes
def test_narrow_networks_depend_on_the_noise_label(kind: str) -> None:
    """With one channel per group, normalization would remove the noise embedding."""
    net = tiny(kind, **({"scale_shift": False} if kind == "ADMUNet" else {}))
    given = arguments(net)
    other = given | {"noise_label": given["noise_label"] * 0.7}
    assert (net(**given) - net(**other)).abs().max() > 1e-3


class Times(nn.Module):
    """Multiply by a number and, if there is one, add an embedding."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        x = x.sum(1, keepdim=True) * self.factor
        return x if emb is None else x + emb


EMB = torch.tensor([[10.0]])
ONE = torch.tensor([[1.0]])


def test_stage() -> None:
    assert Stage(Times(2.0))(ONE, EMB).item() == 12
    assert Stage(Times(2.0), Times(3.0))(ONE, EMB).item() == 36  # attention gets no embedding
    assert Stage(Times(2.0), Times(3.0))(ONE, None).item() == 6


def test_encoder_level_returns_every_output() -> None:
    level = EncoderLevel([Stage(Times(2.0)), Stage(Times(3.0))])
    assert [h.item() for h in level(ONE, EMB)] == [12, 46]


def test_decoder_level_takes_skips_from_the_end() -> None:
    level = DecoderLevel([Stage(Times(2.0)), Stage(Times(3.0))])
    skips = [100 * ONE, 5 * ONE, 7 * ONE]
    # ((1 + 7) 2 + 10 + 5) 3 + 10
    assert level(ONE, EMB, skips).item() == 103
    assert [s.item() for s in skips] == [100]


def test_decoder_level_puts_the_features_first() -> None:
    seen = []

    class Watch(Times):
        def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
            seen.append(x)
            return x

    DecoderLevel([Stage(Watch(1.0))])(ONE, None, [7 * ONE])
    assert torch.equal(seen[0], torch.tensor([[1.0, 7.0]]))
