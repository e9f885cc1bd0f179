"""Discrete data: integer levels of images, and decoders that give their likelihood.

`Levels` maps integers to intervals that fill the model's range. `LevelDecoder` is their likelihood
given a noisy state, for VDM. `GaussianDecoder` is their likelihood given a predicted Gaussian, for
DDPM, whose levels are points from one end of the range to the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import (
    check_choice,
    check_count,
    check_finite,
    check_floating_dtype,
    check_interval,
    check_part,
    check_state,
    fits,
    readable,
)
from ._coefficients import expand
from ._gaussian import log_mass, log_normal_cdf
from ._masks import masked, zeroed
from ._precision import at_least_float32

__all__ = ["GaussianDecoder", "LevelDecoder", "Levels"]

_BLOCK = 2**22  # values in memory at once: 16 MB in float32


@dataclass(frozen=True)
class Levels:
    r"""Integers 0 ... levels - 1 as equal intervals of a model's data range.

    Level k is the interval of width w = (high - low) / levels that starts at low + w k; its center
    is low + w (k + 1/2).

    Args:
        levels: the number of levels, 256 for 8-bit images.
        low: the lower end of the range.
        high: the upper end of the range.

    Raises:
        ValueError: if levels < 2, low >= high or a bound is not finite.
        TypeError: if levels is not an integer, or low or high is not a number.

    >>> import torch
    >>> from diffusionkit.decoders import Levels
    >>> Levels(4).encode(torch.tensor([[0, 3]]))
    tensor([[-0.7500,  0.7500]])
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.levels, "levels", least=2, most=2**24)
        check_interval(self.low, self.high, "low", "high")

    @property
    def width(self) -> float:
        """The width w of an interval."""
        return (self.high - self.low) / self.levels

    def check(self, images: Tensor) -> None:
        """Raise unless images (B, *D) are integers in 0 ... levels - 1.

        Raises:
            TypeError: if images is not a tensor of an integer dtype.
            ValueError: if the batch is empty or a value is out of range (read on the CPU only).
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images: expected a tensor of integers (B, *D), got {type(images).__name__}"
            )
        if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
            raise TypeError(
                f"images: expected integers 0 ... {self.levels - 1}, got {images.dtype}; "
                "undo the scaling to the model's range, then call .long() or .to(torch.uint8)"
            )
        if images.ndim == 0 or images.numel() == 0:
            raise ValueError(
                f"images: expected a non-empty batch (B, *D), got shape {tuple(images.shape)}"
            )
        if readable(images):
            low, high = (int(end) for end in images.long().aminmax())  # uint16 has no aminmax
            if low < 0 or high >= self.levels:
                raise ValueError(
                    f"images: expected levels 0 ... {self.levels - 1}, got {low} to {high}"
                )

    def encode(self, images: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the centers of the levels of images (B, *D), in a dtype or the default one."""
        self.check(images)
        check_floating_dtype(dtype)
        return self.low + self.width * (images.to(dtype or torch.get_default_dtype()) + 0.5)

    def decode(self, x: Tensor) -> Tensor:
        """Return the levels, int64, of points x (B, *D), clamped to the range.

        The level of a NaN is undefined; check samples first.
        """
        check_state(x)
        return ((x - self.low) / self.width).floor().clamp(0, self.levels - 1).long()


