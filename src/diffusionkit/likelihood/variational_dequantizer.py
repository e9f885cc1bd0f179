"""Variational dequantization: a learned distribution of points in the bins of integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from typing_extensions import override

from .._checks import check_choice, check_count
from .._gaussian import normal_log_prob
from .._schedules import exact
from ..random import Generators, randn
from .dequantization import Dequantizer
from .flow.bijections import ActNorm, Bijection, ChannelMixing, total
from .flow.conditioner import Conditioner
from .flow.logistic_coupling import LogisticCoupling


class _Squash(NamedTuple):
    """A map of the real line onto (0, 1), its inverse, and the log of its slope."""

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
    r"""Points in their bins, drawn by a normalizing flow conditioned on the image.

    .. math::
        \epsilon \sim N(0, I), \quad u = S(f(\epsilon; k)), \quad
        \log q(u \mid k) = \log N(\epsilon) - \log |\det f'| - \log S'

    where f has `steps` steps of activation normalization, an invertible mixing of channels and a
    mixture-of-logistics coupling conditioned on features of the image. x and log_prob are
    differentiable in the parameters, so minimizing the mean of

        likelihood(drawn.x).nats + drawn.log_prob,  drawn = dequantizer(images)

    tightens the bound on -log P(image), and trains the model too if its parameters are optimized.
    The first call in training mode initializes the scales from its own draw: call it once before
    wrapping in DistributedDataParallel, so that all ranks start equal.

    S is the sigmoid, as in the papers, or the normal distribution function. An untrained f is at
    most a rotation: with the normal function training starts at the uniform dequantizer, with the
    sigmoid at one that costs 0.28 bits per dimension more.

    Args:
        channels: the number C of channels of images (B, C, \*spatial).
        dims: the number of spatial dimensions: 2 for images, 1 for series, 3 for volumes, 0 for
            vectors (B, C).
        levels: the number of values an integer can take, 0..levels-1.
        low: the lower end of the model's range.
        high: the upper end of the model's range.
        steps: the number of steps of the flow.
        width: the number of hidden channels of the networks.
        components: the number of logistics in each mixture.
        context_width: the number of image features at each position.
        blocks: the number of residual blocks of each network.
        heads: the number of heads of the attention after each block, a divisor of width; 0 for
            no attention, whose cost is quadratic in the number of positions.
        squash: the function S onto (0, 1), "sigmoid" or "normal".
        dtype: the dtype of x, torch's default dtype if None.

    Raises:
        ValueError: if a number is too small, dims is not 0, 1, 2 or 3, heads does not divide
            width, or squash is unknown; see also `Dequantizer`.
        TypeError: if a number is not an integer.

    Source: Ho et al., Flow++: Improving Flow-Based Generative Models with Variational
    Dequantization and Architecture Design, 2019, arXiv 1902.00275; with score models: Song et
    al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021, arXiv 2101.09258.

    >>> import torch
    >>> from diffusionkit import VariationalDequantizer
    >>> dequantizer = VariationalDequantizer(
    ...     1, levels=17, width=8, components=2, heads=0
    ... )
    >>> images = torch.randint(17, (4, 1, 8, 8))
    >>> drawn = dequantizer(images)
    >>> same = dequantizer.quantize(drawn.x) == images
    >>> bool(same.all()), drawn.log_prob.shape
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
        super().__init__(levels, low, high, dtype=dtype)
        sizes = {"channels": channels, "steps": steps, "width": width, "components": components,
                 "context_width": context_width, "blocks": blocks}  # fmt: skip
        for name, value in sizes.items():
            check_count(value, name, most=1000 if name in ("steps", "blocks") else 2**20)
        check_count(dims, "dims", least=0, most=3)
        check_count(heads, "heads", least=0)
        if heads and width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        check_choice("squash", squash, tuple(_SQUASH))
        self.channels = channels
        self.dims = dims
        self.squash = squash
        self.context = Conditioner(
            dims, channels, context_width, width=context_width, blocks=blocks, heads=0
        )
        network = {"width": width, "blocks": blocks, "heads": heads}
        layers: list[Bijection] = []
        for step in range(steps):
            layers.append(ActNorm(channels))
            if channels > 1:
                layers.append(ChannelMixing(channels))
            layers.append(
                LogisticCoupling(
                    dims, channels, context_width, parity=step % 2, components=components, **network
                )
            )
        self.layers = nn.ModuleList(layers)

    @override
    def noise(
        self, images: Tensor, /, *, generator: Generators = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        context = self._features(images)
        shape = images.shape if self.dims else (*images.shape, 1)
        eps = randn(shape, generator=generator, device=images.device, dtype=self._dtype)
        z, log_prob = self._push(eps, context)
        return _SQUASH[self.squash].function(z).view(images.shape), log_prob

    def log_prob_of(self, x: Tensor, images: Tensor) -> Tensor:
        """Return log q(x | images) (B,) of given points x (B, *D), by inverting the flow.

        Pass float64: the position in a bin is a small difference.

        Raises:
            ValueError: if a point is not in its image's bin, or shapes do not match.
            TypeError: if the images are not integers or x is not a floating-point tensor.
        """
        k = self._integers(images)
        if x.shape != k.shape or bool((self.quantize(x) != k).any()):
            raise ValueError(
                f"x: expected points in the bins of the images, {tuple(k.shape)}, got points of "
                f"shape {tuple(x.shape)} outside them"
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
        """Return S^-1(u) (B, C, *D) for noise eps, and log q(u) (B,)."""
        z, log_prob = eps, normal_log_prob(exact(eps), 1.0)
        for layer in self.layers:
            z, log_det = layer(z, context)
            log_prob = log_prob - log_det
        return z, log_prob - total(_SQUASH[self.squash].log_slope(z))
