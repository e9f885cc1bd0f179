"""Distributions of training times."""

from __future__ import annotations

import abc
import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._batch_times import Drawn, validated, with_schedule
from .._checks import (
    check_count,
    check_flag,
    check_floating_dtype,
    check_log_snr,
    check_number,
    check_part,
    check_positive,
    check_target_device,
    check_times,
    readable,
)
from .._kept import fixed
from .._log_snr import LogSNRSpan
from .._schedules import home, schedule_dtype
from .._tracing import traced, transformed
from ..distributed._group import first_of_all, is_distributed, rank_and_world_size
from ..interfaces import ForwardSDE, TimeSampler
from ..random import Generators, check_generator, draw


def times_and_weights(
    sampler: TimeSampler, sde: ForwardSDE, x0: Tensor, t: Tensor | None, generator: Generators
) -> tuple[Tensor, Tensor | None]:
    """Return times and weights (B,) for data x0: drawn, or given; None for weights of 1."""
    # In the data's dtype, so that a model that computes with t stays in that dtype.
    dtype = torch.float64 if x0.dtype is torch.float64 else torch.float32
    if t is None and type(sampler).sample is DrawnTimes.sample:  # not that of a subclass
        own: Any = sampler
        drawn: Drawn = own._draw(sde, x0.shape[0], generator, x0.device, dtype)
    else:
        drawn = _sampled(sampler, sde, x0, dtype, generator) if t is None else Drawn(t)
        check_times(drawn.t, sde.T, x0.shape[0], x0)
        drawn.t = drawn.t.view(drawn.t.shape)  # nothing is attached to a tensor of the user's
    return with_schedule(sde, drawn), drawn.weight


def weighted_losses(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Return losses (B,) times the weights (B,) of their times, in the dtype of the losses."""
    return losses if weight is None else losses * weight.to(dtype=losses.dtype)


def _sampled(
    sampler: TimeSampler,
    sde: ForwardSDE,
    x0: Tensor,
    dtype: torch.dtype,
    generator: Generators,
) -> Drawn:
    """Return times and weights (B,) for data x0, drawn from any sampler."""
    sample = partial(sampler.sample, sde, device=x0.device, dtype=dtype)
    try:
        return Drawn(*sample(x0.shape[0], generator=generator))
    except TypeError:
        # One generator for each sample, in a sampler that uses torch's draws, which take one.
        if generator is None or isinstance(generator, torch.Generator):
            raise
    check_generator(generator, len(x0))
    drawn = [sample(1, generator=one) for one in generator]
    times, weights = (torch.cat(column) for column in zip(*drawn, strict=True))
    return Drawn(times, weights)


def _stratified(
    n: int,
    generator: Generators,
    device: torch.device | str | None,
    dtype: torch.dtype,
    sampler: TimeSampler,
) -> Tensor:
    """Return n numbers evenly spaced over [0, 1), all shifted by one uniform draw.

    In training, processes share the shift of the first of them, and the numbers of one lie between
    those of another: n of each of W processes are 1 / (n W) apart. For different n those of each
    process are evenly spaced. Each process draws a shift, so that its generator advances.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}; "
            f"{type(sampler).__name__} shifts the whole batch by one draw"
        )
    shift = draw(torch.rand, (1,), generator, device, dtype)
    index = torch.arange(n, device=device, dtype=dtype)
    # Where no gradients are wanted, as in an evaluation by one process, the others do not draw.
    if is_distributed() and torch.is_grad_enabled():
        rank, world = rank_and_world_size()
        shift, index = first_of_all(shift), index + rank / world
    return (shift + index / n) % 1.0


def _uniform(low: float, high: float, shape: Sequence[int], **kwargs: Any) -> Tensor:
    """Return uniform numbers of a shape: torch.rand, stretched by the same operation."""
    if transformed():  # where a draw in place may fail
        return low + (high - low) * torch.rand(shape, **kwargs)
    generator = kwargs.pop("generator", None)
    return torch.empty(shape, **kwargs).uniform_(low, high, generator=generator)


