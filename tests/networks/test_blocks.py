"""Layers, blocks, attention and resampling, against direct formulas."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from diffusionkit.networks.blocks import (
    ResidualBlock,
    SelfAttention,
    downsample_mean,
    upsample_nearest,
)
from diffusionkit.networks.layers import conv, group_norm, linear, variance_scaling_

block = partial(ResidualBlock, embedding_width=8, dropout=0.0)


def randomise(module: torch.nn.Module) -> None:
    """Give every parameter a size at which no part of the module is negligible."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)


@pytest.mark.parametrize(("shape", "fan_avg"), [((300, 200), 250), ((64, 32, 3, 3), 432)])
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_variance_scaling(shape: tuple[int, ...], fan_avg: float, scale: float) -> None:
    torch.manual_seed(0)
    w = variance_scaling_(torch.empty(shape, dtype=torch.float64), scale)
    variance = max(scale, 1e-10) / fan_avg
    assert w.var().item() == pytest.approx(variance, rel=0.03)
    assert w.abs().max().item() == pytest.approx(math.sqrt(3 * variance), rel=1e-2)
    assert w.abs().max().item() <= math.sqrt(3 * variance)


def test_biases_start_at_zero() -> None:
    assert not linear(3, 4).bias.any()
    assert not conv(2, 3, 4).bias.any()


@pytest.mark.parametrize(
    ("channels", "groups"), [(128, 32), (64, 16), (384, 32), (8, 2), (144, 24), (6, 1), (2, 1)]
)
def test_group_norm_groups(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert norm.num_groups == groups
    assert norm.eps == 1e-6


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_resampling_is_exact(dims: int) -> None:
    x = torch.randn(2, 3, *(4, 6, 2)[:dims], dtype=torch.float64)
    up = upsample_nearest(x)
    expected = x
    for d in range(2, 2 + dims):
        expected = expected.repeat_interleave(2, dim=d)
    assert torch.equal(up, expected)
    torch.testing.assert_close(downsample_mean(up), x, rtol=1e-15, atol=0)
    down = downsample_mean(x)
    corners = [x[(..., *index)] for index in _corners(dims)]
    torch.testing.assert_close(down, sum(corners[1:], corners[0]) / 2**dims)


def _corners(dims: int) -> list[tuple[slice, ...]]:
    even, odd = slice(0, None, 2), slice(1, None, 2)
    corners: list[tuple[slice, ...]] = [()]
    for _ in range(dims):
        corners = [(*c, s) for c in corners for s in (even, odd)]
    return corners


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_residual_block_starts_as_scaled_identity(dims: int) -> None:
    x, emb = torch.randn(2, 8, *(4,) * dims), torch.randn(2, 8)
    out = block(8, 8, dims=dims)(x, emb)
    torch.testing.assert_close(out, x / math.sqrt(2), rtol=0, atol=1e-4)


def test_residual_block_starts_as_its_resampled_shortcut() -> None:
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 8)
    layer = block(8, 8, dims=2, resample=downsample_mean)
    expected = layer.shortcut(downsample_mean(x)) / math.sqrt(2)
    torch.testing.assert_close(layer(x, emb), expected, rtol=0, atol=1e-4)


def test_shortcut_only_where_needed() -> None:
    identity = torch.nn.Identity
    assert isinstance(block(8, 8, dims=2).shortcut, identity)
    assert not isinstance(block(8, 12, dims=2).shortcut, identity)
    assert not isinstance(block(8, 8, dims=2, resample=upsample_nearest).shortcut, identity)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = ResidualBlock(8, 8, embedding_width=8, dims=1, dropout=0.5)
    randomise(layer)
    x, emb = torch.randn(2, 8, 4), torch.randn(2, 8)
    assert not torch.equal(layer(x, emb), layer(x, emb))
    layer.eval()
    assert torch.equal(layer(x, emb), layer(x, emb))


def _attention(shape: tuple[int, ...]) -> tuple[SelfAttention, Tensor]:
    torch.manual_seed(1)
    layer = SelfAttention(shape[1]).double()
    randomise(layer)
    return layer, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 2)])
def test_attention_against_direct_softmax(spatial: tuple[int, ...]) -> None:
    layer, x = _attention((2, 8, *spatial))
    w, b = layer.qkv.weight, layer.qkv.bias
    g = x.reshape(2, 2, -1)  # two groups
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    h = g.reshape(2, 8, -1) * layer.norm.weight[:, None] + layer.norm.bias[:, None]
    q, k, v = (
        torch.einsum("oc,bcn->bon", w[i : i + 8], h) + b[i : i + 8, None] for i in (0, 8, 16)
    )
    logits = torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8)
    p = logits.exp() / logits.exp().sum(2, keepdim=True)
    a = torch.einsum("bnm,bcm->bcn", p, v)
    a = torch.einsum("oc,bcn->bon", layer.out.weight, a) + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x), (x + a.reshape(x.shape)) / math.sqrt(2))


def test_attention_is_permutation_equivariant() -> None:
    layer, x = _attention((2, 8, 7))
    order = torch.randperm(7)
    torch.testing.assert_close(layer(x[:, :, order]), layer(x)[:, :, order])


def test_attention_initialisation_scales() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(64)
    for weight in layer.qkv.weight.chunk(3):
        assert weight.var().item() == pytest.approx(0.1 / 64, rel=0.1)
    assert layer.out.weight.abs().max() < 1e-5
    x = torch.randn(2, 64, 4)
    torch.testing.assert_close(layer(x), x / math.sqrt(2), rtol=0, atol=1e-4)
