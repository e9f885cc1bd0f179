"""The coupling layer: one half of a state moves the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from .bijections import Bijection, total
from .conditioner import Conditioner
from .logistic_mixture import LogisticMixture


class LogisticCoupling(Bijection):
    r"""Half of the elements moves the other, through a mixture of logistics.

    .. math::
        y = e^a \, \mathrm{logit} \, F(z; \pi, \mu, s) + b,

    where a, b and the mixture come from a network of the other half and the context. The halves
    are the two colours of a checkerboard over channels and positions, which exist for every
    shape, odd sizes and a single channel included. A new layer is the identity.

    Args:
        dims: the number of spatial dimensions.
        channels: the number of channels of the state.
        context_channels: the number of channels of the context.
        parity: the colour, 0 or 1, of the half that stays.
        components: the number K of logistics in a mixture.
        width: the number of channels inside the network.
        blocks: the number of its gated blocks.
        heads: the number of heads of its attention, 0 for none.

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
        """Build the network."""
        super().__init__()
        self.parity = parity
        self.components = components
        self.net = Conditioner(
            dims,
            channels + context_channels,
            (2 + 3 * components) * channels,
            width=width,
            blocks=blocks,
            heads=heads,
        )
        # All components start alike, as the standard logistic, whose logit F(z) is z. Their
        # random weights then have no effect but to give them unlike gradients: components that
        # were alike in everything would stay alike for ever.
        for parameter in self.net.last.parameters():
            with torch.no_grad():
                parameter[: 2 * channels].zero_()
                parameter[(2 + components) * channels :].zero_()

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        stays, a, b, mixture = self._moves(z, context)
        y, log_slope = mixture.logit(z)
        log_slopes = (log_slope + a).masked_fill(stays, 0.0)
        return torch.where(stays, z, y * a.exp() + b), total(log_slopes)

    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        stays, a, b, mixture = self._moves(y, context)
        return torch.where(stays, y, mixture.inverse((y - b) * (-a).exp()))

    def _moves(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor, LogisticMixture]:
        stays = checkerboard(z.shape[1:], self.parity, z.device)
        out = self.net(z.masked_fill(~stays, 0.0), context).to(z.dtype)
        a, b, *rest = rearrange(out, "b (p c) ... -> p b c ...", c=z.shape[1]).split(
            [1, 1, *(self.components,) * 3]
        )
        logits, means, log_scales = rest
        # Bounded scales: no step of training can make the map overflow.
        mixture = LogisticMixture(logits, means, bounded(log_scales, 5.0))
        return stays, bounded(a[0], 2.0), b[0], mixture


def bounded(x: Tensor, limit: float) -> Tensor:
    """Return x pressed smoothly into (-limit, limit), with slope 1 at 0."""
    return limit * torch.tanh(x / limit)


def checkerboard(shape: Sequence[int], parity: int, device: torch.device) -> Tensor:
    """Return where a checkerboard of a shape has a colour, 0 or 1, as booleans."""
    colour = torch.zeros((), dtype=torch.long, device=device)
    for n in shape:
        colour = colour.unsqueeze(-1) + torch.arange(n, device=device)
    return colour % 2 == parity
