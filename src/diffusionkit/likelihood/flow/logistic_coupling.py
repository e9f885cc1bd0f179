"""The coupling layer: one half of a state transforms the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from .bijections import Bijection, total
from .conditioner import Conditioner
from .logistic_mixture import LogisticMixture


class LogisticCoupling(Bijection):
    r"""An elementwise map of half of the elements, given the other half.

    .. math::
        y = e^a \, \mathrm{logit} \, F(z; \pi, \mu, s) + b,

    where a, b and the mixture's distribution function F are computed by a network from the other
    half and the context. The halves are the two colors of a checkerboard over channels and
    positions, for any shape. A new layer is the identity.

    Args:
        dims: the number of spatial dimensions.
        channels: the number of channels of the state.
        context_channels: the number of channels of the context.
        parity: the color, 0 or 1, of the unchanged half.
        components: the number K of logistics in a mixture.
        width: the number of hidden channels of the network.
        blocks: the number of its gated blocks.
        heads: the number of its attention heads, 0 for no attention.

    Source: Ho et al., Flow++, 2019, arXiv 1902.00275 (sections 3.2 and 3.3).
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        context_channels: int,
        *,
        parity: int,
        components: int,
        width: int,
        blocks: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.parity = parity
        self.components = components
        inputs, outputs = channels + context_channels, (2 + 3 * components) * channels
        self.net = Conditioner(dims, inputs, outputs, width=width, blocks=blocks, heads=heads)
        # All components start as the standard logistic, for which logit F(z) = z. Their random
        # mixture weights break the symmetry: identical components would get identical gradients.
        for parameter in self.net.last.parameters():
            with torch.no_grad():
                parameter[: 2 * channels].zero_()
                parameter[(2 + components) * channels :].zero_()

    @override
    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        unchanged, a, b, mixture = self._transform(z, context)
        y, log_slope = mixture.logit(z)
        log_slopes = (log_slope + a).masked_fill(unchanged, 0.0)
        return torch.where(unchanged, z, y * a.exp() + b), total(log_slopes)

    @override
    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        unchanged, a, b, mixture = self._transform(y, context)
        return torch.where(unchanged, y, mixture.inverse((y - b) * (-a).exp()))

    def _transform(
        self, z: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, LogisticMixture]:
        unchanged = checkerboard(z.shape[1:], self.parity, z.device)
        out = self.net(z.masked_fill(~unchanged, 0.0), context).to(z.dtype)
        a, b, *rest = rearrange(out, "b (p c) ... -> p b c ...", c=z.shape[1]).split(
            [1, 1, *(self.components,) * 3]
        )
        logits, means, log_scales = rest
        # Bounded scales, so that no training step can make the map overflow.
        mixture = LogisticMixture(logits, means, bounded(log_scales, 5.0))
        return unchanged, bounded(a[0], 2.0), b[0], mixture


def bounded(x: Tensor, limit: float) -> Tensor:
    """Return x squashed into (-limit, limit), with slope 1 at 0."""
    return limit * torch.tanh(x / limit)


def checkerboard(shape: Sequence[int], parity: int, device: torch.device) -> Tensor:
    """Return the boolean mask of one color, 0 or 1, of a checkerboard of a shape."""
    color = torch.zeros((), dtype=torch.long, device=device)
    for n in shape:
        color = color.unsqueeze(-1) + torch.arange(n, device=device)
    return color % 2 == parity
