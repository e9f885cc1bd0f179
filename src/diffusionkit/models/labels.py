"""Noise labels (B,): the scalar that conditions a network on the noise level.

A label is any callable (sde, t) -> (B,). Networks embed the label and do not depend on an SDE.

Samplers tabulate elementwise labels, in which the label of a time does not depend on other times.
An attribute `elementwise` declares whether a label is: True is not tested, and with False the label
is computed in every step. Without the attribute it is tested on the CPU, and computed in every step
on other devices.

A label that jumps between numbered levels may declare the jumps by an attribute `jumps`, see
`IndexLabel`: solvers of the probability flow then take steps from jump to jump.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from .._batch_times import known_at, steps_at
from .._checks import check_count, check_positive, numbers
from .._grid_times import grid_point, schedule
from .._kept import Kept
from .._ones import are_ones
from .._schedules import exact, slack, snapped
from ..interfaces import ForwardSDE
from ..sde.chain import Chain

Label: TypeAlias = Callable[[ForwardSDE, Tensor], Tensor]
Number = TypeVar("Number", int, Tensor)


def checked_label(noise_label: object, t: Tensor) -> Tensor:
    """Return the noise labels (B,) at times t (B,), or raise if they are anything else."""
    if isinstance(noise_label, Tensor) and noise_label.shape == t.shape:
        return noise_label
    if not isinstance(noise_label, Tensor):
        got = type(noise_label).__name__
        raise TypeError(f"label: expected a tensor of the shape of t, {tuple(t.shape)}, got {got}")
    raise ValueError(
        f"label: expected the shape of t, {tuple(t.shape)}, got {tuple(noise_label.shape)}"
    )


@dataclass(frozen=True)
class TimeLabel:
    """The time relative to T, times a scale: 999 t for published VP networks.

    Args:
        scale: the label at t = T. With a scale of T the label is t.

    >>> import torch
    >>> from diffusionkit import VPSDE, TimeLabel
    >>> TimeLabel(999.0)(VPSDE(), torch.tensor([0.0, 0.5, 1.0]))
    tensor([  0.0000, 499.5000, 999.0000])
    """

    elementwise: ClassVar[bool] = True

    scale: float = 999.0

    def __post_init__(self) -> None:
        check_positive(self.scale, "scale")

    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return scale t / T, (B,); a whole number at the steps of a chain where it is one."""
        if hasattr(sde, "steps"):
            return _number(sde, t, self.scale, 0, 1.0)
        return t * (self.scale / sde.T)


@dataclass(frozen=True)
class ReverseTimeLabel:
    """The time counted from the noise to the data, times a scale, as in many flow models.

    Args:
        scale: the label of the data, at t = 0.

    Source: Ma et al., SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
    Interpolant Transformers, 2024, arXiv 2401.08740.

    >>> import torch
    >>> from diffusionkit import FlowMatchingSDE, ReverseTimeLabel
    >>> ReverseTimeLabel()(FlowMatchingSDE(), torch.tensor([0.0, 0.25, 1.0]))
    tensor([1.0000, 0.7500, 0.0000])
    """

    elementwise: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.scale, "scale")

    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return scale (1 - t / T), (B,)."""
        return (1 - t / sde.T) * self.scale


@dataclass(frozen=True)
class SigmaLabel:
    """The noise-to-signal ratio sigma / alpha: sigma for VE networks, which embed log(sigma).

    >>> import torch
    >>> from diffusionkit import VESDE, SigmaLabel
    >>> SigmaLabel()(VESDE(), torch.tensor([1.0]))
    tensor([50.])
    """

    elementwise: ClassVar[bool] = True

    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return sigma / alpha, (B,)."""
        alpha, sigma = schedule(sde, t)
        ratio = sigma / alpha
        return ratio.to(t.dtype) if isinstance(ratio, Tensor) else torch.full_like(t, ratio)


@dataclass(frozen=True)
class LogSigmaLabel:
    """The scaled logarithm of the noise-to-signal ratio: log(sigma) / 4 for EDM networks.

    Args:
        scale: the factor applied to the logarithm.
        reference: the ratio at which the label is 0.

    >>> import torch
    >>> from diffusionkit import EDMSDE, LogSigmaLabel
    >>> LogSigmaLabel()(EDMSDE(), torch.tensor([1.0]))
    tensor([0.])
    """

    elementwise: ClassVar[bool] = True

    scale: float = 0.25
    reference: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.scale, "scale")
        check_positive(self.reference, "reference")

    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return scale log(sigma / (alpha reference)), (B,)."""
        if (known := known_at(sde, t)) is None:
            label = sde.log_snr(t) * (-0.5 * self.scale)
            return label if self.reference == 1 else label - self.scale * math.log(self.reference)
        alpha, sigma = known.kernel
        ratio = sigma if are_ones(alpha) else sigma / alpha
        label = torch.log(ratio if self.reference == 1 else ratio * (1 / self.reference))
        return (label if self.scale == 1 else label * self.scale).to(t.dtype)


@dataclass(frozen=True)
class StepLabel:
    """The step of a chain: exactly i at t = (i + 1) / steps, linear in between.

    At the times of steps it is exactly i, even if a time in float32 lies below (i + 1) / steps, so
    that networks may round it down. Between the steps the output of such a network jumps, which
    solvers do not expect: for likelihoods and `ProbabilityFlow` use `IndexLabel` with it.

    Args:
        steps: the number of steps.
        scale: the factor applied to the step; improved DDPM uses 1000 / steps.

    >>> import torch
    >>> from diffusionkit import DDPMChain, StepLabel
    >>> chain, t = DDPMChain.linear(1000), torch.tensor([0.001, 0.5, 1.0])
    >>> StepLabel(1000)(chain, t)
    tensor([  0., 499., 999.])
    """

    elementwise: ClassVar[bool] = True

    steps: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_positive(self.scale, "scale")

    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return scale (t steps / T - 1), at least 0, (B,), in at least float32."""
        return _number(sde, t, self.steps, 1, self.scale)


