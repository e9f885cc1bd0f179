"""Schedulers of diffusers as chains, and chains as configurations of schedulers.

Only configurations are read, so that diffusers itself is not needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .._checks import check_count, check_mapping, check_number, check_part, check_positive
from .._files import CheckpointError
from ..interfaces import ForwardSDE, ScoreModel
from ..models import EpsModel, VelocityModel, VModel, X0Model
from ..models.network import NetworkModel
from ..sampling import LogSNRGrid, UniformGrid
from ..sampling.grids import resolve_grid
from ..sde import DDPMChain
from .flow_match import flow_match_config, is_flow_match


class HasConfig(Protocol):
    """A scheduler of diffusers."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its configuration."""


Scheduler: TypeAlias = HasConfig | Mapping[str, Any]
"""A scheduler or its configuration."""

PREDICTIONS: dict[str, type[NetworkModel]] = {
    "epsilon": EpsModel,
    "sample": X0Model,
    "v_prediction": VModel,
}
"""The score models of the prediction types."""

# The defaults of DDPMScheduler, for keys that older files lack.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_MOST_STEPS = 100_000


def scheduler_settings(scheduler: Scheduler | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the configuration of a scheduler, with the name of its class in ``_class_name``.

    Args:
        scheduler: a scheduler, its configuration, the file ``scheduler_config.json``, or a folder
            with that file, itself or in ``scheduler/``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or of another kind.
        TypeError: if it is none of these.
    """
    if isinstance(scheduler, (str, os.PathLike)):
        return read_json(_config_file(Path(os.fsdecode(scheduler))))
    named = {}
    if not isinstance(scheduler, Mapping):
        named = {"_class_name": type(scheduler).__name__}
        config = getattr(scheduler, "config", None)
        if not isinstance(config, Mapping):
            raise TypeError(
                "scheduler: expected a scheduler of diffusers, its configuration, or a file or "
                f"folder with it, got {type(scheduler).__name__}"
            )
        scheduler = config
    check_mapping(scheduler, "scheduler")
    return {**scheduler, **named}


def _config_file(path: Path) -> Path:
    if path.is_dir():
        for place in (path / "scheduler", path):
            if (file := place / "scheduler_config.json").is_file():
                return file
        raise FileNotFoundError(f"{path}: expected scheduler/scheduler_config.json in it")
    if not path.exists():
        raise FileNotFoundError(
            f"scheduler: expected a scheduler of diffusers, its configuration, or a file or folder "
            f"with it, got {str(path)!r}, which is not here"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON file, got {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def chain_from_scheduler(scheduler: Scheduler | str | os.PathLike[str]) -> DDPMChain:
    r"""Return the chain of a scheduler of diffusers, step i of which is timestep i.

    It is computed in float64 from ``num_train_timesteps``, ``beta_schedule`` ("linear",
    "scaled_linear", "squaredcos_cap_v2" or "sigmoid"), ``beta_start``, ``beta_end``,
    ``trained_betas`` and ``rescale_betas_zero_snr``; for another schedule from the betas of the
    scheduler. diffusers computes in float32, so its noise levels differ by rounding.

    Args:
        scheduler: a scheduler, its configuration, or a file or folder with it.

    Raises:
        ValueError: if it has no betas, as those of flow matching, or betas outside (0, 1).
        TypeError: if it is none of these, or a setting has the wrong type.
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or of another kind.

    >>> from diffusionkit.interop import chain_from_scheduler
    >>> chain_from_scheduler(
    ...     {"beta_schedule": "scaled_linear", "num_train_timesteps": 100}
    ... )
    DDPMChain(100 steps, betas 0.0001 ... 0.02)
    """
    settings = scheduler_settings(scheduler)
    if settings.get("use_flow_sigmas") or not any(
        key in settings for key in ("beta_schedule", "beta_start", "beta_end", "trained_betas")
    ):
        flow = is_flow_match(settings)
        raise ValueError(
            "scheduler: expected one with betas, a DDPM chain, got "
            f"{settings.get('_class_name', 'a configuration without them')}"
            + ("; its process is FlowMatchingSDE(), and from_diffusers reads it" if flow else "")
        )
    settings = _DEFAULTS | settings
    chain = _chain(settings, getattr(scheduler, "betas", None))
    if settings["rescale_betas_zero_snr"] and float(chain.betas[-1]) < 1:
        chain = chain.zero_terminal_snr()
    return chain


def _chain(settings: Mapping[str, Any], betas: object) -> DDPMChain:
    if settings["trained_betas"] is not None:
        return DDPMChain(settings["trained_betas"])
    steps, schedule = settings["num_train_timesteps"], settings["beta_schedule"]
    check_count(steps, "num_train_timesteps", least=2, most=_MOST_STEPS)
    if schedule == "squaredcos_cap_v2":
        return DDPMChain.cosine(steps)
    start, end = settings["beta_start"], settings["beta_end"]
    check_positive(start, "beta_start")
    check_positive(end, "beta_end")
    if isinstance(schedule, str) and schedule in _SCHEDULES:
        return DDPMChain(_SCHEDULES[schedule](start, end, steps))
    if isinstance(betas, Tensor):
        return DDPMChain(betas)
    raise ValueError(
        f"beta_schedule: expected one of {', '.join(_SCHEDULES)}, squaredcos_cap_v2, or a "
        f"scheduler with betas, got {schedule!r}"
    )


def _linear(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _scaled_linear(start: float, end: float, steps: int) -> Tensor:
    return _linear(start**0.5, end**0.5, steps).square()


def _sigmoid(start: float, end: float, steps: int) -> Tensor:
    return start + (end - start) * torch.sigmoid(_linear(-6.0, 6.0, steps))


_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "sigmoid": _sigmoid,
}


def scheduler_config(
    model: ScoreModel | ForwardSDE, steps: int = 1000, **options: Any
) -> dict[str, Any]:
    r"""Return the configuration of a scheduler that has the noise levels of a model.

    ``DDPMScheduler.from_config(scheduler_config(model))`` and the same of other schedulers are on
    the model's own chain. A process in continuous time is discretized:

    .. math::
        \bar\alpha_i = \mathrm{sigmoid}(\mathrm{log\,snr}(t_i)),

    with times uniform in [0, T], or equally spaced in log-SNR for processes with alpha = 1. The
    prediction type is that of `to_diffusers`: "epsilon" for an `EpsModel`, "sample" for an
    `X0Model`, "v_prediction" for every other model. Nothing is clipped. For a `VelocityModel` it is
    the configuration of a ``FlowMatchEulerDiscreteScheduler``.

    Args:
        model: the score model, or a process, for a model of the noise.
        steps: the number of timesteps for a process in continuous time.
        options: settings that replace these, and others, such as ``timestep_spacing="trailing"``.

    Raises:
        ValueError: if steps < 2, or the model learns a variance that schedulers do not support,
            "learned", and ``variance_type`` is not given.
        TypeError: if model is neither, or steps is not an integer.

    >>> from diffusionkit import DDPMChain
    >>> from diffusionkit.interop import (
    ...     chain_from_scheduler, scheduler_config
    ... )
    >>> config = scheduler_config(DDPMChain.cosine(50))
    >>> config["prediction_type"], chain_from_scheduler(config)
    ('epsilon', DDPMChain(50 steps, betas 0.00175 ... 0.999))
    """
    if not isinstance(model, ForwardSDE):
        check_part(model, ScoreModel, "model")
    check_count(steps, "steps", least=2, most=_MOST_STEPS)
    sde = model if isinstance(model, ForwardSDE) else model.sde
    if type(model) is VelocityModel:
        return flow_match_config(steps) | options
    betas = getattr(sde, "betas", None)
    if betas is None:
        betas = _discretized(sde, steps).betas
    variance = getattr(model, "variance", None)
    if variance == "learned" and "variance_type" not in options:
        raise ValueError(
            "variance_type: expected a value for a model that learned the logarithm of a variance, "
            "which schedulers do not support, got none; choose 'fixed_small' or 'fixed_large'"
        )
    return {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": _prediction_type(model),
        "variance_type": variance or "fixed_small",
        "clip_sample": False,
    } | options


def _prediction_type(model: ScoreModel | ForwardSDE) -> str:
    if isinstance(model, ForwardSDE):
        return "epsilon"
    kinds = [name for name, kind in PREDICTIONS.items() if type(model) is kind]
    return kinds[0] if kinds else "v_prediction"


def _discretized(sde: ForwardSDE, steps: int) -> DDPMChain:
    last = torch.tensor([sde.T], dtype=torch.float64)
    scaled = float(sde.marginal(last)[0]) < 1
    grid = UniformGrid(t_end=0.0) if scaled else LogSNRGrid()
    times = resolve_grid(grid, sde, steps if scaled else steps - 1).flip(0)
    return DDPMChain.from_alphas_bar(torch.sigmoid(sde.log_snr(times[1:] if scaled else times)))


def timesteps(settings: Mapping[str, Any], steps: int) -> list[int]:
    """Return the decreasing timesteps of a run of `steps`, as `set_timesteps` selects them.

    Raises:
        ValueError: if there are more steps than the chain has, the spacing is unknown, or a
            timestep is outside the chain.
    """
    total = settings["num_train_timesteps"]
    check_count(total, "num_train_timesteps", least=2, most=_MOST_STEPS)
    check_count(steps, "steps", least=2, most=total)
    spacing = settings.get("timestep_spacing", "leading")
    if spacing == "linspace":
        ends = torch.linspace(0, total - 1, steps, dtype=torch.float64)
        found = ends.round().long().flip(0).tolist()
    elif spacing == "leading":
        offset = settings.get("steps_offset", 0)
        check_number(offset, "steps_offset")
        found = [k * (total // steps) + int(offset) for k in reversed(range(steps))]
    elif spacing == "trailing":
        found = [round(total - k * total / steps) - 1 for k in range(steps)]
    else:
        raise ValueError(
            f"timestep_spacing: expected one of linspace, leading, trailing, got {spacing!r}"
        )
    if not (found[0] < total and found[-1] >= 0):
        raise ValueError(
            f"steps_offset: expected timesteps 0 ... {total - 1}, got {found[-1]} to {found[0]}"
        )
    return found