@dataclass(frozen=True)
class GaussianDecoder:
    r"""The likelihood of the levels of each pixel under a predicted Gaussian.

    .. math::
        P(k) = \Phi\!\left(\frac{x_k + h - \mu}{s}\right)
             - \Phi\!\left(\frac{x_k - h - \mu}{s}\right), \quad
        x_k = \mathrm{low} + 2 h k, \quad h = \frac{\mathrm{high} - \mathrm{low}}
        {2 (\mathrm{levels} - 1)},

    where the first bin extends to minus infinity and the last to infinity, so the probabilities
    sum to one. The first and the last level are the ends of the range, as in k / 127.5 - 1 for
    8-bit images. The intervals of `Levels`, which dequantizers and `LevelDecoder` use, fill their
    range instead: their centers are the levels of a GaussianDecoder whose range is smaller by
    half of (high - low) / levels at each end.

    Args:
        levels: the number of levels, 256 for 8-bit images.
        low: the value of the first level.
        high: the value of the last level.
        cdf: "exact", in log space and accurate in both tails; or "tanh", the approximation used
            for published numbers, with probabilities clamped to at least 1e-12 and no gradient in
            the tails.

    Raises:
        ValueError: if levels < 2, low >= high, a bound is not finite or cdf is unknown.
        TypeError: if levels is not an integer, or low or high is not a number.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239
    (section 3.3); Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (tanh).

    >>> import torch
    >>> from diffusionkit import GaussianDecoder
    >>> x = GaussianDecoder(levels=3).encode(torch.tensor([[0, 1, 2]]))
    >>> mean = log_std = torch.zeros(1, 3)
    >>> x, GaussianDecoder(levels=3).log_prob(x, mean, log_std).exp()
    (tensor([[-1.,  0.,  1.]]), tensor([[0.3085, 0.3829, 0.3085]]))
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0
    cdf: str = "exact"

    def __post_init__(self) -> None:
        Levels(self.levels, self.low, self.high)  # validates the arguments
        check_choice("cdf", self.cdf, ("exact", "tanh"))

    @property
    def _half(self) -> float:
        return (self.high - self.low) / (2 * (self.levels - 1))

    @property
    def _bins(self) -> Levels:
        return Levels(self.levels, self.low - self._half, self.high + self._half)

    def encode(self, images: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of the levels of images (B, *D), in a dtype or the default one.

        Raises:
            TypeError: if images are not integers.
            ValueError: if a value is not a level.
        """
        return self._bins.encode(images, dtype=dtype)

    def check(self, x: Tensor) -> None:
        """Raise unless data x (B, *D) lie on the levels (read on the CPU only).

        Raises:
            ValueError: if a value is further than a hundredth of a bin from every level.
        """
        check_state(x, "x0")
        x = at_least_float32(x)
        if readable(x):
            off = (x - self.encode(self._bins.decode(x), dtype=x.dtype)).abs()
            if not bool((off <= 0.02 * self._half).all()):  # a NaN fails too
                worst = float(x.flatten()[off.flatten().argmax()])
                raise ValueError(
                    f"x0: expected data on {self.levels} levels from {self.low:g} to "
                    f"{self.high:g}, as returned by GaussianDecoder.encode, got {worst:g}"
                )

    def log_prob(self, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """Return the log-probabilities of pixels x (B, *D) in nats, (B, *D), at least in float32.

        Args:
            x: the values of the levels (B, *D). In half precision they are rounded to a level.
            mean: the means mu (B, *D).
            log_var: the log-variances log(s^2), broadcastable to (B, *D).
        """
        for name, value in (("x", x), ("mean", mean), ("log_var", log_var)):
            if not isinstance(value, Tensor) or value.ndim:  # a number for all pixels
                check_state(value, name)
            if not fits(value, x):
                raise ValueError(
                    f"{name}: expected a shape that fits that of x, {tuple(x.shape)}, "
                    f"got {tuple(value.shape)}"
                )
        if x.dtype.itemsize < 4:
            x = self.encode(self._bins.decode(x.float()), dtype=torch.float32)
        mean, log_var = at_least_float32(mean), at_least_float32(log_var)
        scale, half = torch.exp(-0.5 * log_var), self._half
        first, last = x < self.low + half, x > self.high - half
        offset = x - mean
        if self.cdf == "tanh":
            above, below = _tanh_cdf((offset + half) * scale), _tanh_cdf((offset - half) * scale)
            mass = torch.where(first, above, torch.where(last, 1 - below, above - below))
            return torch.log(mass.clamp_min(1e-12))
        open_end = log_normal_cdf((half + torch.where(first, offset, -offset)) * scale)
        return torch.where(first | last, open_end, log_mass(offset, half, scale))


def _tanh_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


@dataclass(frozen=True)
class LevelDecoder(Levels):
    r"""The likelihood of the levels of each pixel, given its noisy value.

    .. math::
        p(k \mid z) = \mathrm{softmax}_k\!\left(-\tfrac12 \frac{\alpha^2}{\sigma^2}
        (z / \alpha - x_k)^2\right), \quad x_k = \mathrm{low} + w (k + \tfrac12).

    Exact if the noise is small compared with the spacing w of the levels: with 256 levels in
    [-1, 1] and gamma = -13.3, sigma is w / 6.

    Args:
        levels: the number of levels, 256 for 8-bit images.
        low: the lower end of the model's range.
        high: the upper end of the model's range.

    Raises:
        ValueError: if levels < 2, low >= high or a bound is not finite.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630 (section 3.3).

    >>> import torch
    >>> from diffusionkit import LevelDecoder
    >>> decoder, images = LevelDecoder(levels=4), torch.tensor([[0, 2]])
    >>> alpha, sigma = torch.tensor([1.0]), torch.tensor([0.1])
    >>> decoder.log_prob(images, decoder.encode(images), alpha, sigma).exp()
    tensor([1.0000])
    """

    def log_prob(
        self,
        images: Tensor,
        z: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return log P(images | z), summed over pixels, in nats (B,).

        Pixels are processed in blocks, which the backward pass recomputes, so that memory does not
        grow with the number of levels.

        Args:
            images: the levels (B, *D), in any integer dtype.
            z: the noisy state alpha x + sigma eps (B, *D).
            alpha: the scale of the data (B,).
            sigma: the standard deviation of the noise (B,).
            mask: booleans or weights of the pixels, (B, *D) or with sizes of 1; None for all.

        Raises:
            TypeError: if images are not integers or z is not floating-point.
            ValueError: if shapes differ, a value is not a level, or the mask does not fit.
        """
        self.check(images)
        check_state(z, "z")
        if z.shape != images.shape:
            raise ValueError(
                f"z: expected the shape of images, {tuple(images.shape)}, got {tuple(z.shape)}"
            )
        for name, value in (("alpha", alpha), ("sigma", sigma)):
            check_part(value, Tensor, name)
            if value.shape != z.shape[:1]:
                raise ValueError(
                    f"{name}: expected shape ({z.shape[0]},), got {tuple(value.shape)}"
                )
        check_finite(alpha, "alpha")
        if readable(sigma) and not bool((sigma > 0).all()):
            raise ValueError(f"sigma: expected values > 0, got {float(sigma.min()):g}")
        z = at_least_float32(z)
        precision = expand(alpha / sigma, z)
        data = z / expand(alpha, z)
        columns = (data, torch.as_tensor(precision).expand_as(z), images.long())
        size = max(1, _BLOCK // self.levels)
        blocks = zip(*(torch.split(c.flatten(), size) for c in columns), strict=True)
        parts = [checkpoint(self._block, *block, use_reentrant=False) for block in blocks]
        log_probs = torch.cat(parts).view(z.shape)
        if mask is not None:
            weights = masked(mask, z)[0]
            log_probs = zeroed(log_probs * weights, weights)
        return log_probs.view(z.shape[0], -1).sum(1)

    def _block(self, data: Tensor, precision: Tensor, images: Tensor) -> Tensor:
        """Return the log-probabilities of pixels (n,)."""
        centers = self.encode(torch.arange(self.levels, device=data.device), dtype=data.dtype)
        distance = (data.unsqueeze(1) - centers) * precision.unsqueeze(1)
        log_probs = torch.log_softmax(-0.5 * distance.square(), 1)
        return log_probs.gather(1, images.unsqueeze(1)).squeeze(1)
