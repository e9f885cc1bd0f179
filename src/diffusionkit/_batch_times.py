"""The times of a training batch, which carry the schedule at them.

The noisy data, the model, its noise label and the weights of a loss all depend on alpha and sigma
at the same times. An objective computes them once, in float64, and attaches them to its times: no
process is evaluated and no time validated twice. Users' code gets plain tensors, and a tensor that
a user passed carries nothing: it may be saved or copied. Only this module uses the attachment, and
`check_times` of the mark of validated times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ._schedules import within
from ._tracing import traced


class _SDE(Protocol):
    T: float

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


class _DiffusingSDE(_SDE, Protocol):
    def diffusion(self, t: Tensor) -> Tensor: ...


@dataclass(slots=True, eq=False)
class Drawn:
    """Times of a batch, within [0, T], and what was computed to draw them.

    Args:
        t: the times (B,).
        weight: their weights (B,), None for 1.
        exact: the times in float64 and on their validated range, if they were drawn so.
        kernel: alpha and sigma at the exact times.
        steps: the steps (B,) of a chain that end at these times, numbered from 0.
        rate: g^2 / sigma^2 at the exact times.
    """

    t: Tensor
    weight: Tensor | None = None
    exact: Tensor | None = None
    kernel: tuple[Tensor, Tensor] | None = None
    steps: Tensor | None = None
    rate: Tensor | None = None


class Schedule:
    """The schedule at times (B,), and when it may be used.

    Args:
        sde: the process.
        t: the times.
        times: the times in float64.
        kernel: alpha and sigma in float64.
        drawn: what else was computed to draw the times.
    """

    __slots__ = ("grad", "kernel", "rate", "sde", "steps", "times", "version")

    def __init__(
        self,
        sde: object,
        t: Tensor,
        times: Tensor,
        kernel: tuple[Tensor, Tensor],
        drawn: Drawn,
    ) -> None:
        self.sde, self.times, self.kernel = sde, times, kernel
        self.rate, self.steps = drawn.rate, drawn.steps
        self.grad = torch.is_grad_enabled()
        # A number that grows when one of the tensors is changed in place.
        alpha, sigma = kernel
        self.version = t._version + times._version + alpha._version + sigma._version


def can_carry(t: Tensor) -> bool:
    """Return whether times can carry a schedule."""
    return not (
        traced()  # a compiler finds equal expressions itself
        or torch.is_inference_mode_enabled()  # whose tensors have no versions
        or t.is_inference()
    )


def with_schedule(sde: _SDE, drawn: Drawn) -> Tensor:
    """Return times (B,), which are validated, such that they carry the schedule of a process.

    It is attached to the times themselves, which must not be a tensor of the user's.
    """
    t, times = drawn.t, drawn.exact
    if not can_carry(t):
        return t
    carrier: Any = t
    carrier._within = sde.T
    wide: Any = within(t, sde.T) if times is None else times
    if wide is t:
        wide = t.view(t.shape)  # another tensor, or each would hold the other
    wide._within = sde.T
    alpha, sigma = sde.marginal(wide) if drawn.kernel is None else drawn.kernel
    if not (alpha.is_inference() or sigma.is_inference()):
        carrier._schedule = Schedule(sde, carrier, wide, (alpha, sigma), drawn)
    found: Tensor = carrier
    return found


def validated(t: Tensor, T: float) -> Tensor:
    """Return times t (B,), new ones that are within [0, T], which are not to be validated again."""
    if not torch.compiler.is_compiling():  # which torch 2.6 could not trace; nothing is read there
        marked: Any = t
        marked._within = T
    return t


def steps_at(sde: object, t: Tensor) -> Tensor | None:
    """Return the steps (B,) of a chain that end at times t (B,), from 0, where they are known."""
    known = known_at(sde, t)
    return None if known is None else known.steps


def kernel_at(sde: _SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at times t (B,), in float64."""
    known = known_at(sde, t)
    return sde.marginal(within(t, sde.T)) if known is None else known.kernel


def rate_at(sde: _DiffusingSDE, t: Tensor) -> Tensor:
    """Return g^2 / sigma^2 at times t (B,), in float64."""
    if (known := known_at(sde, t)) is None:
        return (sde.diffusion(within(t, sde.T)) / kernel_at(sde, t)[1]).square()
    if known.rate is None or known.rate._version > 0:
        known.rate = (sde.diffusion(known.times) / known.kernel[1]).square()
    return known.rate


def known_at(sde: object, t: Tensor) -> Schedule | None:
    """Return the schedule of a process at times as they are now, or None."""
    found: Schedule | None = getattr(t, "_schedule", None)
    if found is None or found.sde is not sde or found.grad is not torch.is_grad_enabled():
        return None
    alpha, sigma = found.kernel
    version = t._version + found.times._version + alpha._version + sigma._version
    return found if version == found.version else None
