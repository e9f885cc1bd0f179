"""NCSNv2, the RefineNet of Song and Ermon, 2020."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from .._checks import check_choice, check_count, check_sequence
from .._repr import configuration
from ._arguments import (
    check_class_labels,
    check_counts,
    check_divisible,
    check_flags,
    check_noise_label,
    network_input,
    unit_range,
)
from .config import remembers
from .embeddings import SigmaTable
from .layers import ACTIVATIONS, over_level
from .refinenet import DilatedBlock, InstanceNormPlus, Refinement, conv

Levels: TypeAlias = Sequence[tuple[int, int]]

LEVELS_64 = ((1, 1), (2, 1), (2, 2), (2, 4))
LEVELS_128 = ((1, 1), (2, 1), (2, 1), (4, 2), (4, 4))
LEVELS_256 = ((1, 1), (2, 1), (2, 1), (2, 1), (4, 2), (4, 4))


class NCSNv2(nn.Module):
    r"""NCSNv2: a RefineNet whose output is divided by the noise level, without other conditioning.

    .. math:: (x, i) \mapsto F(x) / \sigma_i

    with F of the shape of x and the noise label i, the index of the noise level. The default
    levels are those for images of up to 64 pixels.

    Every level has two residual blocks. Level 0 has the full resolution; each level below it
    halves the resolution if its dilation is 1, otherwise keeps it and dilates its convolutions.
    From the lowest level up, a refinement block fuses each level with the refined level below.

    Class methods build the published networks; their `options` replace the published ones.

    Args:
        channels: number of input and output channels.
        sigmas: noise levels by index, from the largest to the smallest in the papers.
        dims: number of spatial dimensions, 1, 2 or 3.
        width: number of channels that the multipliers multiply, at least 2.
        levels: one row (multiplier, dilation) per level: channels over `width`, and dilation of
            the convolutions.
        activation: activation function of all layers; "leaky_relu" with a slope of 0.2.
        data_range: range of the data, which is mapped to [-1, 1] first.
        activation_checkpointing: whether activations within levels and refinement blocks are
            recomputed in the backward pass instead of stored: less memory, more time, the same
            gradient. Not supported under transforms of torch.func.

    Raises:
        TypeError: if a count is not an int or a row of `levels` is not a pair.
        ValueError: if an argument is out of range.

    Source: Y. Song, S. Ermon, Improved Techniques for Training Score-Based Generative Models, 2020,
    arXiv 2006.09011.

    >>> import torch
    >>> from diffusionkit.networks import NCSNv2
    >>> net = NCSNv2(channels=1, sigmas=(10.0, 1.0, 0.1), width=4)
    >>> net(torch.randn(4, 1, 8, 12), torch.tensor([0, 1, 2, 2])).shape
    torch.Size([4, 1, 8, 12])
    """

    config: dict[str, Any]

    @remembers
    def __init__(
        self,
        channels: int = 3,
        *,
        sigmas: Sequence[float],
        dims: int = 2,
        width: int = 128,
        levels: Levels = LEVELS_64,
        activation: Literal["silu", "relu", "elu", "leaky_relu"] = "elu",
        data_range: tuple[float, float] = (-1.0, 1.0),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_counts(channels=channels, dims=dims, width=width)
        check_flags(activation_checkpointing=activation_checkpointing)
        check_count(width, "width", least=2)  # the normalization takes a variance over channels
        check_choice("dims", dims, (1, 2, 3))
        check_choice("activation", activation, tuple(ACTIVATIONS))
        _check_levels(levels)
        self.channels = channels
        self.dims = dims
        self.factor = 2 ** sum(dilation == 1 for _, dilation in levels[1:])  # total downsampling
        self.scale, self.shift = unit_range(data_range)
        self.recompute = activation_checkpointing
        self.noise_level = SigmaTable(sigmas)
        self.activation = act = ACTIVATIONS[activation]

        widths = [width * multiplier for multiplier, _ in levels]
        self.input = conv(dims, channels, widths[0])
        self.levels = nn.ModuleList()
        for i, (_, dilation) in enumerate(levels):
            above, c = widths[max(i - 1, 0)], widths[i]
            first = DilatedBlock(above, c, dims, act, dilation=dilation, first=i > 0)
            second = DilatedBlock(c, c, dims, act, dilation=dilation)
            self.levels.append(nn.Sequential(first, second))
        self.refinements = nn.ModuleList()  # from the lowest level up
        below: list[int] = []
        for i in reversed(range(len(levels))):
            out = widths[max(i - 1, 0)] if below else widths[i]
            units = 1 if i > 0 else 3
            self.refinements.append(Refinement([widths[i], *below], out, dims, act, units))
            below = [out]
        self.norm = InstanceNormPlus(widths[0])
        self.output = conv(dims, widths[0], channels)

    @override
    def extra_repr(self) -> str:
        return ", ".join(configuration(self))

    @override
    def forward(self, x: Tensor, noise_label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        r"""Evaluate the network.

        Args:
            x: input (B, channels, \*spatial), every size divisible by the total downsampling,
                2 for the default levels.
            noise_label: index (B,) of the noise level.
            class_labels: None, since the network has no classes.

        Returns:
            Output (B, channels, \*spatial).

        Raises:
            TypeError: if a dtype is wrong or class labels are passed.
            ValueError: if a shape or a device is wrong.
        """
        x = network_input(x, self.channels, self.dims, self.input.weight)
        check_divisible(x, self.factor)
        check_noise_label(x, noise_label)
        check_class_labels(x, class_labels, None)
        if (self.scale, self.shift) != (1.0, 0.0):
            x = x * self.scale + self.shift

        h: Tensor = self.input(x)
        features = []
        for level in self.levels:
            h = self._run(level, h)
            features.append(h)
        refined: Tensor | None = None
        for refine in self.refinements:
            refined = self._run(refine, features.pop(), refined)
        h = self.output(self.activation(self.norm(refined)))
        return over_level(h, self.noise_level(noise_label))

    def _run(self, part: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            h: Tensor = checkpoint(part, *inputs, use_reentrant=False)
            return h
        h = part(*inputs)
        return h

    @classmethod
    def cifar10(cls, **options: Any) -> Self:
        """Build the network for CIFAR-10, data in [0, 1].

        29,694,083 parameters, 232 noise levels from 50 to 0.01.
        """
        return cls(**_published(232, 50.0) | options)

    @classmethod
    def celeba_64(cls, **options: Any) -> Self:
        """Build the network for CelebA of 64 pixels, data in [0, 1].

        29,694,083 parameters, 500 noise levels from 90 to 0.01.
        """
        return cls(**_published(500, 90.0) | options)

    @classmethod
    def church_96(cls, **options: Any) -> Self:
        """Build the network for LSUN churches of 96 pixels, data in [0, 1].

        83,445,379 parameters, 788 noise levels from 140 to 0.01.
        """
        return cls(**_published(788, 140.0, LEVELS_128) | options)

    @classmethod
    def bedroom_128(cls, **options: Any) -> Self:
        """Build the network for LSUN bedrooms of 128 pixels, data in [0, 1].

        83,445,379 parameters, 1086 noise levels from 190 to 0.01.
        """
        return cls(**_published(1086, 190.0, LEVELS_128) | options)

    @classmethod
    def tower_128(cls, **options: Any) -> Self:
        """Build the network for LSUN towers of 128 pixels, the same as `bedroom_128`."""
        return cls.bedroom_128(**options)

    @classmethod
    def ffhq_256(cls, **options: Any) -> Self:
        """Build the network for FFHQ of 256 pixels, data in [0, 1].

        94,132,611 parameters, 2311 noise levels from 348 to 0.01.
        """
        return cls(**_published(2311, 348.0, LEVELS_256) | options)


def _published(count: int, sigma_max: float, levels: Levels = LEVELS_64) -> dict[str, Any]:
    steps = torch.linspace(
        math.log(sigma_max), math.log(0.01), count, dtype=torch.float64, device="cpu"
    )
    return {"sigmas": tuple(steps.exp().tolist()), "levels": levels, "data_range": (0.0, 1.0)}


def _check_levels(levels: Levels) -> None:
    check_sequence(levels, "levels")
    if not levels:
        raise ValueError("levels: expected one row (multiplier, dilation) per level, got none")
    for row in levels:
        if not isinstance(row, Sequence) or len(row) != 2:
            raise TypeError(f"levels: expected rows (multiplier, dilation), got {row!r}")
        check_counts(multiplier=row[0], dilation=row[1])
