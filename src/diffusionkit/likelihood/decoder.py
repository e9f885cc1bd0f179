"""The likelihood of discrete data, given a state with little noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import check_state, readable
from .._levels import Levels
from ..values import expand

_BLOCK = 2**22  # numbers held at once: 16 MB in float32


@dataclass(frozen=True)
class LevelDecoder(Levels):
    r"""The probability of each level of each pixel, given the pixel's own noisy value.

    .. math::
        p(k \mid z) = \mathrm{softmax}_k\!\left(-\tfrac12 \frac{\alpha^2}{\sigma^2}
        (z / \alpha - x_k)^2\right), \quad x_k = \mathrm{low} + w (k + \tfrac12).

    Exact where the noise hides nothing but what lies within a pixel: with 256 levels in [-1, 1]
    and gamma = -13.3, sigma is a sixth of the distance w of two levels.

    Args:
        levels: the number of levels, 256 for images of 8 bits.
        low: the lower end of the model's range.
        high: the upper end of the model's range.

    Raises:
        ValueError: unless levels >= 2 and low < high, both finite.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630 (section 3.3).

    >>> decoder, images = LevelDecoder(levels=4), torch.tensor([[0, 2]])
    >>> alpha, sigma = torch.tensor([1.0]), torch.tensor([0.1])
    >>> decoder.log_prob(images, decoder.encode(images), alpha, sigma).exp()
    tensor([1.0000])
    """

    def log_prob(self, images: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return log P(images | z), summed over pixels, in nats (B,).

        The levels are looked at block by block, again in the backward pass, so that memory does
        not grow with their number.

        Args:
            images: the levels (B, *D), of any integer dtype.
            z: the noisy state alpha x + sigma eps (B, *D).
            alpha: the scale of the data (B,).
            sigma: the standard deviation of the noise (B,).

        Raises:
            TypeError: if images are not integers, or z is not floating-point.
            ValueError: if shapes differ, or a value is no level.
        """
        self.check(images)
        check_state(z, "z")
        if z.shape != images.shape:
            raise ValueError(
                f"z: expected the shape of images, {tuple(images.shape)}, got {tuple(z.shape)}"
            )
        for name, value in (("alpha", alpha), ("sigma", sigma)):
            if value.shape != z.shape[:1]:
                raise ValueError(
                    f"{name}: expected shape ({z.shape[0]},), got {tuple(value.shape)}"
                )
        if readable(sigma) and not bool((sigma > 0).all()):
            raise ValueError(f"sigma: expected noise > 0, got {float(sigma.min()):g}")
        precision = expand(alpha / sigma, z)
        data = z / expand(alpha, z)
        columns = (data, torch.as_tensor(precision).expand_as(z), images.long())
        size = max(1, _BLOCK // self.levels)
        blocks = zip(*(torch.split(c.flatten(), size) for c in columns), strict=True)
        parts = [checkpoint(self._block, *block, use_reentrant=False) for block in blocks]
        return torch.cat(parts).view(z.shape[0], -1).sum(1)

    def _block(self, data: Tensor, precision: Tensor, images: Tensor) -> Tensor:
        """Return the log-probabilities of single pixels (n,)."""
        centres = self.encode(torch.arange(self.levels, device=data.device), dtype=data.dtype)
        distance = (data.unsqueeze(1) - centres) * precision.unsqueeze(1)
        log_probs = torch.log_softmax(-0.5 * distance.square(), 1)
        return log_probs.gather(1, images.unsqueeze(1)).squeeze(1)
