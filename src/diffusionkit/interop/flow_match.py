"""The flow-matching scheduler of diffusers: FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_choice, check_count, check_finite_number, check_positive
from .._loops import Progress
from .._schedules import shifted
from ..interfaces import ScoreModel
from ..models import TimeLabel, VelocityModel
from ..sampling import Euler, PCSampler
from ..sde import FlowMatchingSDE

FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"

# Its defaults, for keys that older files lack.
_DEFAULTS: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}
_MOST_STEPS = 100_000
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def is_flow_match(settings: Mapping[str, Any]) -> bool:
    """Return whether a configuration is that of the flow-matching scheduler."""
    name = settings.get("_class_name")
    if name is None:
        return "shift" in settings and "beta_schedule" not in settings
    return bool(name == FLOW_MATCH)


def train_timesteps(settings: Mapping[str, Any]) -> int:
    """Return the number of timesteps, the label at t = 1."""
    count: int = settings.get("num_train_timesteps", _DEFAULTS["num_train_timesteps"])
    check_count(count, "num_train_timesteps", least=2, most=_MOST_STEPS)
    return count


def flow_match_model(
    network: Callable[..., Any],
    settings: Mapping[str, Any],
    data_range: tuple[float, float] | None,
) -> VelocityModel:
    """Return a network of the flow-matching scheduler as a model; its label is 1000 t."""
    count = train_timesteps(settings)
    inverted = settings.get("invert_sigmas", False)
    return VelocityModel(
        _Inverted(network, count) if inverted else network,
        FlowMatchingSDE(),
        label=TimeLabel(float(count)),
        data_range=data_range,
    )


class _Inverted(nn.Module):
    """A network whose time runs from the noise to the data, and its velocity with it."""

    def __init__(self, network: Callable[..., Any], count: int) -> None:
        super().__init__()
        self.network, self.count = network, count

    @override
    def forward(self, x: Tensor, timestep: Tensor, /, **cond: Any) -> Tensor:
        output = self.network(x, self.count - timestep, **cond)
        output = output if isinstance(output, Tensor) else output.sample
        return -output


def flow_match_times(settings: Mapping[str, Any], steps: int, mu: float | None = None) -> Tensor:
    """Return the decreasing times (steps + 1,) of the scheduler, from 1 to 0, in float64.

    Raises:
        ValueError: if a setting is unsupported, or mu is missing where the shift depends on it.
    """
    check_count(steps, "steps", most=_MOST_STEPS)
    for name in _SPACINGS:
        if settings.get(name, False):
            raise ValueError(
                f"{name}: expected False, got {settings[name]!r}; pass PCSampler a grid of your own"
            )
    least = 1 / train_timesteps(settings)
    if settings.get("use_dynamic_shifting", False):
        kind = settings.get("time_shift_type", "exponential")
        check_choice("time_shift_type", kind, ("exponential", "linear"))
        if mu is None:
            raise ValueError(
                "mu: expected a number for a scheduler with use_dynamic_shifting, whose shift is "
                f"{'exp(mu)' if kind == 'exponential' else 'mu'}, got None"
            )
        check_finite_number(mu, "mu")
        shift = math.exp(mu) if kind == "exponential" else mu
    else:
        shift = settings.get("shift", _DEFAULTS["shift"])
        least = float(shifted(torch.tensor(least, dtype=torch.float64), _positive(shift), 1.0))
    times = torch.linspace(1.0, least, steps, dtype=torch.float64)
    times = shifted(times, _positive(shift), 1.0)
    terminal = settings.get("shift_terminal")
    if terminal:
        check_positive(terminal, "shift_terminal")
        times = 1 - (1 - times) * ((1 - terminal) / (1 - times[-1]))
    return torch.cat([times, times.new_zeros(1)])


def _positive(shift: float) -> float:
    check_positive(shift, "shift")
    return shift


def flow_match_sampler(
    model: ScoreModel,
    settings: Mapping[str, Any],
    steps: int | None,
    mu: float | None,
    progress: Progress,
) -> PCSampler:
    """Return Euler's method on the times of the scheduler, for a model of `FlowMatchingSDE`."""
    if settings.get("stochastic_sampling", False):
        raise ValueError(
            "stochastic_sampling: expected False, got True, which draws all noise anew in each "
            "step; use Ancestral or another stochastic predictor"
        )
    steps = train_timesteps(settings) if steps is None else steps
    times = flow_match_times(settings, steps, mu)
    return PCSampler(model, Euler(), grid=times, denoise=False, progress=progress)


def flow_match_config(steps: int) -> dict[str, Any]:
    """Return the configuration of the scheduler for a model of the velocity."""
    return {"_class_name": FLOW_MATCH, "num_train_timesteps": steps, "shift": 1.0}
