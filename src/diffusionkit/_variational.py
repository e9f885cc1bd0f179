r"""The variational bound of a chain of steps: its terms, and the likelihood that ends it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ._checks import check_part, readable
from ._levels import Levels
from ._numerics import exact
from .interfaces import ForwardSDE, ScoreModel
from .values import Prediction, expand


@dataclass(frozen=True)
class GaussianDecoder:
    r"""The probability of each level of each pixel under a Gaussian of its own.

    .. math::
        P(k) = \Phi\!\left(\frac{x_k + h - \mu}{s}\right)
             - \Phi\!\left(\frac{x_k - h - \mu}{s}\right), \quad
        x_k = \mathrm{low} + 2 h k, \quad h = \frac{\mathrm{high} - \mathrm{low}}
        {2 (\mathrm{levels} - 1)},

    the first bin open below and the last above, so that the levels share out all probability.
    The levels lie at the ends of the range, as k / 127.5 - 1 of images of 8 bits does. A
    dequantizer's or a `LevelDecoder`'s levels are intervals that fill their range instead; their
    centres are the levels of this with both ends drawn in by half of (high - low) / levels.

    Args:
        levels: the number of levels, 256 for images of 8 bits.
        low: the value of the first level.
        high: the value of the last level.
        cdf: "exact", in log space and right in both tails; or "tanh", the approximation with
            probabilities of at least 1e-12 with which published numbers were computed, whose
            gradient vanishes in the tails.

    Raises:
        ValueError: unless levels >= 2 and low < high, both finite, and cdf is one of the two.
        TypeError: if levels is not an integer, or low or high not a number.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239
    (section 3.3); the tanh: Nichol and Dhariwal, 2021, arXiv 2102.09672.

    >>> x = GaussianDecoder(levels=3).encode(torch.tensor([[0, 1, 2]]))
    >>> x, GaussianDecoder(levels=3).log_prob(x, torch.zeros(1, 3), torch.zeros(1, 3)).exp()
    (tensor([[-1.,  0.,  1.]]), tensor([[0.3085, 0.3829, 0.3085]]))
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0
    cdf: str = "exact"

    def __post_init__(self) -> None:
        Levels(self.levels, self.low, self.high)  # says what is wrong
        if self.cdf not in ("exact", "tanh"):
            raise ValueError(f'cdf: expected "exact" or "tanh", got {self.cdf!r}')

    @property
    def _half(self) -> float:
        return (self.high - self.low) / (2 * (self.levels - 1))

    @property
    def _bins(self) -> Levels:
        return Levels(self.levels, self.low - self._half, self.high + self._half)

    def encode(self, images: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of the levels of images (B, *D), of a dtype or the default one.

        Raises:
            TypeError: if images are not integers.
            ValueError: if a value is no level.
        """
        return self._bins.encode(images, dtype=dtype)

    def check(self, x: Tensor) -> None:
        """Raise unless data x (B, *D) lie on the levels (read on the CPU only).

        Raises:
            ValueError: if a value is further from every level than a hundredth of a bin.
        """
        if readable(x):
            off = (x - self.encode(self._bins.decode(x), dtype=x.dtype)).abs()
            if not bool((off <= 0.02 * self._half).all()):  # a NaN fails too
                worst = float(x.flatten()[off.flatten().argmax()])
                raise ValueError(
                    f"x0: expected data on {self.levels} levels from {self.low:g} to "
                    f"{self.high:g}, as GaussianDecoder.encode makes of integers, got {worst:g}"
                )

    def log_prob(self, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """Return the log-probabilities of single pixels x (B, *D), on levels, in nats (B, *D).

        Args:
            x: the values of the levels (B, *D).
            mean: the means mu (B, *D).
            log_var: the logarithms of the variances s^2 (B, *D), or what broadcasts to it.
        """
        scale, half = torch.exp(-0.5 * log_var), self._half
        first, last = x < self.low + half, x > self.high - half
        offset = x - mean
        if self.cdf == "tanh":
            above, below = _tanh_cdf((offset + half) * scale), _tanh_cdf((offset - half) * scale)
            mass = torch.where(first, above, torch.where(last, 1 - below, above - below))
            return torch.log(mass.clamp_min(1e-12))
        open_end = log_normal_cdf((half + torch.where(first, offset, -offset)) * scale)
        return torch.where(first | last, open_end, _log_mass(offset, half, scale))


def _tanh_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def log_normal_cdf(z: Tensor) -> Tensor:
    """Return log Phi(z), with the digits of value and gradient however far out z is.

    The gradient of torch's own log_ndtr is the exponential of a difference of large numbers.
    """
    low, high = z.clamp_max(0.0), z.clamp_min(0.0)
    tail = torch.log(0.5 * torch.special.erfcx(low * -math.sqrt(0.5))) - 0.5 * low.square()
    return torch.where(z < 0, tail, torch.log1p(-0.5 * torch.erfc(high * math.sqrt(0.5))))


def _log_mass(offset: Tensor, half: float, scale: Tensor) -> Tensor:
    """Return log(Phi((offset + half) scale) - Phi((offset - half) scale))."""
    distance, width = offset.abs() * scale, 2 * half * scale
    # On the negative side, where both values of Phi keep their digits.
    top = log_normal_cdf(0.5 * width - distance)
    gap = top - log_normal_cdf(-0.5 * width - distance)
    # Where the density hardly changes within the bin, the gap has few digits; Taylor's sum has all.
    density = torch.log(width) - 0.5 * distance.square() - 0.5 * math.log(2 * math.pi)
    density = density + width.square() * (distance.square() - 1) / 24
    return torch.where(width < 1e-2, density, top + torch.log(-torch.expm1(-gap.clamp_min(1e-3))))


def gaussian_kl(difference: Tensor, log_var_q: Tensor, log_var_p: Tensor) -> Tensor:
    r"""Return KL(N(m + difference, v_q) || N(m, v_p)) elementwise, nats.

    .. math::
        \tfrac12 (v_q / v_p - 1 - \log(v_q / v_p) + \mathrm{difference}^2 / v_p)
    """
    ratio = log_var_q - log_var_p
    return 0.5 * (torch.expm1(ratio) - ratio + difference.square() * torch.exp(-log_var_p))


def prior_kl(sde: ForwardSDE, x: Tensor) -> Tensor:
    r"""Return KL(N(alpha_T x, sigma_T^2 I) || N(0, prior_std^2 I)), (B,), nats.

    .. math::
        \tfrac12 \sum (r + \alpha^2 x^2 / \pi^2 - 1 - \log r), \quad r = \sigma^2 / \pi^2
    """
    alpha, sigma = sde.marginal(exact(x.new_full((len(x),), sde.T)))
    squares = exact(x).reshape(len(x), -1).square()
    ratio = (sigma / sde.prior_std).square()
    shift = (alpha / sde.prior_std).square() * squares.sum(1)
    return 0.5 * (squares.shape[1] * (ratio - 1 - torch.log(ratio)) + shift)


def chain_length(model: ScoreModel) -> int:
    """Return the number of steps of a model's process, or raise if it is no chain."""
    check_part(model, ScoreModel, "model")
    steps = getattr(model.sde, "steps", None)
    if not isinstance(steps, int):
        raise TypeError(
            "model: expected one whose process is a chain of steps, such as DDPMChain, "
            f"got {type(model.sde).__name__}"
        )
    return steps


def step_log_variances(sde: ForwardSDE, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return log v_posterior and log v_forward, each (B,), of the steps from t to s.

    .. math::
        v_{forward} = \mathrm{std}^2, \quad
        v_{posterior} = \mathrm{std}^2 \sigma_s^2 / \sigma_t^2

    with std that of p(x_t | x_s). The posterior of a step to s = 0 has no variance; it takes that
    of a step from 2t to t, the chain's second.
    """
    ends = s == 0
    later, earlier = torch.where(ends, 2 * t, t), torch.where(ends, t, s)
    std = sde.transition(earlier, later)[1]
    spread = sde.marginal(earlier)[1] / sde.marginal(later)[1]
    return 2 * torch.log(std * spread), 2 * torch.log(sde.transition(s, t)[1])


def step_nats(
    model: ScoreModel,
    prediction: Prediction,
    x0: Tensor,
    step: Tensor,
    decoder: GaussianDecoder,
    *,
    detach_mean: bool = False,
    clip: bool = False,
) -> Tensor:
    r"""Return what the steps of a chain cost in its variational bound, nats, (B,).

    .. math::
        KL(q(x_{i} | x_{i+1}, x_0) \,\|\, p(x_{i} | x_{i+1})), \quad i > 0; \qquad
        -\log p(x_0 | x_1), \quad i = 0

    Args:
        model: the score model; its SDE is a chain, its `variance`, if any, what it says of that.
        prediction: what it predicts of the states x_{i+1} at the later ends of the steps.
        x0: the data (B, *D), on the decoder's levels.
        step: the numbers i of the steps, (B,), from 0.
        decoder: the likelihood of the data in the first step.
        detach_mean: whether only the variance learns.
        clip: whether the predicted data are kept within the decoder's levels.
    """
    sde, count = model.sde, chain_length(model)
    i = exact(step.to(torch.float32))
    s, t = i / count, (i + 1) / count
    # Both means have the same share of x_{i+1}, and in the first step none.
    share = sde.marginal(s)[0] * (sde.transition(s, t)[1] / sde.marginal(t)[1]).square()
    dtype = torch.promote_types(x0.dtype, torch.float32)
    x0, mean = x0.to(dtype), prediction.x0.to(dtype)
    mean = mean.clamp(decoder.low, decoder.high) if clip else mean
    mean = mean.detach() if detach_mean else mean

    lower, upper = step_log_variances(sde, s, t)
    if getattr(model, "variance", None) == "fixed_large":
        log_var = torch.where(step == 0, lower, upper)
    else:
        log_var = lower
    lower, upper, log_var = (cast(Tensor, expand(c, mean)) for c in (lower, upper, log_var))
    if prediction.log_var is not None:
        log_var = prediction.log_var.to(dtype)
    elif prediction.log_var_fraction is not None:
        log_var = lower + prediction.log_var_fraction.to(dtype) * (upper - lower)
    difference = (x0 - mean) * expand(share, x0)
    divergence = gaussian_kl(difference, lower, log_var).reshape(len(x0), -1).sum(1)
    read = decoder.log_prob(x0, mean, log_var).reshape(len(x0), -1).sum(1)
    return torch.where(step == 0, -read, divergence)
