"""Laws of the times a loss is taken at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_count, check_number, check_positive
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, TimeSampler
from ..random import Generators, rand, randn


def _stratified(
    n: int,
    generator: Generators,
    device: torch.device | str | None,
    dtype: torch.dtype,
    law: TimeSampler,
) -> Tensor:
    """Return n numbers spread evenly over [0, 1) by one shared shift."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: {type(law).__name__} shares one shift over the batch; expected a "
            f"torch.Generator or None, got {type(generator).__name__}"
        )
    shift = rand(1, generator=generator, device=device, dtype=dtype)
    return (shift + torch.arange(n, device=device, dtype=dtype) / n) % 1.0


@dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """Independent times, uniform on [t_min, T]; weight 1.

    >>> from diffusionkit import VPSDE
    >>> t, weight = UniformTimes().sample(VPSDE(), 4)
    >>> t.shape, weight.tolist()
    (torch.Size([4]), [1.0, 1.0, 1.0, 1.0])
    """

    def sample(
        self,
        sde: ForwardSDE,
        n: int,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw times (n,) and weights (n,)."""
        check_count(n, "n")
        dtype = dtype or schedule_dtype(device)
        u = rand(n, generator=generator, device=device, dtype=dtype)
        return sde.t_min + (sde.T - sde.t_min) * u, torch.ones_like(u)


@dataclass(frozen=True)
class StratifiedTimes(TimeSampler):
    r"""Times spread evenly over [t_min, T] by one shared shift: less variance of the loss.

    .. math::
        u_i = (u_0 + i / n) \bmod 1, \quad t = t_{min} + (T - t_{min}) u, \quad \text{weight } 1

    Each time alone is uniform. One generator for each sample cannot share a shift and is
    refused.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630 (appendix I.1).
    """

    def sample(
        self,
        sde: ForwardSDE,
        n: int,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw times (n,) and weights (n,)."""
        check_count(n, "n")
        u = _stratified(n, generator, device, dtype or schedule_dtype(device), self)
        return sde.t_min + (sde.T - sde.t_min) * u, torch.ones_like(u)


@dataclass(frozen=True)
class ImportanceTimes(TimeSampler):
    r"""Times uniform in the log-SNR: the likelihood's own law, with far less variance.

    .. math::
        p(t) = \frac{1}{Z} \frac{g(t)^2}{\sigma(t)^2}, \quad
        Z = \int_{t_{min}}^T \frac{g^2}{\sigma^2} dt
          = \mathrm{log\,snr}(t_{min}) - \mathrm{log\,snr}(T), \quad
        \text{weight } \frac{Z \sigma^2}{(T - t_{min}) g^2}

    The weight leaves the expectation of a loss as it is with uniform times. With
    `LikelihoodWeighting` it cancels the weighting, and all times weigh the same.

    Args:
        stratified: whether the times of a batch are spread evenly by one shared shift. One
            generator for each sample cannot share a shift and wants False.

    Source: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    arXiv 2101.09258 (section 5); Kingma et al., 2021, arXiv 2107.00630 (the shared shift).

    >>> from diffusionkit import VPSDE
    >>> round(ImportanceTimes().normaliser(VPSDE()), 6)
    23.864472
    """

    stratified: bool = True

    def normaliser(self, sde: ForwardSDE) -> float:
        """Return Z, the integral of g^2 / sigma^2 over [t_min, T].

        Raises:
            ValueError: if it is infinite, as it is from t_min = 0 where there is no noise.
        """
        first, last = self._ends(sde, None)
        return float(first - last)

    def sample(
        self,
        sde: ForwardSDE,
        n: int,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw times (n,) and weights (n,)."""
        check_count(n, "n")
        exactly = schedule_dtype(device)
        if self.stratified:
            u = _stratified(n, generator, device, exactly, self)
        else:
            u = rand(n, generator=generator, device=device, dtype=exactly)
        first, last = self._ends(sde, device)
        t = self.quantile(sde, u)
        rate = (sde.diffusion(t) / sde.marginal(t)[1]).square().detach()
        weight = (first - last) / ((sde.T - sde.t_min) * rate)
        return t.to(dtype or exactly), weight.to(dtype or exactly)

    def quantile(self, sde: ForwardSDE, u: Tensor) -> Tensor:
        """Return the times (n,) below which a share u (n,) of the law lies."""
        first, last = self._ends(sde, u.device)
        return sde.time_at_log_snr(first + (last - first) * u).clamp(sde.t_min, sde.T)

    def _ends(self, sde: ForwardSDE, device: torch.device | str | None) -> Tensor:
        """Return the log-SNR at t_min and at T, (2,)."""
        at = torch.tensor([sde.t_min, sde.T], dtype=schedule_dtype(device), device=home(sde))
        ends = sde.log_snr(at).detach().to(device)
        if not bool(torch.isfinite(ends).all()):
            raise ValueError(
                f"ImportanceTimes: expected a finite log-SNR at t_min = {sde.t_min:g} and "
                f"T = {sde.T:g}, got {ends.tolist()}; give the SDE a t_min > 0"
            )
        return ends


@dataclass(frozen=True)
class LogNormalTimes(TimeSampler):
    r"""Times at which ln(sigma / alpha) is normal: EDM's law, effort where it pays; weight 1.

    The law defines the objective by itself. Times are kept within [t_min, T].

    Args:
        mean: the mean of ln(sigma / alpha).
        std: its standard deviation.

    Source: Karras et al., 2022, arXiv 2206.00364 (table 1).
    """

    mean: float = -1.2
    std: float = 1.2

    unbiased = False

    def __post_init__(self) -> None:
        check_number(self.mean, "mean")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean: expected a finite number, got {self.mean}")
        check_positive(self.std, "std")

    def sample(
        self,
        sde: ForwardSDE,
        n: int,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw times (n,) and weights (n,)."""
        check_count(n, "n")
        dtype = dtype or schedule_dtype(device)
        z = randn((n,), generator=generator, device=device, dtype=dtype)
        t = sde.time_at_log_snr(-2 * (self.mean + self.std * z))
        return t.clamp(sde.t_min, sde.T), torch.ones_like(z)
