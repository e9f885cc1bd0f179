"""The names of score_sde's tensors: modules numbered in the order of the forward pass."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..networks import NCSNpp
from ..networks.blocks import ResidualBlock, SelfAttention
from ..networks.embeddings import FourierEmbedding
from ..networks.progressive import Head, InputSkip, OutputSkip, OutputStart
from ..networks.resampling import ConvDownsample, ConvUpsample
from ..networks.unet import Stage
from ._transfer import Source, rename

_BLOCK = {
    "norm_1": "GroupNorm_0",
    "conv_1": "Conv_0",
    "norm_2": "GroupNorm_1",
    "conv_2": "Conv_1",
}


def _rows(*weights: Tensor) -> Tensor:
    # Their matrices act from the right.
    return torch.stack([weight.t() for weight in weights]).flatten(0, 1)


def _joined(*biases: Tensor) -> Tensor:
    return torch.stack(biases).flatten()


class _Walk:
    """Our modules in the order of the forward pass, each given the next number."""

    def __init__(self, network: NCSNpp, number: int) -> None:
        self.names = {module: name for name, module in network.named_modules()}
        self.spatial = (1,) * network.dims
        self.number = number
        self.biggan = network.config["resblock"] == "biggan"
        self.sources: dict[str, Source] = {}

    def next(self) -> str:
        self.number += 1
        return f"all_modules.{self.number - 1}"

    def plain(self, module: nn.Module, inner: str = "") -> None:
        """A module with a weight and a bias, perhaps inside another of theirs."""
        theirs = self.next() + (f".{inner}" if inner else "")
        self.sources |= {
            f"{self.names[module]}.{part}": Source((f"{theirs}.{part}",))
            for part in ("weight", "bias")
        }

    def stage(self, stage: Stage) -> None:
        if isinstance(stage.block, ResidualBlock):
            self.block(stage.block)
        elif isinstance(stage.block, ConvDownsample | ConvUpsample):
            self.resampling(stage.block)
        else:
            self.next()  # a resampling without a convolution has a number all the same
        if isinstance(stage.attention, SelfAttention):
            self.attention(stage.attention)

    def block(self, block: ResidualBlock) -> None:
        ours, theirs = self.names[block], self.next()
        self.sources |= rename(f"{ours}.", f"{theirs}.", _BLOCK)
        if block.embedding is not None:
            self.sources |= rename(f"{ours}.", f"{theirs}.", {"embedding": "Dense_0"})
        if isinstance(block.shortcut, nn.Identity):
            return
        if self.biggan:
            self.sources |= rename(f"{ours}.", f"{theirs}.", {"shortcut": "Conv_2"})
        else:
            self.sources |= {
                f"{ours}.shortcut.weight": Source((f"{theirs}.NIN_0.W",), self.matrix),
                f"{ours}.shortcut.bias": Source((f"{theirs}.NIN_0.b",)),
            }

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t().reshape(*weight.t().shape, *self.spatial)

    def attention(self, attention: SelfAttention) -> None:
        ours, theirs = self.names[attention], self.next()
        three = [f"{theirs}.NIN_{i}" for i in range(3)]
        self.sources |= rename(f"{ours}.", f"{theirs}.", {"norm": "GroupNorm_0"})
        self.sources |= {
            f"{ours}.qkv.weight": Source(tuple(f"{nin}.W" for nin in three), _rows),
            f"{ours}.qkv.bias": Source(tuple(f"{nin}.b" for nin in three), _joined),
            f"{ours}.out.weight": Source((f"{theirs}.NIN_3.W",), _rows),
            f"{ours}.out.bias": Source((f"{theirs}.NIN_3.b",)),
        }

    def resampling(self, layer: ConvDownsample | ConvUpsample) -> None:
        self.plain(layer.conv, "Conv_0" if layer.fir_kernel is None else "Conv2d_0")

    def head(self, head: Head) -> None:
        self.plain(head.norm)
        self.plain(head.conv)


def score_sde_sources(network: NCSNpp, first: int = 0) -> dict[str, Source]:
    """Say where each tensor of a network comes from in a state dict of score_sde.

    Args:
        network: NCSN++, DDPM++ or DDPM.
        first: Number of the first module that the network has too.

    Returns:
        Sources by the names of our tensors.
    """
    walk, net = _Walk(network, first), cast(Any, network)
    embedding = network.embedding
    if embedding is not None:
        if isinstance(embedding.noise_features, FourierEmbedding):
            name = f"{walk.names[embedding.noise_features]}.frequencies"
            walk.sources[name] = Source((f"{walk.next()}.W",))
        walk.plain(embedding.linear_1)
        walk.plain(embedding.linear_2)
    walk.plain(net.input)
    for level, encoder in enumerate(net.encoder):
        if level > 0:
            walk.stage(net.downs[level - 1])
            if net.input_branch is not None:
                step = net.input_branch[level - 1]
                if isinstance(step, InputSkip):
                    walk.plain(step.conv, "Conv_0")
                else:
                    walk.resampling(step.down)
        for stage in encoder.stages:
            walk.stage(stage)
    for stage in net.middle:
        walk.stage(stage)
    for level, decoder in enumerate(net.decoder):
        if level > 0:
            walk.stage(net.ups[level - 1])
        for stage in decoder.stages:
            walk.stage(stage)
        if net.output_branch is not None:
            step = net.output_branch[level]
            if isinstance(step, OutputSkip | OutputStart):
                walk.head(step.head)
            else:
                walk.resampling(step.up)
    if net.head is not None:
        walk.head(net.head)
    return walk.sources
