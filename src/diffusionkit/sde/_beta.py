"""The linear beta schedule shared by the VP and sub-VP SDEs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_positive, check_t_min, check_times, check_transition
from ..interfaces import ForwardSDE


@dataclass(frozen=True)
class LinearBetaSDE(ForwardSDE):
    r"""An SDE with drift -beta(t) x / 2, beta linear from beta_min to beta_max on [0, 1].

    .. math::
        B(t) = \int_0^t \beta = \beta_{min} t + (\beta_{max} - \beta_{min}) t^2 / 2, \quad
        \alpha = e^{-B/2}.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = field(default=1e-5, kw_only=True)

    T = 1.0
    prior_std = 1.0

    def __post_init__(self) -> None:
        check_positive(self.beta_min, "beta_min")
        check_positive(self.beta_max, "beta_max")
        check_t_min(self.t_min, self.T)
        if self.beta_min > self.beta_max:
            got = f"{self.beta_min} and {self.beta_max}"
            raise ValueError(f"beta_min, beta_max: expected beta_min <= beta_max, got {got}")

    @property
    @override
    def t_stop(self) -> float:
        return max(1e-3, self.t_min)

    def beta(self, t: Tensor) -> Tensor:
        """Return beta at times t (B,), (B,)."""
        check_times(t, self.T)
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integrated_beta(self, t: Tensor) -> Tensor:
        """Return B(t), the integral of beta from 0 to t, (B,)."""
        check_times(t, self.T)
        slope = self.beta_max - self.beta_min
        return torch.addcmul(t * self.beta_min, t, t, value=0.5 * slope)

    def _between(self, s: Tensor, t: Tensor) -> Tensor:
        """Return B(t) - B(s) without cancellation, (B,)."""
        check_transition(s, t, self.T)
        return (t - s) * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * (t + s))

    def _time(self, integral: Tensor) -> Tensor:
        """Return the time (B,) within [0, T] at which B(t) equals the integral."""
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        return (2 * integral / (self.beta_min + root)).clamp(0.0, self.T)

    @override
    def drift_coefficient(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)