def _normal(mean: float, std: float, shape: Sequence[int], **kwargs: Any) -> Tensor:
    """Return Gaussian numbers of a shape: torch.randn, stretched by the same operation."""
    return torch.normal(mean, std, shape, **kwargs)


def check_draw(
    sde: ForwardSDE, n: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """Raise unless n times of a process can be drawn on a device and in a dtype."""
    check_part(sde, ForwardSDE, "sde")
    check_count(n, "n")
    check_target_device(device)
    check_floating_dtype(dtype)


class DrawnTimes(TimeSampler):
    """A sampler of times within [0, T] that also returns what it computed to draw them."""

    @abc.abstractmethod
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        """Draw n times; the arguments are validated."""

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
        """Draw times (n,) and weights (n,), see `TimeSampler`.

        Raises:
            ValueError: if n < 1 or the device is unknown, or as the process does.
            TypeError: if an argument has the wrong type.
        """
        check_draw(sde, n, device, dtype)
        drawn = self._draw(sde, n, generator, device, dtype or schedule_dtype(device))
        weight = torch.ones_like(drawn.t) if drawn.weight is None else drawn.weight
        return drawn.t, weight


@dataclass(frozen=True)
class UniformTimes(DrawnTimes):
    """Independent times, uniform on [t_min, T]; weight 1.

    >>> from diffusionkit import VPSDE, UniformTimes
    >>> t, weight = UniformTimes().sample(VPSDE(), 4)
    >>> t.shape, weight.tolist()
    (torch.Size([4]), [1.0, 1.0, 1.0, 1.0])
    """

    @override
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        between = partial(_uniform, sde.t_min, sde.T)
        return Drawn(draw(between, (n,), generator, device, dtype))


@dataclass(frozen=True)
class StratifiedTimes(DrawnTimes):
    r"""Evenly spaced times over [t_min, T] with one random shift: the mean loss varies less.

    .. math::
        u_i = (u_0 + i / n) \bmod 1, \quad t = t_{min} + (T - t_{min}) u, \quad \text{weight } 1

    Each single time is uniform. The batch shares one draw, so one generator for each sample
    raises ValueError. In training, processes of a group share it too, a broadcast of one number:
    their times together are evenly spaced, and all must draw equally often.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630 (appendix I.1).
    """

    @override
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        u = _stratified(n, generator, device, dtype, self)
        return Drawn(sde.t_min + (sde.T - sde.t_min) * u)


@dataclass(frozen=True)
class ImportanceTimes(DrawnTimes):
    r"""Times uniform in the log-SNR: importance sampling for the likelihood-weighted loss.

    .. math::
        p(t) = \frac{1}{Z} \frac{g(t)^2}{\sigma(t)^2}, \quad
        Z = \int_{t_{min}}^T \frac{g^2}{\sigma^2} dt
          = \mathrm{log\,snr}(t_{min}) - \mathrm{log\,snr}(T), \quad
        \text{weight } \frac{Z \sigma^2}{(T - t_{min}) g^2}

    The weight keeps the expected loss that of uniform times. It cancels `LikelihoodWeighting`, so
    that all times have the same weight and the loss has far less variance. Where alpha(T) = 0 and Z
    is infinite, the density falls in proportion to alpha / sigma beyond sigma / alpha = 160, and
    the weight is that of this density.

    Args:
        stratified: whether the times of a batch are evenly spaced with one random shift, as those
            of `StratifiedTimes`; must be False with one generator for each sample.

    Source: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021, arXiv
    2101.09258 (section 5); Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630.

    >>> from diffusionkit import VPSDE, ImportanceTimes
    >>> round(ImportanceTimes().normalizer(VPSDE()), 6)
    23.864472
    """

    stratified: bool = True

    def __post_init__(self) -> None:
        check_flag(self.stratified, "stratified")

    def normalizer(self, sde: ForwardSDE) -> float:
        """Return Z, the integral of g^2 / sigma^2 over [t_min, T].

        Raises:
            ValueError: if Z is infinite: sigma(t_min) or alpha(T) is 0.
        """
        span = _span(sde, None)
        first, last = float(span.first), float(span.last)
        check_log_snr((first, last), sde.t_min, sde.T)
        return first - last

    @override
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        exactly = schedule_dtype(device)
        if self.stratified:
            u = _stratified(n, generator, device, exactly, self)
        else:
            u = draw(torch.rand, (n,), generator, device, exactly)
        span = _span(sde, device)
        t = validated(self._at(sde, u, span), sde.T)
        kernel = sde.marginal(t)
        rate = (sde.diffusion(t) / kernel[1]).square()
        weight = span.length / (sde.T - sde.t_min) / rate.detach()
        if not span.uniform:
            weight = weight / span.share(sde.log_snr(t).detach())
        return Drawn(t.to(dtype=dtype), weight.to(dtype=dtype), exact=t, kernel=kernel, rate=rate)

    def quantile(self, sde: ForwardSDE, u: Tensor) -> Tensor:
        """Return the times (n,) below which a fraction u (n,) of the distribution lies."""
        return self._at(sde, u, _span(sde, u.device))

    def _at(self, sde: ForwardSDE, u: Tensor, span: LogSNRSpan) -> Tensor:
        return sde.time_at_log_snr(span.at(u)).clamp(sde.t_min, sde.T)


def _span(sde: ForwardSDE, device: torch.device | str | None) -> LogSNRSpan:
    """Return the log-SNRs from t_min to T, floats where reading them is free."""
    if not traced():
        with contextlib.suppress(TypeError):
            return _kept_span(sde)
    here = home(sde)
    if torch.compiler.is_compiling() and here.type == "cpu":
        here = torch.device(device or "cpu")
    ends = _ends(sde, here)
    return _read(sde, ends) if readable(ends) else LogSNRSpan(ends[0], ends[1])


@functools.lru_cache(maxsize=64)
def _kept_span(sde: ForwardSDE) -> LogSNRSpan:
    """Return the log-SNRs of a process that is a value: equal ones have the same.

    Raises:
        TypeError: if the process may change, or cannot be hashed.
    """
    if not fixed(sde):  # asked once for each value, which takes as long as the lookup
        raise TypeError("sde: expected a process that cannot change, got another")
    return _read(sde, _ends(sde, home(sde)))  # the host's, where reading is free


def _ends(sde: ForwardSDE, here: torch.device) -> Tensor:
    """Return the log-SNRs at t_min and T (2,), on the device where a process computes."""
    at = torch.linspace(sde.t_min, sde.T, 2, dtype=schedule_dtype(here), device=here)
    return sde.log_snr(at).detach()


def _read(sde: ForwardSDE, ends: Tensor) -> LogSNRSpan:
    """Return log-SNRs (2,) as floats, or raise if they are infinite."""
    span = LogSNRSpan(*ends.tolist())
    check_log_snr((ends[0].item(), float(span.floor)), sde.t_min, sde.T)
    return span


@dataclass(frozen=True)
class LogNormalTimes(DrawnTimes):
    r"""Times at which ln(sigma / alpha) is Gaussian, as in EDM; weight 1.

    Training concentrates on the noise levels where it helps most. The distribution is part of the
    objective (`unbiased` is False). Times are clamped to [t_min, T].

    Args:
        mean: the mean of ln(sigma / alpha).
        std: the standard deviation of ln(sigma / alpha).

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    arXiv 2206.00364 (table 1).
    """

    mean: float = -1.2
    std: float = 1.2

    unbiased = False

    def __post_init__(self) -> None:
        check_number(self.mean, "mean")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean: expected a finite number, got {self.mean}")
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
        log_ratio = draw(partial(_normal, self.mean, self.std), (n,), generator, device, dtype)
        t = sde.time_at_log_snr(log_ratio * -2)
        return Drawn(t.clamp(sde.t_min, sde.T))
