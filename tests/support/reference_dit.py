"""A second implementation of DiT, patch by patch, with attention and rotations written out."""

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusionkit.networks import DiT


def waves(position: int, count: int) -> tuple[list[float], list[float]]:
    angles = [position / 10000 ** (i / count) for i in range(count)]
    return [math.sin(a) for a in angles], [math.cos(a) for a in angles]


def sincos(place: tuple[int, ...], width: int) -> Tensor:
    """The embedding of one patch: the last axis first, sines before cosines, then zeros."""
    found: list[float] = []
    for position in reversed(place):
        sines, cosines = waves(position, width // (2 * len(place)))
        found += sines + cosines
    return torch.tensor(found + [0.0] * (width - len(found)), dtype=torch.float64)


def turn(place: tuple[int, ...], features: int) -> Tensor:
    """The rotation of one patch as complex numbers of modulus 1, features / 2 of them."""
    found: list[complex] = []
    for position in place:
        sines, cosines = waves(position, features // (2 * len(place)))
        found += [complex(c, s) for c, s in zip(cosines, sines, strict=True)]
    return torch.tensor(found + [1.0] * (features // 2 - len(found)), dtype=torch.complex128)


def linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.detach().t() + layer.bias.detach()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normalize(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(
        x.var(-1, keepdim=True, unbiased=False) + 1e-6
    )


def modulations(module: Any, emb: Tensor) -> list[Tensor]:
    return [part[None] for part in linear(emb, module.modulation).split(emb.shape[-1])]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(x: Tensor, layer: Any, rotations: list[Tensor] | None) -> Tensor:
    width, heads = x.shape[1], layer.heads
    d = width // heads
    qkv = linear(x, layer.qkv)
    out = torch.zeros_like(x)
    for head in range(heads):
        q, k, v = (
            qkv[:, kind * width + head * d : kind * width + (head + 1) * d] for kind in range(3)
        )
        if rotations is None:
            products = q @ k.t()
        else:
            turns = torch.stack(rotations)
            q, k = (torch.complex(z[:, : d // 2], z[:, d // 2 :]) * turns for z in (q, k))
            products = (q @ k.conj().t()).real
        weights = torch.exp(products / math.sqrt(d))
        out[:, head * d : (head + 1) * d] = weights / weights.sum(1, keepdim=True) @ v
    return linear(out, layer.out)


@torch.no_grad()
def reference(
    net: DiT,
    x: Tensor,
    noise_label: Tensor,
    class_labels: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Evaluate a network in float64, one sample at a time."""
    config: dict[str, Any] = net.config
    low, high = config["data_range"]
    patch = config["patch_size"]
    patches = (patch,) * config["dims"] if isinstance(patch, int) else tuple(patch)
    width = config["width"]
    out_channels = net.head.linear.out_features // math.prod(patches)
    samples = []
    for n, sample in enumerate(2 * (x - low) / (high - low) - 1):
        frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        angle = noise_label[n] * frequencies
        emb = torch.cat([torch.sin(angle), torch.cos(angle)])
        if condition is not None:
            emb = emb + net.embedding.condition.weight.detach() @ condition[n]
        emb = linear(silu(linear(emb, net.embedding.linear_1)), net.embedding.linear_2)
        if class_labels is not None:
            emb = emb + net.embedding.classes.weight.detach()[class_labels[n]]
        emb = silu(emb)

        grid = [size // p for size, p in zip(sample.shape[1:], patches, strict=True)]
        places = list(itertools.product(*map(range, grid)))
        slices = [
            tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patches, strict=True))
            for place in places
        ]
        h = torch.stack([linear(sample[(slice(None), *s)].reshape(-1), net.input) for s in slices])
        rotations = None
        if config["positions"] == "sincos":
            h = h + torch.stack([sincos(place, width) for place in places])
        else:
            rotations = [turn(place, width // config["heads"]) for place in places]
        for block in net.blocks:
            b_1, a_1, g_1, b_2, a_2, g_2 = modulations(block, emb)
            h = h + g_1 * attend(normalize(h) * (1 + a_1) + b_1, block.attention, rotations)
            r = normalize(h) * (1 + a_2) + b_2
            mlp = block.feed_forward
            h = h + g_2 * linear(gelu(linear(r, mlp.linear_1)), mlp.linear_2)
        shift, scale = modulations(net.head, emb)
        h = linear(normalize(h) * (1 + scale) + shift, net.head.linear)
        out = torch.zeros(out_channels, *sample.shape[1:], dtype=torch.float64)
        for token, s in zip(h, slices, strict=True):
            # The channel is the fastest index of a token.
            values = token.view(*patches, out_channels)
            out[(slice(None), *s)] = values.permute(-1, *range(len(patches)))
        samples.append(out)
    assert np.prod(grid) == len(places)
    return torch.stack(samples)
