"""Fourier features of the input, beside the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override


class FourierFeatures(nn.Module):
    r"""A network that also sees sines and cosines of its input, which show its finest digits.

    .. math::
        F(x, l) = N([x, \sin(2 \pi 2^n x), \cos(2 \pi 2^n x)]_{n \in \mathrm{exponents}}, l)

    along the channels, so the network takes 1 + 2 len(exponents) times as many channels as the
    data have: `NCSNpp(15, out_channels=3)` or `MLP(10, out_features=2)` with two exponents. The
    published n = 6, 7 belong to 256 levels in [-1, 1], whose distance is 1/128: the features of
    n = 6 alternate from one level to the next. Fewer levels want smaller n.

    Args:
        network: maps (input (B, (1 + 2 len(exponents)) C, ...), label, ...) to (B, C, ...).
        exponents: the n.

    Raises:
        TypeError: if the network is not a module or an exponent is not an int.
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
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a module, got {type(network).__name__}")
        for n in exponents:
            if not isinstance(n, int) or isinstance(n, bool):
                raise TypeError(f"exponents must be ints, got {n!r}")
        if not exponents:
            raise ValueError("exponents must have at least one entry, got none")
        self.network = network
        self.exponents = tuple(exponents)

    @override
    def extra_repr(self) -> str:
        """Return the exponents."""
        return f"exponents={self.exponents}"

    @override
    def forward(self, x: Tensor, noise_label: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the network on the input and its features.

        Args:
            x: input (B, C, ...).
            noise_label: time label (B,).
            *args: handed to the network.
            **kwargs: handed to the network.

        Returns:
            What the network returns.

        Raises:
            TypeError: if the input is not of a floating-point dtype.
            ValueError: if it has no channels.
        """
        if not x.dtype.is_floating_point:
            raise TypeError(f"x must be of a floating-point dtype, got {x.dtype}")
        if x.ndim < 2:
            raise ValueError(f"x must have shape (B, C, ...), got {tuple(x.shape)}")
        parts = [x]
        for n in self.exponents:
            turns = x * 2.0**n  # exact, and so is the rest of whole turns: no digit is lost
            angle = 2 * math.pi * (turns - turns.detach().round())
            parts += [torch.sin(angle), torch.cos(angle)]
        return self.network(torch.cat(parts, 1), noise_label, *args, **kwargs)
