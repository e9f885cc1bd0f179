"""Laws of the times a loss is taken at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_count, check_number, check_positive
from .._draws import Generators, rand, randn
from .._numerics import schedule_dtype
from ..interfaces import ForwardSDE, TimeSampler


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
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                "generator: StratifiedTimes shares one shift over the batch; expected a "
                f"torch.Generator or None, got {type(generator).__name__}"
            )
        dtype = dtype or schedule_dtype(device)
        shift = rand(1, generator=generator, device=device, dtype=dtype)
        u = (shift + torch.arange(n, device=device, dtype=dtype) / n) % 1.0
        return sde.t_min + (sde.T - sde.t_min) * u, torch.ones_like(u)


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
