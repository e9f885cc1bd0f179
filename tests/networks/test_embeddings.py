"""Embeddings against values computed by hand, and their precision."""

import math

import pytest
import torch
from support.tiny_networks import fill
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionkit import EMA
from diffusionkit.networks import NCSNpp
from diffusionkit.networks.embeddings import (
    ConditionEmbedding,
    FourierEmbedding,
    PositionalEmbedding,
    SigmaTable,
    SignedLogEmbedding,
)
from diffusionkit.networks.layers import Style, over_level

EMBEDDINGS = [PositionalEmbedding, SignedLogEmbedding, FourierEmbedding]


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_positional_hand_computed() -> None:
    # Three frequencies: 1, 1e-2, 1e-4.
    got = PositionalEmbedding(6)(double([0.0, 100.0]))
    expected = [
        [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        [
            -0.5063656411097588,  # sin 100
            0.8414709848078965,  # sin 1
            0.009999833334166664,  # sin 0.01
            0.8623188722876839,  # cos 100
            0.5403023058681398,  # cos 1
            0.9999500004166653,  # cos 0.01
        ],
    ]
    torch.testing.assert_close(got, double(expected))


def test_positional_without_endpoint() -> None:
    # Published values of Nichol and Dhariwal's form, with frequencies 1, 0.1, 0.01 and 1e-3, and
    # cosines first.
    published = [
        [
            0.5403023058681398,
            0.9950041652780258,
            0.9999500004166653,
            0.9999995000000417,
            0.8414709848078965,
            0.09983341664682813,
            0.00999983333416666,
            0.000999999833333341,
        ],
        [
            0.47360903707997776,
            0.994201526214487,
            -0.8026372907761774,
            0.9688505404429625,
            -0.880735192890676,
            -0.10753290321006277,
            0.5964674169269248,
            0.24764617962605356,
        ],
    ]
    got = PositionalEmbedding(8, endpoint=False)(double([1.0, 250.25]))
    torch.testing.assert_close(got.roll(4, 1), double(published), rtol=1e-11, atol=1e-12)


def test_fourier_hand_computed() -> None:
    frequencies = torch.tensor([0.25, -1.0, 3.0])
    for log, noise_label in ((True, math.exp(1 / 3)), (False, 1 / 3)):
        embedding = FourierEmbedding(6, log=log)
        with torch.no_grad():
            embedding.frequencies.copy_(frequencies)
        # Angles pi / 6, -2 pi / 3 and 2 pi.
        root = math.sqrt(3) / 2
        expected = double([[0.5, -root, 0.0, root, -0.5, 1.0]])
        torch.testing.assert_close(embedding(double([noise_label])), expected, rtol=0, atol=1e-14)


def test_fourier_frequencies_are_drawn_at_their_scale() -> None:
    torch.manual_seed(0)
    for scale in (16.0, 0.5):
        drawn = FourierEmbedding(20_000, scale=scale).frequencies
        assert drawn.std().item() == pytest.approx(scale, rel=0.03)
        assert abs(drawn.mean().item()) < 5 * scale / 100
    assert FourierEmbedding(20_000).frequencies.std().item() == pytest.approx(16, rel=0.03)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_fourier_scale_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale: expected a finite number > 0, got {scale}"):
        FourierEmbedding(8, scale=scale)


def test_fourier_frequencies_are_saved_but_not_trained() -> None:
    torch.manual_seed(0)
    net = NCSNpp(1, width=4, multipliers=(1,), blocks=1, attention_levels=())
    name = "embedding.noise_features.frequencies"
    frequencies = net.get_parameter(name)
    before = frequencies.clone()
    assert not frequencies.requires_grad
    assert torch.equal(net.state_dict()[name], frequencies)
    ema = EMA(net, decay=0.9)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        x, sigma = torch.randn(2, 1, 4, 4), torch.rand(2) + 0.5
        optimizer.zero_grad()
        (net(x, sigma) - x).square().mean().backward()
        optimizer.step()
        ema.update(net)
    assert frequencies.grad is None
    assert torch.equal(frequencies, before)
    averaged = ema.model.get_parameter(name)
    torch.testing.assert_close(averaged, before, rtol=1e-7, atol=0)
    other = NCSNpp(1, width=4, multipliers=(1,), blocks=1, attention_levels=())
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.get_parameter(name), before)
    assert net.double().get_parameter(name).dtype == torch.float64
    assert net.to("meta").get_parameter(name).is_meta


def test_signed_log_hand_computed() -> None:
    # Three frequencies: 1/4, 2, 16; label sinh(1/2).
    noise_label = double([math.sinh(0.5), -math.sinh(0.5)])
    sines = [0.12467473338522769, 0.8414709848078965, 0.9893582466233818]  # of 1/8, 1, 8
    cosines = [0.992197667229329, 0.5403023058681398, -0.14550003380861354]
    got = SignedLogEmbedding(6)(noise_label)
    expected = double([sines + cosines, [-s for s in sines] + cosines])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("noise_labels", [(0.01, 0.05), (-1.2, -1.1), (5.0, 6.0), (900.0, 990.0)])
def test_signed_log_separates_labels_of_every_magnitude(noise_labels: tuple[float, float]) -> None:
    e = SignedLogEmbedding(32)(torch.tensor(noise_labels))
    assert (e[0] - e[1]).norm() > 0.2


