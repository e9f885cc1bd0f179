"""Distributions of training times from the literature of flow matching."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from .._batch_times import Drawn
from .._checks import check_finite_number, check_number, check_part, check_positive
from .._schedules import shifted
from ..interfaces import ForwardSDE, TimeSampler
from ..random import Generators, draw
from .times import DrawnTimes, UniformTimes

_LEAST_MODE, _MOST_MODE = -1.0, 2 / (math.pi - 2)  # where the map of `ModeTimes` is increasing


@dataclass(frozen=True)
class LogitNormalTimes(DrawnTimes):
    r"""Times at which logit(t / T) is Gaussian: intermediate noise levels more often; weight 1.

    .. math::
        t = T\, \mathrm{sigmoid}(\mathrm{mean} + \mathrm{std}\, z), \quad z \sim N(0, 1)

    On a `FlowMatchingSDE`, where the logit of t is ln(sigma / alpha), this is `LogNormalTimes`. The
    distribution is part of the objective (`unbiased` is False). Times are clamped to [t_min, T].

    Args:
        mean: the mean of the logit; a larger mean favors higher noise.
        std: its standard deviation.

    Raises:
        ValueError: unless mean is finite and std finite and positive.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis,
    2024, arXiv 2403.03206 (section 3.1; mean 0 and std 1 did best).

    >>> import torch
    >>> from diffusionkit import FlowMatchingSDE, LogitNormalTimes
    >>> generator = torch.Generator().manual_seed(0)
    >>> t, weight = LogitNormalTimes().sample(
    ...     FlowMatchingSDE(), 10000, generator=generator
    ... )
    >>> round(float(((0.25 < t) & (t < 0.75)).double().mean()), 2)
    0.73
    """

    mean: float = 0.0
    std: float = 1.0

    unbiased = False

    def __post_init__(self) -> None:
        check_finite_number(self.mean, "mean")
        check_positive(self.std, "std")

    @override
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        z = draw(torch.randn, (n,), generator, device, dtype)
        t = sde.T * torch.sigmoid(self.mean + self.std * z)
        return Drawn(t.clamp(sde.t_min, sde.T))


@dataclass(frozen=True)
class ModeTimes(DrawnTimes):
    r"""Times with a mode in the middle, and a positive density at both ends; weight 1.

    .. math::
        t = T \left(1 - u - \mathrm{scale} \left(\cos^2 \tfrac{\pi u}{2} - 1 + u\right)\right),
        \quad u \text{ uniform on } [0, 1]

    At scale 0 they are uniform, above it more often in the middle, below it at the ends. The
    distribution is part of the objective (`unbiased` is False). Times are clamped to [t_min, T].

    Args:
        scale: from -1 to 2 / (pi - 2) = 1.75, where the density in the middle is infinite.

    Raises:
        ValueError: if scale is outside this range.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis,
    2024, arXiv 2403.03206 (section 3.1, where 1.29 was among the best).

    >>> import torch
    >>> from diffusionkit import FlowMatchingSDE, ModeTimes
    >>> generator = torch.Generator().manual_seed(0)
    >>> t, weight = ModeTimes(1.29).sample(
    ...     FlowMatchingSDE(), 10000, generator=generator
    ... )
    >>> round(float(((0.25 < t) & (t < 0.75)).double().mean()), 2)
    0.73
    """

    scale: float = 1.29

    unbiased = False

    def __post_init__(self) -> None:
        check_number(self.scale, "scale")
        if not _LEAST_MODE <= self.scale <= _MOST_MODE:
            raise ValueError(
                f"scale: expected a number from -1 to {_MOST_MODE:.5g}, got {self.scale}"
            )

    @override
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        u = draw(torch.rand, (n,), generator, device, dtype)
        bend = torch.cos(0.5 * math.pi * u).square() - 1 + u
        t = sde.T * (1 - u - self.scale * bend)
        return Drawn(t.clamp(sde.t_min, sde.T))


@dataclass(frozen=True)
class ShiftedTimes(TimeSampler):
    r"""The times of another sampler, moved towards the noise: the shift for a higher resolution.

    .. math::
        t' = \frac{m t}{1 + (m - 1) t}

    in units of T. On a `FlowMatchingSDE` it multiplies sigma / alpha by m: with m^2 times as many
    pixels, the noise that hides as much of an image is m times larger. Sample on a `ShiftedGrid`
    with the same shift. The distribution is part of the objective (`unbiased` is False); the
    weights of the other sampler are kept, and times clamped to [t_min, T].

    Args:
        shift: m, such as sqrt(pixels / pixels of the base resolution); 1 is no shift.
        times: the sampler whose times are shifted, `UniformTimes` by default.

    Raises:
        ValueError: unless shift is finite and positive.
        TypeError: if times is not a TimeSampler.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis,
    2024, arXiv 2403.03206 (section 5.3.2, where m = 3 was preferred at 1024 pixels).

    >>> import torch
    >>> from diffusionkit import FlowMatchingSDE, ShiftedTimes
    >>> generator = torch.Generator().manual_seed(0)
    >>> t, _ = ShiftedTimes(3.0).sample(
    ...     FlowMatchingSDE(), 10000, generator=generator
    ... )
    >>> round(float(t.median()), 2)
    0.75
    """

    shift: float
    times: TimeSampler = field(default_factory=UniformTimes)

    unbiased = False

    def __post_init__(self) -> None:
        check_positive(self.shift, "shift")
        check_part(self.times, TimeSampler, "times")

    @override
    def sample(
        self,
        sde: ForwardSDE,
        n: int,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        t, weight = self.times.sample(sde, n, generator=generator, device=device, dtype=dtype)
        return shifted(t, self.shift, sde.T).clamp(sde.t_min, sde.T), weight
