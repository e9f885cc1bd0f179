"""The probability flow ODE of any linear SDE, solved in the angle atan(sigma / alpha)."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._checks import check_choice, check_flag, check_mapping, check_positive
from ._grid_times import grid_times, schedule
from ._loops import evaluation_mode
from ._nfe import EvaluationCounter
from ._schedules import home, schedule_dtype
from .distributed.gathered import gathered_weights, sharded_modules
from .interfaces import ForwardSDE, ScoreModel

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams")

_MOST_JUMPS = 300
_ROUNDING = 1e-10  # of a time in float64 that was computed from its noise level

Evaluate: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def angles(sde: ForwardSDE, start: float, end: float) -> Tensor:
    """Return theta = atan(sigma / alpha) at two times, (2,).

    Raises:
        ValueError: if sigma = 0 at either time.
    """
    here = home(sde)
    times = torch.tensor([start, end], dtype=schedule_dtype(here), device=here)
    alpha, sigma = (c.detach() for c in sde.marginal(times))
    for t, value in zip((start, end), sigma.tolist(), strict=True):
        if not value > 0.0:
            raise ValueError(
                f"t: expected a time with sigma > 0, got t = {t:g}, where sigma = {value:g} and "
                "the probability flow is singular; "
                f"pass a later time, such as t_min = {sde.t_min:g}"
            )
    return torch.atan2(sigma, alpha)


@dataclass(frozen=True)
class Solver:
    r"""A torchdiffeq solver for the probability flow of any linear SDE.

    With r^2 = alpha^2 + sigma^2, z = x / r, tan(theta) = sigma / alpha and the predicted
    velocity v = alpha eps - sigma x0,

    .. math::
        \frac{dz}{d\theta} = \frac{v(x, t)}{r}, \quad
        \nabla_z \cdot \frac{dz}{d\theta} = \nabla_x \cdot v,

    the same equation for every process, which determines only the map from theta to t.

    Args:
        method: the name of the solver.
        rtol: the relative tolerance of an adaptive solver.
        atol: the absolute tolerance of an adaptive solver.
        options: further options of torchdiffeq.
        differentiable: whether gradients flow through the steps, if they are enabled.

    Raises:
        ValueError: if the method is unknown or a tolerance is not positive.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: Mapping[str, Any] = field(default_factory=dict)
    differentiable: bool = False

    def __post_init__(self) -> None:
        check_choice("method", self.method, (*ADAPTIVE, *FIXED))
        check_flag(self.differentiable, "differentiable")
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        check_mapping(self.options, "options")

    def __call__(
        self,
        model: ScoreModel,
        evaluate: Evaluate,
        x: Tensor,
        start: float,
        end: float,
        totals: tuple[Tensor, ...] = (),
        dtype: torch.dtype | None = None,
    ) -> tuple[tuple[Tensor, ...], int]:
        """Integrate the flow from one time to another.

        Args:
            model: the score model, in evaluation mode during the call.
            evaluate: maps (x (B, *D), t (B,)) to the predicted v and the rates d total / d theta.
            x: the state at `start` (B, *D).
            start: the initial time.
            end: the final time.
            totals: the initial values of quantities integrated along the path.
            dtype: the dtype of the states passed to `evaluate`, that of x by default.

        Returns:
            The state at `end` and the totals, in float64 if the device supports it, and the number
            of model evaluations.

        Raises:
            ValueError: if the flow is singular at either end or an evaluation is not finite.
        """
        # torchdiffeq imports scipy, which would double the import time of this library.
        torchdiffeq = importlib.import_module("torchdiffeq")
        differentiable = self.differentiable and torch.is_grad_enabled()
        if differentiable and sharded_modules(model):
            raise ValueError(
                "differentiable: expected False for a network sharded by fully_shard, whose "
                "backward passes would differ in number between processes, got True"
            )
        sde, low, high = model.sde, min(start, end), max(start, end)
        # torchdiffeq keeps time in the dtype of the state, and float32 does not resolve angles
        # near pi / 2.
        state_dtype, dtype = schedule_dtype(x.device), dtype or x.dtype
        clock = angles(sde, start, end).to(x.device, state_dtype)
        length = abs(float(clock[1] - clock[0]))
        knots = self._knots(model, clock)

        def time_at(angle: float) -> Tensor:
            here = home(sde)
            log_snr = -2 * math.log(math.tan(min(angle, 0.5 * math.pi)))
            value = torch.tensor([log_snr], dtype=schedule_dtype(here), device=here)
            return sde.time_at_log_snr(value).clamp(low, high)

        def velocity(theta: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            at[0] = theta.item()
            time = time_at(at[0]).clamp(*bounds)
            z = state[0]
            (t,) = grid_times(sde, time, z.new_empty(len(z), dtype=dtype))
            alpha, sigma = schedule(sde, t)
            r = math.hypot(float(alpha), float(sigma))
            rates = [y.to(state_dtype) for y in evaluate((r * z).to(dtype), t)]
            for rate in rates:
                if not bool(torch.isfinite(rate).all()):
                    raise ValueError(
                        "model: expected finite predictions and derivatives, got NaN or "
                        f"infinity at t = {time.item():g}"
                    )
            return rates[0] / r, *rates[1:]

        at = [0.0]  # the last angle
        first, last = radii(sde, start, end)
        state: tuple[Tensor, ...] = (x.to(state_dtype) / first, *totals)
        with (
            gathered_weights(model),  # adaptive steps differ between processes
            evaluation_mode(model),
            torch.set_grad_enabled(differentiable),
            EvaluationCounter() as counter,
        ):
            for segment in itertools.pairwise(knots):
                width = abs(segment[1] - segment[0])
                bounds = (low, high)
                if len(knots) > 2:
                    ends = [float(time_at(angle)) for angle in sorted(segment)]
                    bounds = _inside(ends[0], ends[1], dtype)
                try:
                    path = torchdiffeq.odeint(
                        velocity,
                        state,
                        clock.new_tensor(segment),
                        rtol=self.rtol,
                        atol=self.atol,
                        method=self.method,
                        options=self._options(clock.new_tensor(segment[1:]), length, width),
                    )
                except AssertionError as error:  # torchdiffeq's, of its step length
                    raise ValueError(
                        "model: expected a prediction along which the probability flow can be "
                        f"solved, got {error} near t = {float(time_at(at[0])):g}; where alpha = 0, "
                        "predict x0 or a velocity: the noise does not determine the data there"
                    ) from error
                state = tuple(part[-1] for part in path)
        return (state[0] * last, *state[1:]), counter.evaluations

    def _options(self, end: Tensor, length: float, width: float) -> dict[str, Any]:
        """Return torchdiffeq's options for a segment of some width, of a path of some length."""
        options = dict(self.options)
        if self.method in ADAPTIVE:
            # Near the data the state hardly changes, and torchdiffeq's initial step is far too
            # long. Without step_t it steps past the end, to angles without a time.
            options.setdefault("first_step", min(0.02 * length, width))
            options.setdefault("dtype", end.dtype)  # float64 by default, on any device
            options.setdefault("step_t", end)
        elif not {"step_size", "grid_constructor"} & options.keys():
            options["step_size"] = width / math.ceil(width / (0.01 * length))
        return options

    def _knots(self, model: ScoreModel, clock: Tensor) -> list[float]:
        """Return the angles of the path's ends and of the jumps of noise labels between them."""
        start, end = clock.tolist()
        if {"step_t", "grid_constructor"} & self.options.keys():
            return [start, end]
        jumps = torch.atan(label_jumps(model)).tolist()
        inner = [angle for angle in jumps if min(start, end) < angle < max(start, end)]
        return [start, *sorted(inner, reverse=start > end), end]


def _inside(first: float, last: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return two times moved towards each other, so that rounding leaves neither outside.

    At the ends of a segment a noise label jumps, to a level that is wrong within it.
    """
    margin = max(4 * torch.finfo(dtype).eps, _ROUNDING)
    first, last = first * (1 + margin), last * (1 - margin)
    return (first, last) if first < last else (0.5 * (first + last),) * 2


def label_jumps(model: ScoreModel) -> Tensor:
    """Return the ratios sigma / alpha at which a model's noise labels jump, if these are few.

    Solvers assume that the velocity is smooth. Ten levels cost "dopri5" 202 evaluations when it
    ends a step at each jump, and 943 for a larger error when it does not. With a thousand levels
    the jumps are small, and 7000 evaluations too many.
    """
    labels = (getattr(part, "label", None) for part in model.modules())
    found = [jumps for jumps in (getattr(label, "jumps", None) for label in labels)
             if isinstance(jumps, Tensor) and len(jumps) < _MOST_JUMPS]  # fmt: skip
    return torch.unique(torch.cat(found)) if found else torch.zeros(0)


def radii(sde: ForwardSDE, *times: float) -> list[float]:
    """Return r = sqrt(alpha^2 + sigma^2) at the given times."""
    here = home(sde)
    alpha, sigma = sde.marginal(torch.tensor(times, dtype=schedule_dtype(here), device=here))
    radii: list[float] = torch.hypot(alpha, sigma).tolist()
    return radii