@pytest.mark.parametrize("kind", [*EMBEDDINGS, lambda _: SigmaTable((2.0, 1.0, 0.5, 0.25))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_labels_in_half_precision_are_refused(kind, dtype) -> None:
    """In bfloat16, 999 and 997 are both 1000."""
    with pytest.raises(TypeError, match=rf"noise_label: expected float32.*, got {dtype}"):
        kind(16)(torch.tensor([3.0], dtype=dtype))


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_are_in_float32_at_least(kind: type[nn.Module]) -> None:
    assert kind(16)(torch.tensor([3])).dtype == torch.float32
    assert kind(16)(torch.tensor([3.0]).double()).dtype == torch.float64


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("features", [2, 5])
def test_features_out_of_range(kind: type[nn.Module], features: int) -> None:
    with pytest.raises(ValueError, match=f"features: expected an even number >= 4, got {features}"):
        kind(features)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("activation", [F.silu, F.relu])
def test_condition_embedding_formula(late: bool, activation) -> None:
    net = ConditionEmbedding(
        PositionalEmbedding(4),
        4,
        6,
        num_classes=3,
        condition_features=2,
        late_classes=late,
        style=None if activation is F.silu else Style(1, activation=activation),
    ).double()
    fill(net, 1.0)
    noise_label, class_labels = double([1.5, 20.0]), torch.tensor([2, 0])
    condition = double([[0.5, -1.0], [2.0, 0.25]])
    w = dict(net.named_parameters())
    frequency = double([1.0, 1e-4])
    e = torch.cat(
        [torch.sin(noise_label[:, None] * frequency), torch.cos(noise_label[:, None] * frequency)],
        1,
    )
    e = e + condition @ w["condition.weight"].T
    classes = w["classes.weight"][[2, 0]]
    assert classes.shape[1] == (6 if late else 4)
    if not late:
        e = e + classes
    hidden = activation(e @ w["linear_1.weight"].T + w["linear_1.bias"])
    expected = hidden @ w["linear_2.weight"].T + w["linear_2.bias"]
    if late:
        expected = expected + classes
    got = net(noise_label, class_labels, condition)
    torch.testing.assert_close(got, activation(expected))
    without = net(noise_label, class_labels)
    torch.testing.assert_close(net(noise_label, class_labels, torch.zeros_like(condition)), without)
    assert (got - without).abs().max() > 1e-3


def test_condition_embedding_is_initialized_by_its_style() -> None:
    scales = []
    style = Style(1, initialize=lambda layer, scale: scales.append(scale))
    ConditionEmbedding(PositionalEmbedding(4), 4, 6, style=style)
    assert scales == [1.0, 1.0]
    net = ConditionEmbedding(PositionalEmbedding(4), 4, 6)
    assert not net.linear_1.bias.any()
    assert not net.linear_2.bias.any()


@pytest.mark.parametrize("name", ["num_classes", "condition_features"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError)])
def test_condition_embedding_errors(name: str, value: float, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name}: expected an integer.*got"):
        ConditionEmbedding(PositionalEmbedding(4), 4, 6, **{name: value})


def test_sigma_table() -> None:
    table = SigmaTable((50.0, 1 / 3, 0.01))
    expected = double([0.01, 50.0, 1 / 3])
    for dtype in (torch.int64, torch.float32, torch.float64):
        assert torch.equal(table(torch.tensor([2, 0, 1], dtype=dtype)), expected)
    assert torch.equal(table.half()(torch.tensor([2, 0, 1])), expected)  # keeps its precision
    assert not table.state_dict()
    assert table.to("meta").sigmas.is_meta
    assert torch.equal(table.to_empty(device="cpu")(torch.tensor([2, 0, 1])), expected)


@pytest.mark.parametrize(("noise_label", "low", "high"), [(3.0, 0.0, 3.0), (-1.0, -1.0, 0.0)])
def test_level_index_out_of_range(noise_label: float, low: float, high: float) -> None:
    message = rf"noise_label: expected the index .* in \[0, 3\), got values from {low} to {high}"
    with pytest.raises(ValueError, match=message):
        SigmaTable((3.0, 2.0, 1.0))(torch.tensor([0.0, noise_label]))


@pytest.mark.parametrize("sigmas", [(), (1.0, 0.0), (-1.0,), (1.0, math.inf), (math.nan, 1.0)])
def test_sigmas_out_of_range(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sigmas: expected finite numbers > 0, got"):
        SigmaTable(sigmas)


def test_frequencies_keep_their_precision_in_half_precision() -> None:
    torch.manual_seed(0)
    embedding = FourierEmbedding(64)
    exact, noise_label = embedding.frequencies.clone(), torch.tensor([0.02, 50.0])
    expected = embedding(noise_label)
    assert torch.equal(embedding.bfloat16().half().frequencies, exact)
    assert torch.equal(embedding(noise_label), expected)
    assert embedding.double().frequencies.dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "embedding",
    [PositionalEmbedding(4), SignedLogEmbedding(4), FourierEmbedding(4, log=False)],
    ids=lambda embedding: type(embedding).__name__,
)
def test_labels_that_are_not_finite_are_refused(embedding, bad: float) -> None:
    with pytest.raises(ValueError, match="noise_label: expected finite numbers, since the network"):
        embedding(torch.tensor([1.0, bad]))
    for fine in (-3.0, 0.0, 1e6):
        assert embedding(torch.tensor([1.0, fine])).isfinite().all()


@pytest.mark.parametrize("bad", [0.0, -0.4, math.nan, math.inf])
def test_labels_without_a_logarithm_or_a_quotient_are_refused(bad: float) -> None:
    noise_label = torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match=r"noise_label: expected finite numbers > 0.*SigmaLabel"):
        FourierEmbedding(4)(noise_label)
    with pytest.raises(ValueError, match=r"noise_label: expected finite numbers > 0.*divides"):
        over_level(torch.zeros(2, 3, 4), noise_label)
