"""What ForwardSDE derives from alpha and sigma alone, and times whose values are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Marginal = Callable[[Tensor], tuple[Tensor, Tensor]]


def exact(t: Tensor) -> Tensor:
    """Return times in float64, or as they are on a device that has none."""
    return t if t.dtype == torch.float64 or t.device.type == "mps" else t.double()


def schedule_dtype(device: torch.device | str | None) -> torch.dtype:
    """Return the dtype in which times are kept on a device."""
    return torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64


def drift_and_diffusion(marginal: Marginal, t: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return f = d log alpha / dt and g = sqrt(d sigma^2 / dt - 2 f sigma^2) by autograd, (B,).

    Differentiable where t or a learned schedule is.
    """
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
        if found.shape != value.shape:  # it would grow from one round to the next
            raise ValueError(
                f"expected one log-SNR for each time, shape {tuple(value.shape)}, "
                f"got {tuple(found.shape)}"
            )
        above = found > value
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 0.5 * (low + high)


def normal_log_prob(x: Tensor, std: float) -> Tensor:
    """Return the log-density of N(0, std^2 I) at x (B, *D), in nats, (B,)."""
    flat = exact(x).flatten(1) if x.ndim > 1 else exact(x).unsqueeze(1)
    constant = flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(std))
    return (-0.5 * (flat / std).square().sum(1) - constant).to(x.dtype)


class _SDE(Protocol):
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


class Instant:
    """What is known, as plain floats, of a time tensor whose entries are all equal.

    A sampler moves a whole batch through the same times. Their coefficients are computed once
    for the grid and travel with the time tensors, so that a step costs no schedule arithmetic
    and no kernel launches for it; a float also multiplies a state faster than a tensor (B,) does.
    """

    __slots__ = ("alpha", "notes", "sde", "sigma", "time")

    def __init__(self, sde: object, time: float, alpha: float, sigma: float) -> None:
        """Keep the kernel of a process at a time."""
        self.sde, self.time, self.alpha, self.sigma = sde, time, alpha, sigma
        self.notes: dict[object, Any] = {}  # what parts have worked out for this time


def instant(t: Tensor, sde: object) -> Instant | None:
    """Return what is known of a time tensor for a process, or None."""
    known: Instant | None = getattr(t, "_instant", None)
    return known if known is not None and known.sde is sde else None


def tabulated(sde: object, times: Sequence[Tensor]) -> tuple[list[Instant], Tensor] | None:
    """Return what is known of the times of a grid, and the grid (N + 1,); None if one is not."""
    known = [one for one in (instant(t, sde) for t in times) if one is not None]
    if len(known) < len(times):
        return None
    grid = torch.tensor([one.time for one in known], dtype=torch.float64)
    return known, grid.to(times[0].device, schedule_dtype(times[0].device))


def noise_at(t: Tensor) -> float:
    """Return sigma at a time of `instants`."""
    known: Instant = t._instant  # type: ignore[attr-defined]
    return known.sigma


def home(sde: object) -> torch.device:
    """Return the device a process computes on: that of its parameters, if it has any."""
    if isinstance(sde, torch.nn.Module):
        for tensor in (*sde.parameters(), *sde.buffers()):
            return tensor.device
    return torch.device("cpu")


def instants(sde: _SDE, grid: Tensor, like: Tensor) -> Sequence[Tensor]:
    """Return the times of a grid (N + 1,) as tensors (B,), fit for a state, that know their kernel.

    They are in the state's dtype, at least float32, so that a part which multiplies by them
    does not change it; what they know is exact.
    """
    here = home(sde)
    grid = grid.to(here, schedule_dtype(here))
    values = sde.marginal(grid)
    for name, value in zip(("alpha", "sigma"), values, strict=True):
        if not isinstance(value, Tensor) or value.shape != grid.shape:
            raise ValueError(
                f"marginal: expected {name} as a tensor of the shape of t, {tuple(grid.shape)}, "
                f"got {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
            )
        if not bool(torch.isfinite(value).all()):
            worst = float(grid[~torch.isfinite(value)][0])
            raise ValueError(f"marginal: expected finite values, got {name}({worst:g}) that is not")
    columns = (column.tolist() for column in (grid, *values))
    dtype = torch.promote_types(like.dtype, torch.float32)
    times = grid.to(like.device, dtype).unsqueeze(1).expand(-1, len(like)).unbind(0)
    for t, *known in zip(times, *columns, strict=True):
        t._instant = Instant(sde, *known)
    return times
