"""The residual block and the attention, against direct formulas."""

import math
from typing import Any

import pytest
import torch
from support.tiny_networks import fill
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionkit.networks.blocks import ResidualBlock, SelfAttention
from diffusionkit.networks.layers import Style, default_or_zero_
from diffusionkit.networks.resampling import Downsample, Upsample


def style(dims: int = 2, **options: Any) -> Style:
    return Style(dims, **{"embedding_width": 8} | options)


def filled(*args: Any, **options: Any) -> ResidualBlock:
    block = ResidualBlock(*args, **options).double().eval()
    fill(block)
    return block


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], 8, dtype=torch.float64)


def norm(layer: nn.GroupNorm, x: Tensor, eps: float) -> Tensor:
    g = x.reshape(x.shape[0], layer.num_groups, -1)
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + eps).sqrt()
    ones = (1,) * (x.ndim - 2)
    return g.reshape(x.shape) * layer.weight.view(-1, *ones) + layer.bias.view(-1, *ones)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_residual_block_against_its_formula(adaptive: bool, rescale: bool) -> None:
    chosen = style(adaptive_scale=adaptive, rescale=rescale, eps=1e-3, activation=F.relu)
    block = filled(8, 12, chosen)
    x, emb = inputs(2, 8, 3, 5)
    h = F.conv2d(norm(block.norm_1, x, 1e-3).relu(), block.conv_1.weight, padding=1)
    h = h + block.conv_1.bias[:, None, None]
    shift = (emb @ block.embedding.weight.T + block.embedding.bias)[:, :, None, None]
    if adaptive:
        assert shift.shape[1] == 24
        h = norm(block.norm_2, h, 1e-3) * (1 + shift[:, :12]) + shift[:, 12:]
    else:
        h = norm(block.norm_2, h + shift, 1e-3)
    h = F.conv2d(h.relu(), block.conv_2.weight, block.conv_2.bias, padding=1)
    h = h + torch.einsum("oc,bchw->bohw", block.shortcut.weight[:, :, 0, 0], x)
    h = h + block.shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x, emb), h / math.sqrt(2) if rescale else h)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_residual_block_starts_as_scaled_identity(dims: int) -> None:
    x, emb = torch.randn(2, 8, *(4,) * dims), torch.randn(2, 8)
    out = ResidualBlock(8, 8, style(dims))(x, emb)
    torch.testing.assert_close(out, x / math.sqrt(2), rtol=0, atol=1e-4)
    plain = style(dims, rescale=False, initialize=default_or_zero_)
    assert torch.equal(ResidualBlock(8, 8, plain)(x, emb), x)


@pytest.mark.parametrize("resample", [Downsample(), Upsample((1, 3, 3, 1))])
def test_both_branches_are_resampled(resample: nn.Module) -> None:
    block = filled(8, 8, style(rescale=False), resample=resample)
    x, emb = inputs(2, 8, 4, 6)
    # Resampling comes between the activation and the first convolution.
    h = resample(F.silu(norm(block.norm_1, x, 1e-6)))
    h = block.conv_1(h) + block.embedding(emb)[:, :, None, None]
    h = block.conv_2(F.silu(norm(block.norm_2, h, 1e-6)))
    torch.testing.assert_close(block(x, emb), resample(x) + h)


def test_shortcut_only_where_needed() -> None:
    def projects(*args: Any, **options: Any) -> bool:
        return not isinstance(ResidualBlock(*args, style(), **options).shortcut, nn.Identity)

    assert not projects(8, 8)
    assert not projects(8, 8, resample=Upsample())
    assert projects(8, 12)
    assert projects(8, 8, project=True)


def test_scale_of_the_shortcut() -> None:
    torch.manual_seed(0)
    for scale in (1.0, 0.1):
        block = ResidualBlock(64, 128, style(), shortcut_scale=scale)
        assert block.shortcut.weight.shape == (128, 64, 1, 1)
        assert block.shortcut.weight.var().item() == pytest.approx(scale / 96, rel=0.05)


def test_without_an_embedding() -> None:
    block = filled(8, 8, style(embedding_width=None, adaptive_scale=True))
    assert block.embedding is None
    x, _ = inputs(2, 8, 3, 5)
    h = block.conv_1(F.silu(norm(block.norm_1, x, 1e-6)))
    h = block.conv_2(F.silu(norm(block.norm_2, h, 1e-6)))
    torch.testing.assert_close(block(x, None), (x + h) / math.sqrt(2))


def test_dropout_acts_on_activated_features_in_training_only() -> None:
    block = filled(8, 8, style(1, dropout=0.5, rescale=False))
    x, emb = inputs(2, 8, 4)
    given = []
    block.conv_2.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    expected = block(x, emb)
    assert torch.equal(block(x, emb), expected)
    block.train()
    assert not torch.equal(block(x, emb), block(x, emb))
    kept = given[-1] != 0
    assert 0.2 < kept.double().mean() < 0.8
    torch.testing.assert_close(given[-1][kept], 2 * given[0][kept])


def attention(shape: tuple[int, ...], heads: int = 1, **options: Any) -> SelfAttention:
    layer = SelfAttention(shape[1], Style(len(shape) - 2, **options), heads=heads).double()
    fill(layer)
    return layer


@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize(("heads", "rescale"), [(1, True), (4, False), (8, True)])
def test_attention_against_direct_softmax(
    spatial: tuple[int, ...], heads: int, rescale: bool
) -> None:
    layer = attention((2, 8, *spatial), heads, rescale=rescale, eps=1e-3)
    x, _ = inputs(2, 8, *spatial)
    w, b = layer.qkv.weight, layer.qkv.bias
    h = norm(layer.norm, x, 1e-3).flatten(2)
    qkv = torch.einsum("oc,bcn->bon", w, h) + b[:, None]
    q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.split(8, dim=1))
    logits = torch.einsum("bhcn,bhcm->bhnm", q, k) / math.sqrt(8 / heads)
    p = logits.exp() / logits.exp().sum(3, keepdim=True)
    a = torch.einsum("bhnm,bhcm->bhcn", p, v).reshape(2, 8, -1)
    a = torch.einsum("oc,bcn->bon", layer.out.weight, a) + layer.out.bias[:, None]
    expected = x + a.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected / math.sqrt(2) if rescale else expected)


def test_attention_is_permutation_equivariant() -> None:
    layer = attention((2, 8, 7), 2)
    x, _ = inputs(2, 8, 7)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    torch.testing.assert_close(layer(x[:, :, order]), layer(x)[:, :, order])


def test_attention_initialization_scales() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(64, style(1))
    for weight in layer.qkv.weight.chunk(3):
        assert weight.var().item() == pytest.approx(0.1 / 64, rel=0.1)
    assert layer.out.weight.abs().max() < 1e-5
    x = torch.randn(2, 64, 4)
    torch.testing.assert_close(layer(x), x / math.sqrt(2), rtol=0, atol=1e-4)


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="heads: expected a divisor of 8 channels, got 3"):
        SelfAttention(8, style(), heads=3)
