"""The times of a training batch, which carry the schedule at them.

The noisy data, the model, its noise label and the weights of a loss all depend on alpha and sigma
at the same times. An objective computes them once, in float64, and attaches them to its times: no
process is evaluated and no time validated twice. Users' code gets plain tensors, and a tensor that
a user passed carries nothing: it may be saved or copied. Only this module knows of the attachment,
and `check_times` of the mark of validated times.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ._schedules import within


class _SDE(Protocol):
    T: float

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


class _Schedule:
    """The schedule at times (B,), and when it may be used.

    Args:
        sde: the process.
        t: the times.
        times: the times in float64.
        kernel: alpha and sigma in float64.
    """

    __slots__ = ("grad", "kernel", "sde", "times", "version")

    def __init__(
        self, sde: object, t: Tensor, times: Tensor, kernel: tuple[Tensor, Tensor]
    ) -> None:
        self.sde, self.times, self.kernel = sde, times, kernel
        self.grad, self.version = torch.is_grad_enabled(), self._version(t)

    def _version(self, t: Tensor) -> int:
        """Return a number that grows when one of the tensors is changed in place."""
        alpha, sigma = self.kernel
        return t._version + self.times._version + alpha._version + sigma._version

    def holds(self, sde: object, t: Tensor) -> bool:
        """Whether this is the schedule of a process at the times as they are now."""
        return (
            self.sde is sde
            and self.grad is torch.is_grad_enabled()
            and self.version == self._version(t)
        )


def with_schedule(sde: _SDE, t: Tensor) -> Tensor:
    """Return times t (B,), which are validated, such that they carry the schedule of a process."""
    if (
        torch.compiler.is_compiling()  # a compiler finds equal expressions itself
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()  # whose tensors have no versions
        or t.is_inference()
    ):
        return t
    carrier: Any = validated(t.view(t.shape), sde.T)  # nothing is attached to a user's tensor
    times = within(t, sde.T)
    times = validated(t.view(t.shape) if times is t else times, sde.T)
    alpha, sigma = sde.marginal(times)
    if not (alpha.is_inference() or sigma.is_inference()):
        carrier._schedule = _Schedule(sde, carrier, times, (alpha, sigma))
    found: Tensor = carrier
    return found


def validated(t: Tensor, T: float) -> Tensor:
    """Return times t (B,), new ones that are within [0, T], which are not to be validated again."""
    marked: Any = t
    marked._within = T
    return t


def wide_times(sde: _SDE, t: Tensor) -> Tensor:
    """Return times t (B,) in float64, at most T."""
    known = _known(sde, t)
    return within(t, sde.T) if known is None else known.times


def kernel_at(sde: _SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at times t (B,), in float64."""
    known = _known(sde, t)
    return sde.marginal(within(t, sde.T)) if known is None else known.kernel


def _known(sde: object, t: Tensor) -> _Schedule | None:
    known: _Schedule | None = getattr(t, "_schedule", None)
    return known if known is not None and known.holds(sde, t) else None
