"""DDPM++ against itself written out a second time, in numpy, module by module."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from diffusionkit.networks import DDPMpp

Array = NDArray[np.float64]


def silu(x: Array) -> Array:
    """Sigmoid linear unit."""
    return x / (1 + np.exp(-x))


class Reference:
    """DDPM++ of two levels, one block each, attention at the second, for images."""

    def __init__(self, state: dict[str, Array]) -> None:
        """Take the weights by name."""
        self.state = state

    def conv(self, name: str, x: Array) -> Array:
        """Sum over the kernel's offsets into the zero-padded image."""
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        size = w.shape[2]
        height, width = x.shape[2:]
        x = np.pad(x, ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)))
        out = np.zeros((x.shape[0], w.shape[0], height, width))
        for i in range(size):
            for j in range(size):
                patch = x[:, :, i : i + height, j : j + width]
                out += np.einsum("oc,bchw->bohw", w[:, :, i, j], patch)
        return out + b[:, None, None]

    def linear(self, name: str, x: Array) -> Array:
        """Rows times weight plus bias."""
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Array) -> Array:
        """Normalise every group of every sample by itself."""
        channels = x.shape[1]
        size = channels // min(channels // 4, 32)
        out = np.empty_like(x)
        for b in range(x.shape[0]):
            for c in range(0, channels, size):
                g = x[b, c : c + size]
                out[b, c : c + size] = (g - g.mean()) / np.sqrt(g.var() + 1e-6)
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return out * w[:, None, None] + b[:, None, None]

    def res(self, name: str, x: Array, emb: Array, resample: str = "") -> Array:
        """BigGAN block."""
        h = silu(self.norm(f"{name}.norm_1", x))
        if resample == "up":
            h, x = (np.kron(a, np.ones((1, 1, 2, 2))) for a in (h, x))
        if resample == "down":
            h, x = (
                (a[..., ::2, ::2] + a[..., 1::2, ::2] + a[..., ::2, 1::2] + a[..., 1::2, 1::2]) / 4
                for a in (h, x)
            )
        h = self.conv(f"{name}.conv_1", h)
        h = h + self.linear(f"{name}.embedding", silu(emb))[:, :, None, None]
        h = self.conv(f"{name}.conv_2", silu(self.norm(f"{name}.norm_2", h)))
        if f"{name}.shortcut.weight" in self.state:
            x = self.conv(f"{name}.shortcut", x)
        return (x + h) / math.sqrt(2)

    def attn(self, name: str, x: Array) -> Array:
        """Attention, one sample at a time."""
        channels = x.shape[1]
        h = self.norm(f"{name}.norm", x)
        out = np.empty_like(x)
        for b in range(x.shape[0]):
            tokens = h[b].reshape(channels, -1).T
            q, k, v = np.split(self.linear(f"{name}.qkv", tokens), 3, axis=1)
            p = np.exp(q @ k.T / math.sqrt(channels))
            a = self.linear(f"{name}.out", (p / p.sum(1, keepdims=True)) @ v)
            out[b] = a.T.reshape(x.shape[1:])
        return (x + out) / math.sqrt(2)

    def __call__(self, x: Array, label: Array, labels: Array) -> Array:
        """Evaluate the network."""
        half = self.state["input.weight"].shape[0] // 2
        rows = []
        for value in label:
            angles = [value * 1e4 ** (-i / (half - 1)) for i in range(half)]
            rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        emb = self.linear("embedding.linear_1", np.array(rows))
        emb = self.linear("embedding.linear_2", silu(emb))
        emb = emb + self.state["embedding.classes.weight"][labels]

        s0 = self.conv("input", x)
        s1 = self.res("encoder.0.stages.0.block", s0, emb)
        s2 = self.res("downs.0", s1, emb, "down")
        s3 = self.res("encoder.1.stages.0.block", s2, emb)
        s3 = self.attn("encoder.1.stages.0.attention", s3)

        h = self.res("middle.0.block", s3, emb)
        h = self.attn("middle.0.attention", h)
        h = self.res("middle.1.block", h, emb)

        h = self.res("decoder.0.stages.0.block", np.concatenate([h, s3], 1), emb)
        h = self.res("decoder.0.stages.1.block", np.concatenate([h, s2], 1), emb)
        h = self.attn("decoder.0.stages.1.attention", h)
        h = self.res("ups.0", h, emb, "up")
        h = self.res("decoder.1.stages.0.block", np.concatenate([h, s1], 1), emb)
        h = self.res("decoder.1.stages.1.block", np.concatenate([h, s0], 1), emb)
        return self.conv("output", silu(self.norm("output_norm", h)))


def test_against_a_second_implementation() -> None:
    torch.manual_seed(0)
    net = DDPMpp(2, width=8, multipliers=(1, 2), blocks=1, out_channels=3, num_classes=3)
    net = net.double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    t = torch.tensor([700.0, 12.5], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    expected = torch.from_numpy(Reference(state)(x.numpy(), t.numpy(), labels.numpy()))
    torch.testing.assert_close(net(x, t, labels), expected, rtol=1e-10, atol=1e-10)
