"""The times of a training batch, which carry the schedule at them.

The noisy data, the model, its noise label and the weights of a loss all depend on alpha and sigma
at the same times. An objective computes them once, in float64, and attaches them to its times: no
process is evaluated and no time validated twice. Users' code gets plain tensors, and a tensor that
a user passed carries nothing: it may be saved or copied. Only this module knows of the attachment,
and `check_times` of the mark of validated times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ._schedules import within


class _SDE(Protocol):
    T: float

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(slots=True, eq=False)
class Drawn:
    """Times of a batch, within [0, T], and what was computed to draw them.

    Args:
        t: the times (B,).
        weight: their weights (B,), None for 1.
        exact: the times in float64 and on their validated range, if they were drawn so.
        kernel: alpha and sigma at the exact times.
        steps: the steps (B,) of a chain that end at these times, numbered from 0.
    """

    t: Tensor
    weight: Tensor | None = None
    exact: Tensor | None = None
    kernel: tuple[Tensor, Tensor] | None = None
    steps: Tensor | None = None


class _Schedule:
    """The schedule at times (B,), and when it may be used.

    Args:
        sde: the process.
        t: the times.
        times: the times in float64.
        kernel: alpha and sigma in float64.
        steps: the steps of a chain that end at the times, or None.
    """

    __slots__ = ("grad", "kernel", "sde", "steps", "times", "version")

    def __init__(
        self,
        sde: object,
        t: Tensor,
        times: Tensor,
        kernel: tuple[Tensor, Tensor],
        steps: Tensor | None,
    ) -> None:
        self.sde, self.times, self.kernel, self.steps = sde, times, kernel, steps
        self.grad, self.version = torch.is_grad_enabled(), _version(t, times, *kernel)


def _version(t: Tensor, times: Tensor, alpha: Tensor, sigma: Tensor) -> int:
    """Return a number that grows when one of the tensors is changed in place."""
    return t._version + times._version + alpha._version + sigma._version


def can_carry(t: Tensor) -> bool:
    """Return whether times can carry a schedule."""
    return not (
        torch.compiler.is_compiling()  # a compiler finds equal expressions itself
        or torch._C._are_functorch_transforms_active()
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
    if times is None:
        times = within(t, sde.T)
    # Another tensor than the one that carries it, or each would hold the other.
    times = validated(t.view(t.shape) if times is t else times, sde.T)
    alpha, sigma = sde.marginal(times) if drawn.kernel is None else drawn.kernel
    if not (alpha.is_inference() or sigma.is_inference()):
        carrier._schedule = _Schedule(sde, carrier, times, (alpha, sigma), drawn.steps)
    found: Tensor = carrier
    return found


def validated(t: Tensor, T: float) -> Tensor:
    """Return times t (B,), new ones that are within [0, T], which are not to be validated again."""
    if not torch.compiler.is_compiling():  # which torch 2.6 could not trace; nothing is read there
        marked: Any = t
        marked._within = T
    return t


def wide_times(sde: _SDE, t: Tensor) -> Tensor:
    """Return times t (B,) in float64, at most T."""
    known = _known(sde, t)
    return within(t, sde.T) if known is None else known.times


def steps_at(sde: object, t: Tensor) -> Tensor | None:
    """Return the steps (B,) of a chain that end at times t (B,), from 0, where they are known."""
    known = _known(sde, t)
    return None if known is None else known.steps


def kernel_at(sde: _SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at times t (B,), in float64."""
    known = _known(sde, t)
    return sde.marginal(within(t, sde.T)) if known is None else known.kernel


def _known(sde: object, t: Tensor) -> _Schedule | None:
    """Return the schedule of a process at times as they are now, or None."""
    found: _Schedule | None = getattr(t, "_schedule", None)
    if (
        found is None
        or found.sde is not sde
        or found.grad is not torch.is_grad_enabled()
        or found.version != _version(t, found.times, *found.kernel)
    ):
        return None
    return found
