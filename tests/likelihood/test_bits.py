"""Bits per dimension."""

import math

import pytest
import torch

from diffusionkit import bits_per_dim


def test_bits_of_known_nats() -> None:
    nats = torch.tensor([0.0, 6 * math.log(2), -3 * math.log(2)], dtype=torch.float64)
    assert bits_per_dim(nats, 3).tolist() == pytest.approx([0, 2, -1])
    assert bits_per_dim(nats, (3, 2, 1)).tolist() == pytest.approx([0, 1, -0.5])


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="nats: expected a tensor"):
        bits_per_dim(3.0, 3)
    with pytest.raises(ValueError, match="dims"):
        bits_per_dim(torch.zeros(1), 0)
    with pytest.raises(ValueError, match="dims"):
        bits_per_dim(torch.zeros(1), (3, 0))
