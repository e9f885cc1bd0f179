"""The building blocks of NCSNv2 against their definitions."""

import math

import numpy as np
import pytest
import torch
from support import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionkit.networks.refinenet import (
    ChainedPooling,
    DilatedBlock,
    InstanceNormPlus,
    Refinement,
)


@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2), (1, 1)])
def test_instance_norm_plus_matches_its_definition(size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (2, 3, *size))
    alpha, beta, gamma = rng.normal(size=(3, 3))
    norm = InstanceNormPlus(3).double()
    with torch.no_grad():
        norm.alpha.copy_(torch.from_numpy(alpha))
        norm.beta.copy_(torch.from_numpy(beta))
        norm.gamma.copy_(torch.from_numpy(gamma))
    expected = np.empty_like(x)
    for b in range(2):
        means = [x[b, c].mean() for c in range(3)]
        spread = math.sqrt(sum((m - sum(means) / 3) ** 2 for m in means) / 2 + 1e-5)
        for c in range(3):
            inner = (x[b, c] - means[c]) / math.sqrt(((x[b, c] - means[c]) ** 2).mean() + 1e-5)
            outer = (means[c] - sum(means) / 3) / spread
            expected[b, c] = gamma[c] * (inner + alpha[c] * outer) + beta[c]
    got = norm(torch.from_numpy(x))
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_instance_norm_plus_distinguishes_close_means_in_half_precision() -> None:
    # Means of 100, 100.125, ...: the spacing of bfloat16 is 0.5 there.
    x = torch.full((1, 4, 8, 8), 100.0)
    for c in range(4):
        x[0, c].flatten()[: 16 * c] += 0.5
    x = x.bfloat16()
    norm = InstanceNormPlus(4).bfloat16()
    with torch.no_grad():
        norm.alpha.fill_(1)
        norm.gamma.fill_(1)
    got = norm(x)
    assert got.dtype == torch.bfloat16
    outer = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(5 / 3)
    torch.testing.assert_close(got.float().mean((0, 2, 3)), outer, rtol=0.01, atol=0.01)


def constant_norm(norm: InstanceNormPlus) -> None:
    """Make a normalization return ones for any input."""
    nn.init.zeros_(norm.gamma)
    nn.init.ones_(norm.beta)


def summing(layer: nn.Module) -> None:
    """Make a convolution of two channels sum over its window and average the channels."""
    nn.init.constant_(layer.weight, 0.5)
    nn.init.zeros_(layer.bias)


def windows(n: int, dilation: int) -> list[float]:
    """Return how many entries of a dilated 3-tap window lie within n positions."""
    return [float(sum(0 <= i + k < n for k in (-dilation, 0, dilation))) for i in range(n)]


def outer(counts: list[list[float]]) -> Tensor:
    out = torch.ones(())
    for row in counts:
        out = out[..., None] * torch.tensor(row)
    return out


@pytest.mark.parametrize("size", [(6,), (6, 10), (6, 4, 10)])
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_convolution_is_dilated_or_averaged_after(
    size: tuple[int, ...], dilation: int, first: bool
) -> None:
    block = DilatedBlock(2, 2, len(size), F.relu, dilation=dilation, first=first)
    constant_norm(block.norm_2)
    summing(block.conv_2)
    if first:
        nn.init.zeros_(block.shortcut.weight)
        nn.init.zeros_(block.shortcut.bias)
    counts = [windows(n, dilation) for n in size]
    if first and dilation == 1:
        counts = [[(a + b) / 2 for a, b in zip(c[::2], c[1::2], strict=True)] for c in counts]
    got = block(torch.zeros(1, 2, *size))
    torch.testing.assert_close(got, outer(counts).expand_as(got))


@pytest.mark.parametrize("dilation", [1, 2])
@torch.no_grad()
def test_first_convolution_is_dilated_too(dilation: int) -> None:
    block = DilatedBlock(2, 2, 2, F.relu, dilation=dilation)
    constant_norm(block.norm_1)
    summing(block.conv_1)
    nn.init.zeros_(block.conv_2.weight)
    nn.init.dirac_(block.conv_2.weight)
    nn.init.zeros_(block.conv_2.bias)
    counts = outer([windows(5, dilation), windows(6, dilation)]).expand(1, 2, 5, 6)
    expected = F.relu(block.norm_2(counts))
    torch.testing.assert_close(block(torch.zeros(1, 2, 5, 6)), expected)


