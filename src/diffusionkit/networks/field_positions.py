"""Channels for the position in a field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_count, check_device, check_flag, check_part, check_sequence, check_state


class PositionChannels(nn.Module):
    r"""A network with the coordinates of the points as extra input channels (CoordConv).

    .. math::
        F(x, l; p) = N([x, p, \sin(\pi k p), \cos(\pi k p)]_{k \in \mathrm{frequencies}}, l)

    along the channels. The coordinates p are within [-1, 1] in the whole field, and a patch gets
    the coordinates of its points: train with the `positions` of `random_crops`, sample with
    `PatchedModel(model, ..., positions=True)`. A field of d axes adds d (1 + 2 len(frequencies))
    channels, so that the network is made as `NCSNpp(3 + 2, out_channels=3)` for color images. The
    k-th sine and cosine have k periods in the field. On periodic axes use them alone, since the
    coordinates themselves jump at the edge.

    Args:
        network: maps input (B, C + d (linear + 2 len(frequencies)), \*size) and noise label to
            (B, C, \*size).
        frequencies: the frequencies k.
        linear: whether the coordinates themselves are channels.

    Raises:
        TypeError: if the network is not a module, a frequency is not an integer, or linear is not
            True or False.
        ValueError: if a frequency is not positive, or there is no channel at all.

    Source: Liu et al., An Intriguing Failing of Convolutional Neural Networks and the CoordConv
    Solution, 2018, arXiv 1807.03247; Wang et al., Patch Diffusion, 2023, arXiv 2304.12526.

    >>> import torch
    >>> from diffusionkit import random_crops
    >>> from diffusionkit.networks import NCSNpp, PositionChannels
    >>> net = NCSNpp(1 + 2, out_channels=1, width=8, multipliers=(1, 2))
    >>> net = PositionChannels(net)
    >>> crops = random_crops(torch.randn(4, 1, 100, 80), 16)
    >>> net(crops.x0, torch.ones(4), positions=crops.positions).shape
    torch.Size([4, 1, 16, 16])
    """

    def __init__(
        self, network: nn.Module, frequencies: Sequence[int] = (), *, linear: bool = True
    ) -> None:
        super().__init__()
        check_part(network, nn.Module, "network")
        check_sequence(frequencies, "frequencies")
        for k in frequencies:
            check_count(k, "frequencies", most=2**20)
        check_flag(linear, "linear")
        if not frequencies and not linear:
            raise ValueError("frequencies: expected at least one without linear channels, got none")
        self.network = network
        self.frequencies = tuple(frequencies)
        self.linear = linear

    @override
    def extra_repr(self) -> str:
        return f"frequencies={self.frequencies}, linear={self.linear}"

    @override
    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        /,
        *args: Any,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""Return the output of the network on the input and its position channels.

        Args:
            x: input (B, C, \*size).
            noise_label: noise label (B,).
            *args: passed to the network.
            positions: the coordinates (B, d, \*size) of the points in the whole field, within
                [-1, 1].
            **kwargs: passed to the network.

        Raises:
            TypeError: if the input is not floating-point, or positions are missing.
            ValueError: if positions have another shape.
        """
        check_state(x)
        shape = (len(x), x.ndim - 2, *x.shape[2:])
        if not isinstance(positions, Tensor):
            raise TypeError(
                f"positions: expected coordinates of shape {shape}, got "
                f"{type(positions).__name__}; pass those of random_crops, or sample with "
                "PatchedModel(..., positions=True)"
            )
        if x.ndim < 3 or positions.shape != shape:
            got = f"{tuple(positions.shape)} for an input of shape {tuple(x.shape)}"
            raise ValueError(f"positions: expected coordinates (B, d, *size), got {got}")
        check_device(positions, x, "positions")
        parts = [x, positions] if self.linear else [x]
        for k in self.frequencies:
            angle = math.pi * k * positions
            parts += [torch.sin(angle), torch.cos(angle)]
        inputs = torch.cat([part.to(x.dtype) for part in parts], 1)
        return self.network(inputs, noise_label, *args, **kwargs)
