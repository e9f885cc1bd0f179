"""Stage 3 of `load_score_sde`: the names of our tensors in score_sde."""

from __future__ import annotations

from typing import Any, cast

from einops import rearrange
from torch import Tensor, nn

from ..networks import NCSNpp, NCSNv2
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
# The number of the level that the network for 256 pixels adds comes between the old ones.
_LEVELS = {
    4: ("1", "2", "3", "4"),
    5: ("1", "2", "3", "4", "5"),
    6: ("1", "2", "3", "31", "4", "5"),
}
_REFINEMENTS = {**_LEVELS, 6: ("1", "2", "31", "3", "4", "5")}


def score_sde_sources(network: NCSNpp | NCSNv2, first: int = 0) -> dict[str, Source]:
    """Return the source of each tensor of a network in a state dict of score_sde.

    Args:
        network: NCSN++, DDPM++, DDPM or NCSNv2.
        first: the number of modules in the file before the network's own; not for NCSNv2.

    Raises:
        ValueError: if an NCSNv2 has a number of levels that was never released.
    """
    if isinstance(network, NCSNv2):
        return {ours: Source((theirs,)) for ours, theirs in ncsnv2_keys(network).items()}
    walk, net = _Walk(network, first), cast(Any, network)
    embedding = network.embedding
    if embedding is not None:
        if isinstance(embedding.noise_features, FourierEmbedding):
            name = f"{walk.names[embedding.noise_features]}.frequencies"
            walk.sources[name] = Source((f"{walk.next()}.W",))
        walk.plain(net.embedding.linear_1)
        walk.plain(net.embedding.linear_2)
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


class _Walk:
    """Our modules in the order of the forward pass, numbered like score_sde's."""

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
        """Add a module with a weight and a bias, perhaps inside one of theirs."""
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
            self.next()  # a resampling without a convolution has a number too
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


def _rows(*weights: Tensor) -> Tensor:
    # The released matrices multiply from the right.
    return rearrange(list(weights), "kind c_in c_out -> (kind c_out) c_in")


def _joined(*biases: Tensor) -> Tensor:
    return rearrange(list(biases), "kind c_out -> (kind c_out)")


def ncsnv2_keys(network: NCSNv2) -> dict[str, str]:
    """Return the released names of an NCSNv2's tensors by our names.

    The released buffer ``sigmas`` is part of our configuration, not of our state.

    Raises:
        ValueError: if the number of levels was never released.
    """
    count = len(network.levels)
    if count not in _LEVELS:
        raise ValueError(f"expected a network of 4, 5 or 6 levels, got {count}")
    modules = {"input": "begin_conv", "norm": "normalizer", "output": "end_conv"}
    for i, number in enumerate(_LEVELS[count]):
        for j in range(2):
            modules |= _ncsnv2_block(f"levels.{i}.{j}", f"res{number}.{j}", network)
    for i, number in enumerate(_REFINEMENTS[count]):
        modules |= _refinement(f"refinements.{i}", f"refine{number}")
    keys = {}
    for key in network.state_dict():
        module, _, part = key.rpartition(".")
        keys[key] = f"{modules[module]}.{part}"
    return keys


def _ncsnv2_block(ours: str, theirs: str, network: NCSNv2) -> dict[str, str]:
    inner = ".conv" if network.get_submodule(ours).pools else ""
    return {
        f"{ours}.norm_1": f"{theirs}.normalize1",
        f"{ours}.conv_1": f"{theirs}.conv1",
        f"{ours}.norm_2": f"{theirs}.normalize2",
        f"{ours}.conv_2": f"{theirs}.conv2{inner}",
        f"{ours}.shortcut": f"{theirs}.shortcut{inner}",
    }


def _refinement(ours: str, theirs: str) -> dict[str, str]:
    modules = _units(f"{ours}.units", f"{theirs}.output_convs")
    for i in range(2):
        modules |= _units(f"{ours}.adapt.{i}", f"{theirs}.adapt_convs.{i}")
        modules[f"{ours}.fuse.{i}"] = f"{theirs}.msf.convs.{i}"
        modules[f"{ours}.pooling.convs.{i}"] = f"{theirs}.crp.convs.{i}"
    return modules


def _units(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{i}.conv_{j}": f"{theirs}.{i + 1}_{j}_conv" for i in range(3) for j in (1, 2)}
