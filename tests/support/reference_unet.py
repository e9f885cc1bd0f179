"""A second implementation of the U-Nets in numpy, float64, from the papers' descriptions.

Only the names of tensors and options are the library's.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionkit.networks.unet import UNet

Array = NDArray[Any]

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
    "leaky_relu": lambda x: np.where(x > 0, x, x / 5),
}


def along_every_axis(x: Array, matrices: Sequence[Array]) -> Array:
    """Multiply each spatial axis by its matrix."""
    for axis, matrix in enumerate(matrices, start=2):
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x


def filtered(x: Array, taps: Sequence[float], up: int, down: int, pads: tuple[int, int]) -> Array:
    """Put up - 1 zeros after each entry, pad, filter with a sum of `up`, keep every down-th."""
    k = np.array(taps, dtype=float)
    k = up * k / k.sum()
    matrices = []
    for n in x.shape[2:]:
        matrix = np.zeros(((n * up + sum(pads) - len(k)) // down + 1, n))
        for i in range(len(matrix)):
            for m in range(n):
                j = m * up + pads[0] - i * down  # where entry m lies in the i-th window
                if 0 <= j < len(k):
                    matrix[i, m] = k[len(k) - 1 - j]
        matrices.append(matrix)
    return along_every_axis(x, matrices)


def doubled(x: Array, taps: Sequence[float] | None) -> Array:
    """Upsample: repeat every entry, or filter."""
    if taps is not None:
        p = len(taps) - 2
        return filtered(x, taps, 2, 1, ((p + 1) // 2 + 1, p // 2))
    return along_every_axis(x, [np.kron(np.eye(n), [[1.0], [1.0]]) for n in x.shape[2:]])


def halved(x: Array, taps: Sequence[float] | None) -> Array:
    """Downsample: average two neighbors, or filter."""
    if taps is not None:
        p = len(taps) - 2
        return filtered(x, taps, 1, 2, ((p + 1) // 2, p // 2))
    return along_every_axis(x, [np.kron(np.eye(n // 2), [[0.5, 0.5]]) for n in x.shape[2:]])


def interpolated(x: Array, sizes: Sequence[int]) -> Array:
    """Interpolate linearly between pixel centers, constant beyond the outer ones."""
    matrices = []
    for old, new in zip(x.shape[2:], sizes, strict=True):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        matrices.append(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))))
    return along_every_axis(x, matrices)


class Reference:
    """A network evaluated from its options and tensors."""

    def __init__(self, net: UNet) -> None:
        """Take options and tensors."""
        self.options = net.config
        self.state = {name: value.numpy() for name, value in net.state_dict().items()}
        self.adm = "heads" in self.options
        self.fir = self.options.get("fir_kernel")
        self.act = ACTIVATIONS[self.options.get("activation", "silu")]
        self.eps = 1e-5 if self.adm else 1e-6

    def conv(self, name: str, x: Array, stride: int = 1, pads: tuple[int, int] | None = None):
        """Convolve, by default with zero padding of half the kernel."""
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        d = x.ndim - 2
        pads = (w.shape[2] // 2,) * 2 if pads is None else pads
        x = np.pad(x, [(0, 0), (0, 0), *[pads] * d])
        windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], tuple(range(2, 2 + d)))
        windows = windows[(..., *[slice(None, None, stride)] * d, *[slice(None)] * d)]
        inside = [1, *range(2 + d, 2 + 2 * d)]
        out = np.tensordot(windows, w, axes=(inside, range(1, 2 + d)))
        return np.moveaxis(out + b, -1, 1)

    def linear(self, name: str, x: Array) -> Array:
        """Rows times weight plus bias, if any."""
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Array) -> Array:
        """Normalize every group of every sample separately."""
        channels = x.shape[1]
        groups = max(1, min(channels // self.options["group_channels"], 32))
        groups = max(g for g in range(1, groups + 1) if channels % g == 0)
        out = np.empty_like(x)
        for b in range(x.shape[0]):
            for part in np.split(np.arange(channels), groups):
                g = x[b, part]
                out[b, part] = (g - g.mean()) / np.sqrt(g.var() + self.eps)
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        ones = (1,) * (x.ndim - 2)
        return out * w.reshape(-1, *ones) + b.reshape(-1, *ones)

    def join(self, x: Array, h: Array) -> Array:
        """Sum of branches."""
        return (x + h) / math.sqrt(2) if self.options.get("skip_rescale") else x + h

    def embedding(self, noise_label: Array, class_labels: Array | None, condition: Array | None):
        """Embed noise label, class labels and condition."""
        width = self.options["width"]
        if self.adm:
            angles = noise_label[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
        else:
            kind = self.options["embedding"]
            if kind is None:
                return None
            if kind == "positional":
                angles = noise_label[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2 - 1))
            else:
                at = np.log(noise_label) if kind == "fourier" else noise_label
                w = self.state["embedding.noise_features.frequencies"]
                angles = 2 * math.pi * np.outer(at, w)
        e = np.concatenate([np.sin(angles), np.cos(angles)], 1)
        classes = (
            0.0 if class_labels is None else self.state["embedding.classes.weight"][class_labels]
        )
        if condition is not None:
            e = e + self.linear("embedding.condition", condition)
        if not self.adm:
            e, classes = e + classes, 0.0
        e = self.linear("embedding.linear_2", self.act(self.linear("embedding.linear_1", e)))
        return self.act(e + classes)

    def block(self, name: str, x: Array, emb: Array | None, resample: Any = lambda a: a) -> Array:
        """Residual block, optionally with resampling."""
        h = self.conv(f"{name}.conv_1", resample(self.act(self.norm(f"{name}.norm_1", x))))
        x = resample(x)
        ones = (1,) * (x.ndim - 2)
        scale = 0.0
        if emb is not None:
            shift = self.linear(f"{name}.embedding", emb)
            shift = shift.reshape(*shift.shape, *ones)
            if self.options["scale_shift" if self.adm else "adaptive_scale"]:
                scale, shift = np.split(shift, 2, axis=1)
                h = self.norm(f"{name}.norm_2", h) * (1 + scale) + shift
            else:
                h = self.norm(f"{name}.norm_2", h + shift)
        else:
            h = self.norm(f"{name}.norm_2", h)
        h = self.conv(f"{name}.conv_2", self.act(h))
        if f"{name}.shortcut.weight" in self.state:
            x = self.conv(f"{name}.shortcut", x)
        return self.join(x, h)

    def attention(self, name: str, x: Array, decoding: bool) -> Array:
        """Attention, one sample and one head at a time."""
        if f"{name}.qkv.weight" not in self.state:
            return x
        c, heads = x.shape[1], 1
        if self.adm:
            heads = self.options["heads"]
            if decoding and self.options["decoder_heads"] is not None:
                heads = self.options["decoder_heads"]
            if self.options["head_channels"] is not None:
                heads = c // self.options["head_channels"]
        h = self.norm(f"{name}.norm", x)
        out = np.empty_like(x)
        for b in range(x.shape[0]):
            q, k, v = np.split(self.linear(f"{name}.qkv", h[b].reshape(c, -1).T), 3, axis=1)
            parts = []
            for head in np.split(np.arange(c), heads):
                p = np.exp(q[:, head] @ k[:, head].T / math.sqrt(c / heads))
                parts.append(p / p.sum(1, keepdims=True) @ v[:, head])
            out[b] = self.linear(f"{name}.out", np.concatenate(parts, 1)).T.reshape(x.shape[1:])
        return self.join(x, out)

    def conv_down(self, name: str, x: Array) -> Array:
        """Downsampling convolution of stride two."""
        if self.fir is not None:
            p = len(self.fir)  # two less for the factor, two more for the convolution
            x = filtered(x, self.fir, 1, 1, ((p + 1) // 2, p // 2))
            return self.conv(name, x, stride=2, pads=(0, 0))
        return self.conv(name, x, stride=2, pads=(1, 1) if self.adm else (0, 1))

    def conv_up(self, name: str, x: Array) -> Array:
        """Upsampling convolution: on zero-stuffed entries, followed by the filter."""
        if self.fir is None:
            return self.conv(name, doubled(x, None))
        stuffed = np.zeros((*x.shape[:2], *(2 * n - 1 for n in x.shape[2:])))
        stuffed[(..., *[slice(None, None, 2)] * (x.ndim - 2))] = x
        bias = self.state[f"{name}.bias"].reshape(-1, *(1,) * (x.ndim - 2))
        h = self.conv(name, stuffed, pads=(2, 2)) - bias
        p = len(self.fir) - 4
        h = filtered(h, self.fir, 1, 1, ((p + 1) // 2 + 1, p // 2 + 1))
        return h * 2 ** (x.ndim - 2) + bias

    def resample(self, name: str, x: Array, emb: Array | None, up: bool) -> Array:
        """Resample between two levels."""
        change = doubled if up else halved
        inside = self.options.get("resblock") == "biggan" or self.options.get("resblock_updown")
        if inside:
            return self.block(name, x, emb, lambda a: change(a, self.fir))
        if self.options["resample_with_conv"]:
            return (self.conv_up if up else self.conv_down)(f"{name}.conv", x)
        return change(x, self.fir)

    def head(self, name: str, h: Array) -> Array:
        """Normalize, activate, convolve."""
        return self.conv(f"{name}.conv", self.act(self.norm(f"{name}.norm", h)))

    def input_branch(self, name: str, pyramid: Array, h: Array) -> tuple[Array, Array]:
        """Combine the downsampled input with the features."""
        kind = self.options.get("progressive_input", "none")
        if kind == "residual":
            h = self.join(self.conv_down(f"{name}.down.conv", pyramid), h)
            return h, h
        if kind == "input_skip":
            pyramid = halved(pyramid, self.fir)
            skip = self.conv(f"{name}.conv", pyramid)
            cat = self.options["progressive_combine"] == "cat"
            h = np.concatenate([skip, h], 1) if cat else skip + h
        return pyramid, h

    def output_branch(self, name: str, pyramid: Array | None, h: Array):
        """Extend the output, or the branch that replaces the features."""
        kind = self.options.get("progressive", "none")
        if kind == "output_skip":
            grown = self.head(f"{name}.head", h)
            return (grown if pyramid is None else doubled(pyramid, self.fir) + grown), h
        if kind == "residual":
            if pyramid is None:
                return self.head(f"{name}.head", h), h
            h = self.join(self.conv_up(f"{name}.up.conv", pyramid), h)
            return h, h
        return None, h

    def __call__(self, x, noise_label, class_labels=None, condition=None, low_res=None) -> Array:
        """Evaluate the network."""
        options = self.options
        levels, blocks = len(options["multipliers"]), options["blocks"]
        emb = self.embedding(noise_label, class_labels, condition)
        low, high = options["data_range"]
        x = 2 * (x - low) / (high - low) - 1
        if low_res is not None:
            x = np.concatenate([x, interpolated(low_res, x.shape[2:])], 1)

        h, pyramid = self.conv("input", x), x
        skips = [h]
        for level in range(levels):
            if level > 0:
                h = self.resample(f"downs.{level - 1}.block", h, emb, up=False)
                pyramid, h = self.input_branch(f"input_branch.{level - 1}", pyramid, h)
                skips.append(h)
            for b in range(blocks):
                h = self.block(f"encoder.{level}.stages.{b}.block", h, emb)
                if level in options["attention_levels"]:
                    h = self.attention(f"encoder.{level}.stages.{b}.attention", h, False)
                skips.append(h)
        h = self.block("middle.0.block", h, emb)
        h = self.attention("middle.0.attention", h, False)
        h = self.block("middle.1.block", h, emb)
        grown = None
        for i, level in enumerate(reversed(range(levels))):
            if i > 0:
                h = self.resample(f"ups.{i - 1}.block", h, emb, up=True)
            for b in range(blocks + 1):
                h = np.concatenate([h, skips.pop()], 1)
                h = self.block(f"decoder.{i}.stages.{b}.block", h, emb)
                if level in options["attention_levels"] and (self.adm or b == blocks):
                    h = self.attention(f"decoder.{i}.stages.{b}.attention", h, True)
            grown, h = self.output_branch(f"output_branch.{i}", grown, h)
        assert skips == []
        out = grown if options.get("progressive") == "output_skip" else self.head("head", h)
        if options.get("scale_by_sigma"):
            sigmas = options["sigmas"]
            sigma = noise_label if sigmas is None else np.array(sigmas)[noise_label.astype(int)]
            out = out / sigma.reshape(-1, *(1,) * (x.ndim - 1))
        return out


def check_against_reference(net: UNet, x: Tensor, noise_label: Tensor, **others: Tensor) -> None:
    """Compare both implementations to near the precision of float64."""
    given = {name: value.numpy() for name, value in others.items()}
    expected = torch.from_numpy(Reference(net)(x.numpy(), noise_label.numpy(), **given))
    assert expected.std() > 0.1  # otherwise the comparison would be void
    with torch.no_grad():
        got = net(x, noise_label, **others)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
