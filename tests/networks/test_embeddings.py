"""Embeddings against numbers worked out by hand, and their precision."""

import math

import pytest
import torch

from diffusionkit.networks.embeddings import (
    ConditionEmbedding,
    PositionalEmbedding,
    SignedLogEmbedding,
)


def test_positional_hand_computed() -> None:
    # Three frequencies: 1, 1e-2, 1e-4.
    got = PositionalEmbedding(6)(torch.tensor([0.0, 100.0], dtype=torch.float64))
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
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_signed_log_hand_computed() -> None:
    # Three frequencies: 1/4, 2, 16; label sinh(1/2).
    label = torch.tensor([math.sinh(0.5), -math.sinh(0.5)], dtype=torch.float64)
    sines = [0.12467473338522769, 0.8414709848078965, 0.9893582466233818]  # of 1/8, 1, 8
    cosines = [0.992197667229329, 0.5403023058681398, -0.14550003380861354]
    got = SignedLogEmbedding(6)(label)
    expected = torch.tensor([sines + cosines, [-s for s in sines] + cosines], dtype=torch.float64)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("labels", [(0.01, 0.05), (-1.2, -1.1), (5.0, 6.0), (900.0, 990.0)])
def test_signed_log_separates_labels_of_every_magnitude(labels: tuple[float, float]) -> None:
    e = SignedLogEmbedding(32)(torch.tensor(labels))
    assert (e[0] - e[1]).norm() > 0.2


@pytest.mark.parametrize("embedding", [PositionalEmbedding, SignedLogEmbedding])
def test_half_precision_labels_are_embedded_in_float32(
    embedding: type[PositionalEmbedding] | type[SignedLogEmbedding],
) -> None:
    label = torch.tensor([896.0], dtype=torch.bfloat16)  # exact in bfloat16
    got = embedding(16)(label)
    assert got.dtype == torch.float32
    assert torch.equal(got, embedding(16)(label.float()))
    assert embedding(16)(torch.tensor([3])).dtype == torch.float32
    assert embedding(16)(label.double()).dtype == torch.float64


@pytest.mark.parametrize("embedding", [PositionalEmbedding, SignedLogEmbedding])
@pytest.mark.parametrize("features", [2, 5])
def test_features_out_of_range(
    embedding: type[PositionalEmbedding] | type[SignedLogEmbedding], features: int
) -> None:
    with pytest.raises(ValueError, match=f"even and at least 4, got {features}"):
        embedding(features)


def test_condition_embedding_formula() -> None:
    torch.manual_seed(0)
    net = ConditionEmbedding(PositionalEmbedding(4), 4, 6, num_classes=3).double()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    label = torch.tensor([1.5, 20.0], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    w = dict(net.named_parameters())
    frequency = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    e = torch.cat([torch.sin(label[:, None] * frequency), torch.cos(label[:, None] * frequency)], 1)
    hidden = e @ w["linear_1.weight"].T + w["linear_1.bias"]
    hidden = hidden / (1 + torch.exp(-hidden))
    expected = hidden @ w["linear_2.weight"].T + w["linear_2.bias"]
    expected = expected + w["classes.weight"][[2, 0]]
    torch.testing.assert_close(net(label, labels), expected)