def _number(sde: ForwardSDE, t: Tensor, steps: float, first: int, scale: float) -> Tensor:
    """Return scale (t steps / T - first), at least 0, and exact where t is that of a step.

    A network that looks labels up in a table rounds them down: 498.99997 would be step 498.
    """
    dtype = t.dtype if t.dtype.itemsize >= 4 else torch.float32
    if (i := steps_at(sde, t)) is not None and isinstance(sde, Chain):

        def made() -> Tensor:
            every = sde.time(torch.arange(sde.steps, device=t.device))
            return _computed_number(sde, every, steps, first, scale).to(dtype)

        key = "number", steps, first, scale, t.device, dtype
        table: Tensor = sde.tables.get(key, made)
        return table.index_select(0, i)
    if (point := grid_point(t, sde)) is None:
        return _computed_number(sde, t, steps, first, scale).to(dtype)
    number = max(point.time * (steps / sde.T) - first, 0.0) * scale
    whole = round(number)
    near = _rounding(t, steps * scale)
    return torch.full_like(t, whole if abs(whole - number) <= near else number, dtype=dtype)


def _computed_number(sde: ForwardSDE, t: Tensor, steps: float, first: int, scale: float) -> Tensor:
    """Return the `_number` at times t (B,), in float64."""
    label = (exact(t) * (steps / sde.T) - first).clamp_min(0.0) * scale
    return snapped(label, _rounding(t, steps * scale))


def _rounding(t: Tensor, largest: float) -> float:
    """Return how far from a whole number a label may be by the rounding of times."""
    # Times in float64 were often in float32 before.
    return slack(largest, t.dtype if t.dtype.itemsize < 4 else torch.float32)


class IndexLabel:
    """The index of the nearest entry in a table of noise-to-signal ratios sigma / alpha.

    For networks trained on numbered noise levels: NCSN counts from the largest sigma, so its
    table is decreasing and level 0 is sigma_max. Distances are measured in log(sigma).

    Args:
        sigmas: the table, positive and strictly monotone in either direction.

    Raises:
        ValueError: if the table has fewer than two entries or is not positive and monotone.

    >>> import torch
    >>> from diffusionkit import VESDE, IndexLabel
    >>> IndexLabel([50.0, 1.0, 0.01])(VESDE(), torch.tensor([0.0, 1.0]))
    tensor([2., 0.])
    """

    elementwise: ClassVar[bool] = True

    def __init__(self, sigmas: Sequence[float] | Tensor) -> None:
        """Store the midpoints between adjacent entries, in log(sigma)."""
        table = numbers(sigmas, "sigmas").flatten().cpu()
        steps = table.diff()
        if len(table) < 2 or not (table > 0).all() or not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError(
                "sigmas: expected at least two positive, strictly increasing or decreasing "
                f"values, got {table.tolist()[:6]}"
            )
        self.sigmas = table
        self._flip = bool(steps[0] < 0)
        log = torch.log(table.flip(0) if self._flip else table)
        self._edges = 0.5 * (log[1:] + log[:-1])
        self._sorted = self._edges.tolist()
        self._copies: Kept[Tensor] = Kept()

    @property
    def jumps(self) -> Tensor:
        """The ratios sigma / alpha between levels, at which the label jumps, increasing."""
        return torch.exp(self._edges)

    @override
    def __repr__(self) -> str:
        return f"IndexLabel({len(self._edges) + 1} levels)"

    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return the index of the nearest level, (B,), in at least float32."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        if (point := grid_point(t, sde)) is not None:
            log = _log(point.sigma) - _log(point.alpha)
            return torch.full_like(t, self._in_table(bisect_left(self._sorted, log)), dtype=dtype)
        log_sigma = -0.5 * sde.log_snr(exact(t))
        key = log_sigma.device, log_sigma.dtype
        edges = self._copies.get(key, lambda: self._edges.to(*key))
        index = torch.bucketize(log_sigma, edges)
        return self._in_table(index).to(dtype)

    def _in_table(self, index: Number) -> Number:
        """Return the index in the table of an index in increasing order."""
        return len(self._edges) - index if self._flip else index


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
