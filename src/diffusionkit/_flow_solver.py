"""The probability flow ODE of any linear SDE, solved in the angle atan(sigma / alpha)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._checks import check_positive
from ._grid_times import grid_times, schedule
from ._loops import bare_networks, evaluation_mode
from ._nfe import EvaluationCounter
from ._schedules import home, schedule_dtype
from .interfaces import ForwardSDE, ScoreModel

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams")
# The distance in log(sigma / alpha) kept from a jump: times are rounded, and must not cross it.
_ASIDE = 1e-9

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


def jumps(model: ScoreModel, low: float, high: float) -> list[float]:
    """Return the increasing angles, between two others, at which noise labels of a model jump."""
    found: list[float] = []
    for part in model.modules():
        label = getattr(part, "label", None)
        if hasattr(label, "jumps"):  # at ratios sigma / alpha, which mean the same to every process
            found += torch.atan(torch.exp(-0.5 * label.jumps(part.sde))).tolist()
    inside = [low]
    for angle in sorted(found):
        if _log_tan(angle) > _log_tan(inside[-1]) + 4 * _ASIDE and angle < high:
            inside.append(angle)
    return inside[1:]


@dataclass(frozen=True)
class Solver:
    r"""A torchdiffeq solver for the probability flow of any linear SDE.

    With r^2 = alpha^2 + sigma^2, z = x / r, tan(theta) = sigma / alpha and the predicted
    velocity v = alpha eps - sigma x0,

    .. math::
        \frac{dz}{d\theta} = \frac{v(x, t)}{r}, \quad
        \nabla_z \cdot \frac{dz}{d\theta} = \nabla_x \cdot v,

    the same equation for every process, which determines only the map from theta to t.

    Solvers assume that the velocity is smooth. Where a noise label jumps from one numbered level
    to the next (`IndexLabel.jumps`), one run ends and another begins.

    Args:
        method: the name of the solver.
        rtol: the relative tolerance of an adaptive solver.
        atol: the absolute tolerance of an adaptive solver.
        options: further options of torchdiffeq.

    Raises:
        ValueError: if the method is unknown or a tolerance is not positive.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in (*ADAPTIVE, *FIXED):
            raise ValueError(f"method: expected one of {[*ADAPTIVE, *FIXED]}, got {self.method!r}")
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")

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
        sde, low, high = model.sde, min(start, end), max(start, end)
        # torchdiffeq keeps time in the dtype of the state, and float32 does not resolve angles
        # near pi / 2.
        state_dtype, dtype = schedule_dtype(x.device), dtype or x.dtype
        clock = angles(sde, start, end).to(x.device, state_dtype)
        length = abs(float(clock[1] - clock[0]))
        first, last = radii(sde, start, end)

        def solve(state: tuple[Tensor, ...], ends: Tensor) -> tuple[Tensor, ...]:
            bounds = [_log_tan(angle) for angle in sorted(ends.tolist())]

            def velocity(theta: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                here = home(sde)
                log = min(max(_log_tan(theta.item()), bounds[0] + _ASIDE), bounds[1] - _ASIDE)
                value = torch.tensor([-2 * log], dtype=schedule_dtype(here), device=here)
                time = sde.time_at_log_snr(value).clamp(low, high)
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

            return tuple(
                values[-1]
                for values in torchdiffeq.odeint(
                    velocity,
                    state,
                    ends,
                    rtol=self.rtol,
                    atol=self.atol,
                    method=self.method,
                    options=self._options(ends, length),
                )
            )

        with evaluation_mode(model), bare_networks(model), EvaluationCounter() as counter:
            state = (x.to(state_dtype) / first, *totals)
            inside = jumps(model, *sorted(clock.tolist()))
            between = clock.new_tensor(inside if start < end else inside[::-1])
            for ends in torch.cat([clock[:1], between, clock[1:]]).unfold(0, 2, 1):
                state = solve(state, ends)
        return (state[0] * last, *state[1:]), counter.evaluations

    def _options(self, ends: Tensor, length: float) -> dict[str, Any]:
        """Return the options of a run between two angles, part of a flow of a given length."""
        options, own = dict(self.options), abs(float(ends[1] - ends[0]))
        if self.method in ADAPTIVE:
            # Near the data the state hardly changes, and torchdiffeq's initial step is far too
            # long. Without step_t it steps past the end, to angles without a time.
            options.setdefault("first_step", 0.02 * length)
            options.setdefault("step_t", ends[1:])
        elif not {"step_size", "grid_constructor"} & options.keys():
            options["step_size"] = own / math.ceil(own / (0.01 * length))
        return options


def _log_tan(angle: float) -> float:
    """Return log(sigma / alpha) at an angle."""
    return math.log(math.tan(min(angle, 0.5 * math.pi)))


def radii(sde: ForwardSDE, *times: float) -> list[float]:
    """Return r = sqrt(alpha^2 + sigma^2) at the given times."""
    here = home(sde)
    alpha, sigma = sde.marginal(torch.tensor(times, dtype=schedule_dtype(here), device=here))
    radii: list[float] = torch.hypot(alpha, sigma).tolist()
    return radii
