"""Schedule arithmetic: float64 times, derivatives of alpha and sigma, inversion by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._tracing import transformed

Marginal = Callable[[Tensor], tuple[Tensor, Tensor]]


def exact(t: Tensor) -> Tensor:
    """Return times in float64, or unchanged on a device without it."""
    return t if t.dtype == torch.float64 or t.device.type == "mps" else t.double()


def within(t: Tensor, T: float) -> Tensor:
    """Return times in float64, at most T: in float32, T may have been rounded up."""
    if t.dtype == torch.float64 or t.device.type == "mps":
        return t
    wide = t.double()
    scaled = T * (2**29 + 1)
    return wide.clamp_max(T) if scaled - (scaled - T) > T else wide


def shifted(t: Tensor, shift: float, T: float) -> Tensor:
    """Return times (n,) moved towards T: m t / (1 + (m - 1) t) in units of T, m the shift.

    The ends 0 and T stay, to the bit; the inverse is the shift 1 / m.
    """
    u = t / T
    return T * (u / (u + (1 - u) / shift))


def schedule_dtype(device: torch.device | str | None) -> torch.dtype:
    """Return the dtype in which times are kept on a device."""
    return torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64


def home(sde: object) -> torch.device:
    """Return the device a process computes on: that of its parameters, if it has any."""
    if isinstance(sde, torch.nn.Module):
        for tensor in (*sde.parameters(), *sde.buffers()):
            return tensor.device
    return torch.device("cpu")


def slack(steps: float, dtype: torch.dtype) -> float:
    """Return how far from a whole number a position in 0 ... steps may be by rounding alone."""
    return min(2 * steps * torch.finfo(dtype).eps, 0.5)


def snapped(position: Tensor, slack: float) -> Tensor:
    """Return positions in a chain, whole numbers where only rounding makes a difference.

    In floating point (i + 1) / N times N is not i + 1, and may be below it.
    """
    off = (position.round() - position).detach()
    return position + (off - torch.hardshrink(off, slack))


def drift_and_diffusion(marginal: Marginal, t: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return f = d log alpha / dt and g = sqrt(d sigma^2 / dt - 2 f sigma^2) by autograd, (B,).

    Differentiable where t or a learned schedule is.
    """
    if transformed():
        return _forward_mode(marginal, t, T)
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        learned = any(c.requires_grad for c in marginal(t.detach()))
        keep = wanted and (t.requires_grad or learned)
        # sigma often starts as sqrt(t): its derivative at 0 is infinite, g is not.
        at = t.clamp_min(1e-12 * T)
        at = at if at.requires_grad else at.clone().requires_grad_()
        alpha, sigma = marginal(at)
        variance = sigma * sigma
        f, growth = _derivative(torch.log(alpha), at, keep), _derivative(variance, at, keep)
        g = torch.sqrt((growth - 2 * f * variance).clamp_min(0.0))
    return (f, g) if keep else (f.detach(), g.detach())


def _forward_mode(marginal: Marginal, t: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return f and g by forward differentiation, inside a transform of torch.func."""

    def values(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = marginal(t)
        return torch.log(alpha), sigma * sigma

    at = t.clamp_min(1e-12 * T)
    both: Any = torch.func.jvp(values, (at,), (torch.ones_like(at),))
    (_, variance), (f, growth) = both
    return f, torch.sqrt((growth - 2 * f * variance).clamp_min(0.0))


def _derivative(y: Tensor, t: Tensor, keep: bool) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(t)
    (dy,) = torch.autograd.grad(y.sum(), t, create_graph=keep, retain_graph=True, allow_unused=True)
    return torch.zeros_like(t) if dy is None else dy


def bisect(decreasing: Callable[[Tensor], Tensor], value: Tensor, T: float) -> Tensor:
    """Solve decreasing(t) = value for t in [0, T], elementwise."""
    low, high = torch.zeros_like(value), torch.full_like(value, T)
    # 2^-80 T: absolute, so that t_min itself is found to full relative precision.
    for _ in range(80 if value.dtype == torch.float64 else 50):
        middle = 0.5 * (low + high)
        found = decreasing(middle)
        if found.shape != value.shape:  # it would grow in each iteration
            raise ValueError(
                f"log_snr: expected one value for each time, shape {tuple(value.shape)}, "
                f"got {tuple(found.shape)}"
            )
        above = found > value
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 0.5 * (low + high)
