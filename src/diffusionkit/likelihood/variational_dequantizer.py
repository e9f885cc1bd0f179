"""Points in the bins of integers from a learned law: variational dequantization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .._checks import check_count
from .._gaussian import normal_log_prob
from .._schedules import exact
from ..random import Generators, randn
from .dequantization import Dequantizer
from .flow.bijections import ActNorm, Bijection, ChannelMixing, total
from .flow.conditioner import Conditioner
from .flow.logistic_coupling import LogisticCoupling


class _Squash(NamedTuple):
    """A function of the real line onto (0, 1), its inverse, and the log of its slope."""

    function: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    log_slope: Callable[[Tensor], Tensor]


_SQUASH = {
    "sigmoid": _Squash(torch.sigmoid, torch.logit, lambda z: logsigmoid(z) + logsigmoid(-z)),
    "normal": _Squash(
        torch.special.ndtr,
        torch.special.ndtri,
        lambda z: -0.5 * (z.square() + math.log(2 * math.pi)),
    ),
}


class VariationalDequantizer(Dequantizer):
    r"""Points drawn by a flow that is conditioned on the image.

    .. math::
        \epsilon \sim N(0, I), \quad u = S(f(\epsilon; k)), \quad
        \log q(u \mid k) = \log N(\epsilon) - \log |\det f'| - \log S'

    where f is `steps` times a scale and shift of each channel, a mixing of the channels and a
    coupling by mixtures of logistics, whose networks see features of the image. x and log_prob
    are differentiable functions of the parameters, so minimising the mean of

        likelihood(drawn.x).nats + drawn.log_prob,  drawn = dequantizer(images)

    tightens the bound on -log P(image); the model learns with it if its parameters are
    optimised too. The first call in training mode sets the scales by its own draw: before
    wrapping in DistributedDataParallel call once, so that all ranks start alike.

    S is the sigmoid, as in the papers, or the distribution function of the normal law. An
    untrained f is a rotation at most: with the normal law training starts from the uniform
    dequantizer, with the sigmoid from one that costs 0.28 bits per dimension more.

    Args:
        channels: the number C of channels of images (B, C, \*spatial).
        dims: the number of spatial dimensions: 2 for images, 1 for series, 3 for volumes, 0 for
            vectors (B, C).
        levels: the number of values an integer can take, 0..levels-1.
        low: the lower end of the model's range.
        high: the upper end of the model's range.
        steps: the number of steps of the flow.
        width: the number of channels inside the networks.
        components: the number of logistics in each mixture.
        context_width: the number of features of the image at each position.
        blocks: the number of residual blocks of each network.
        heads: the number of heads of the attention after each block, a divisor of width; 0 for
            no attention, whose cost grows with the square of the number of positions.
        squash: the function S onto (0, 1), "sigmoid" or "normal".
        dtype: the dtype of x, torch's default dtype if None.

    Raises:
        ValueError: if a number is too small, dims is not 0, 1, 2 or 3, heads does not divide
            width, or squash is unknown; and see `Dequantizer`.
        TypeError: if a number is not an integer.

    Source: Ho et al., Flow++: Improving Flow-Based Generative Models with Variational
    Dequantization and Architecture Design, 2019, arXiv 1902.00275; with score models Song et
    al., 2021, arXiv 2101.09258.

    >>> dequantizer = VariationalDequantizer(1, levels=17, width=8, components=2, heads=0)
    >>> images = torch.randint(17, (4, 1, 8, 8))
    >>> drawn = dequantizer(images)
    >>> bool((dequantizer.quantize(drawn.x) == images).all()), drawn.log_prob.shape
    (True, torch.Size([4]))
    """

    def __init__(
        self,
        channels: int,
        dims: int = 2,
        levels: int = 256,
        low: float = -1.0,
        high: float = 1.0,
        *,
        steps: int = 4,
        width: int = 64,
        components: int = 8,
        context_width: int = 32,
        blocks: int = 2,
        heads: int = 4,
        squash: Literal["sigmoid", "normal"] = "sigmoid",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the flow."""
        super().__init__(levels, low, high, dtype=dtype)
        sizes = {"channels": channels, "steps": steps, "width": width, "components": components,
                 "context_width": context_width, "blocks": blocks}  # fmt: skip
        for name, value in sizes.items():
            check_count(value, name)
        check_count(dims, "dims", least=0)
        check_count(heads, "heads", least=0)
        if dims > 3:
            raise ValueError(f"dims: expected 0, 1, 2 or 3, got {dims}")
        if heads and width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        if squash not in _SQUASH:
            raise ValueError(f"squash: expected one of {[*_SQUASH]}, got {squash!r}")
        self.channels = channels
        self.dims = dims
        self.squash = squash
        self.context = Conditioner(
            dims, channels, context_width, width=context_width, blocks=blocks, heads=0
        )
        layers: list[Bijection] = []
        for step in range(steps):
            layers.append(ActNorm(channels))
            if channels > 1:
                layers.append(ChannelMixing(channels))
            layers.append(
                LogisticCoupling(
                    dims,
                    channels,
                    context_width,
                    parity=step % 2,
                    components=components,
                    width=width,
                    blocks=blocks,
                    heads=heads,
                )
            )
        self.layers = nn.ModuleList(layers)

    def noise(
        self, images: Tensor, *, generator: Generators = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw u (B, *D) from the flow, and log q(u | images) (B,).

        Raises:
            ValueError: if the images' shape does not fit channels and dims.
        """
        context = self._features(images)
        shape = images.shape if self.dims else (*images.shape, 1)
        eps = randn(shape, generator=generator, device=images.device, dtype=self._dtype)
        z, log_prob = self._push(eps, context)
        return _SQUASH[self.squash].function(z).view(images.shape), log_prob

    def log_prob_of(self, x: Tensor, images: Tensor) -> Tensor:
        """Return log q(x | images) (B,) of given points x (B, *D), by inverting the flow.

        The position in a bin is a small difference: to see it well, hand in float64.

        Raises:
            ValueError: if a point does not lie in its image's bin, or a shape does not fit.
            TypeError: if the images are not integers or x is not a floating-point tensor.
        """
        k = self._integers(images)
        if x.shape != k.shape or bool((self.quantize(x) != k).any()):
            raise ValueError(
                f"x: expected points in the bins of the images, {tuple(k.shape)}, got others, "
                f"{tuple(x.shape)}"
            )
        context = self._features(k)
        u = self._position(x) - k
        eps = torch.finfo(u.dtype).eps
        z = _SQUASH[self.squash].inverse(u.clamp(eps, 1 - eps)).to(self._dtype)
        z = z if self.dims else z.unsqueeze(-1)
        for layer in reversed(self.layers):
            z = cast(Bijection, layer).inverse(z, context)
        return self._push(z, context)[1] + self._log_units(k)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _features(self, k: Tensor) -> Tensor:
        if k.ndim != self.dims + 2 or k.shape[1] != self.channels:
            spatial = ", ".join(["B", str(self.channels), *"DHW"[3 - self.dims :]])
            raise ValueError(f"images: expected shape ({spatial}), got {tuple(k.shape)}")
        scaled = k.to(self._dtype) * (2 / (self.levels - 1)) - 1
        features: Tensor = self.context(scaled if self.dims else scaled.unsqueeze(-1))
        return features

    def _push(self, eps: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return logit u (B, C, *D) of noise eps, and log q(u) (B,)."""
        z, log_prob = eps, normal_log_prob(exact(eps), 1.0)
        for layer in self.layers:
            z, log_det = layer(z, context)
            log_prob = log_prob - log_det
        return z, log_prob - total(_SQUASH[self.squash].log_slope(z))
