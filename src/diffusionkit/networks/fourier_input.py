"""Fourier features of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_count, check_part, check_sequence, check_state


class FourierFeatures(nn.Module):
    r"""A network with Fourier features of its input as extra channels, which resolve fine detail.

    .. math::
        F(x, l) = N([x, \sin(2 \pi 2^n x), \cos(2 \pi 2^n x)]_{n \in \mathrm{exponents}}, l)

    along the channels, so the network has 1 + 2 len(exponents) times as many input channels as
    the data: `NCSNpp(15, out_channels=3)` or `MLP(10, out_features=2)` with two exponents. The
    published n = 6, 7 are for 256 levels in [-1, 1], 1/128 apart: the features of n = 6
    alternate between adjacent levels. Use smaller n for fewer levels.

    Args:
        network: maps input (B, (1 + 2 len(exponents)) C, ...) and noise label to (B, C, ...).
        exponents: the exponents n.

    Raises:
        TypeError: if the network is not a module or an exponent is not an integer.
        ValueError: if there is no exponent.

    Source: D. P. Kingma, T. Salimans, B. Poole, J. Ho, Variational Diffusion Models, 2021, arXiv
    2107.00630 (appendix C).

    >>> import torch
    >>> from diffusionkit.networks import MLP, FourierFeatures
    >>> net = FourierFeatures(MLP(10, out_features=2))
    >>> net(torch.randn(5, 2), torch.rand(5)).shape
    torch.Size([5, 2])
    """

    def __init__(self, network: nn.Module, *, exponents: Sequence[int] = (6, 7)) -> None:
        super().__init__()
        check_part(network, nn.Module, "network")
        check_sequence(exponents, "exponents")
        for n in exponents:
            check_count(n, "exponents", least=-100, most=100)
        if not exponents:
            raise ValueError("exponents: expected at least one entry, got none")
        self.network = network
        self.exponents = tuple(exponents)

    @override
    def extra_repr(self) -> str:
        return f"exponents={self.exponents}"

    @override
    def forward(self, x: Tensor, noise_label: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the network on the input and its features.

        Args:
            x: input (B, C, ...).
            noise_label: noise label (B,).
            *args: passed to the network.
            **kwargs: passed to the network.

        Raises:
            TypeError: if the input is not floating-point.
            ValueError: if it has no channel dimension.
        """
        check_state(x)
        if x.ndim < 2:
            raise ValueError(f"x: expected shape (B, C, ...), got {tuple(x.shape)}")
        parts = [x]
        for n in self.exponents:
            turns = x * 2.0**n  # exact, as is removing whole turns below: no digit is lost
            angle = 2 * math.pi * (turns - turns.detach().round())
            parts += [torch.sin(angle), torch.cos(angle)]
        return self.network(torch.cat(parts, 1), noise_label, *args, **kwargs)