def zero(layer: nn.Module) -> None:
    for p in layer.parameters():
        nn.init.zeros_(p)


@torch.no_grad()
def test_shortcuts() -> None:
    x = torch.randn(2, 2, 4, 6)

    plain = DilatedBlock(2, 2, 2, F.elu)
    zero(plain.conv_2)
    torch.testing.assert_close(plain(x), x)

    pooled = DilatedBlock(2, 3, 2, F.elu, first=True)
    zero(pooled.conv_2)
    w, b = pooled.shortcut.weight, pooled.shortcut.bias
    assert w.shape == (3, 2, 1, 1)
    means = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    expected = torch.einsum("oc,bchw->bohw", w[..., 0, 0], means) + b[:, None, None]
    torch.testing.assert_close(pooled(x), expected)

    dilated = DilatedBlock(2, 2, 2, F.elu, dilation=2, first=True)
    zero(dilated.conv_2)
    zero(dilated.shortcut)
    dilated.shortcut.weight[0, 0, 0, 2] = 1  # two rows above, two columns to the right
    expected = torch.zeros_like(x)
    expected[:, 0, 2:, :4] = x[:, 0, :2, 2:]
    torch.testing.assert_close(dilated(x), expected)


@torch.no_grad()
def test_chained_pooling_matches_its_definition() -> None:
    pooling = ChainedPooling(1, 1, F.relu)
    for factor, layer in zip((0.5, 3.0), pooling.convs, strict=True):
        nn.init.dirac_(layer.weight)
        layer.weight.mul_(factor)
    x = torch.randn(20, generator=seeded())
    positive = [max(value, 0.0) for value in x.tolist()]

    def greatest(i: int, reach: int) -> float:
        return max(positive[max(i - reach, 0) : i + reach + 1])

    # A maximum over 5 of maxima over 5 is one over 9.
    expected = [positive[i] + 0.5 * greatest(i, 2) + 1.5 * greatest(i, 4) for i in range(20)]
    torch.testing.assert_close(pooling(x[None, None]), torch.tensor(expected)[None, None])


@torch.no_grad()
def test_chained_pooling_has_square_windows() -> None:
    pooling = ChainedPooling(1, 2, F.relu)
    zero(pooling)
    nn.init.dirac_(pooling.convs[0].weight)
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 3] = 1
    expected = x.clone()
    expected[..., 2:7, 1:6] += 1
    torch.testing.assert_close(pooling(x), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@torch.no_grad()
def test_refinement_interpolates_with_aligned_corners(dims: int) -> None:
    refinement = Refinement([1, 1], 1, dims, F.relu, 1)
    zero(refinement)
    for layer in refinement.fuse:
        nn.init.dirac_(layer.weight)
    below = torch.tensor([0.0, 3.0, 4.0]).reshape(1, 1, 3, *(1,) * (dims - 1))
    x = torch.full((1, 1, 7, *(1,) * (dims - 1)), 10.0)
    expected = torch.tensor([10.0, 11.0, 12.0, 13.0, 13 + 1 / 3, 13 + 2 / 3, 14.0])
    torch.testing.assert_close(refinement(x, below).flatten(), expected)
    torch.testing.assert_close(refinement(x, x).flatten(), torch.full((7,), 20.0))


@torch.no_grad()
def test_residual_units_come_before_and_after() -> None:
    refinement = Refinement([1], 1, 1, F.relu, 3)
    zero(refinement)
    for layer in refinement.modules():
        if isinstance(layer, nn.Conv1d) and layer not in list(refinement.pooling.convs):
            nn.init.dirac_(layer.weight)
    x = torch.tensor([[[1.0, -1.0, 2.0]]])
    # x + relu(relu(x)) five times, with one more activation in between.
    torch.testing.assert_close(refinement(x), 32 * x.relu())
