"""The initial state of a sampler, and checks of the steps that its parts return."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import (
    check_finite,
    check_known,
    check_number,
    check_samples,
    check_shape,
    check_state,
)
from .._precision import (
    WIDER,
    at_least_float32,
    check_float_dtype,
    narrowed,
    network_dtype,
    state_dtype,
)
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, ScoreModel, Step
from ..random import Generators, ObservedPath, check_generator


def initial_state(
    model: ScoreModel,
    start: Sequence[int] | Tensor,
    times: Tensor,
    generator: Generators,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, torch.dtype]:
    """Return the initial state, the one given or a draw from the prior, and the result's dtype.

    By default it is drawn on the device of the model's parameters, in float64 if they are, else in
    float32. A state in half precision is widened. The prior is the distribution at T; times
    (N + 1,) that begin at another noise level need a state.
    """
    check_float_dtype(dtype)
    if isinstance(start, Tensor):
        check_state(start)
        check_known(start, "x")
        check_finite(start)
        if (device is not None and torch.device(device) != start.device) or (
            dtype is not None and dtype != start.dtype
        ):
            raise ValueError(
                f"x: expected a state on {device or start.device}, {dtype or start.dtype}, "
                f"got {start.device}, {start.dtype}"
            )
        check_generator(generator, start.shape[0])
        return at_least_float32(start), start.dtype
    shape = check_shape(start)
    check_first_noise(model.sde, times)
    check_generator(generator, shape[0])
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    tensor = parameter if parameter is not None else next(model.buffers(), None)
    if device is None and tensor is not None:
        device = tensor.device
    if dtype is None:
        own = torch.get_default_dtype() if parameter is None else network_dtype(model)
        dtype = state_dtype(own)
    wide = state_dtype(dtype)
    x = model.sde.prior_sample(shape, generator=generator, device=device, dtype=wide)
    return x, dtype


def result(x: Tensor, dtype: torch.dtype, name: str = "samples") -> Tensor:
    """Return the result of a run in a dtype, or raise unless it is finite there."""
    check_samples(x, name)
    return narrowed(x, dtype, name, WIDER)


def check_first_noise(sde: ForwardSDE, times: Tensor) -> None:
    """Raise unless the noise at the first of times (N + 1,) is that of the prior."""
    here = home(sde)
    alpha, sigma = (c.item() for c in sde.marginal(times[:1].to(schedule_dtype(here)).to(here)))
    if math.isclose(sigma, sde.prior_std, rel_tol=0.02):
        return
    first = float(times[0])
    if math.isclose(first, sde.T):
        where = f"at the end of the process, T = {sde.T:g}, where alpha = {alpha:.4g} is left"
        advice = "use a longer chain, zero_terminal_snr(), or pass the state there"
    else:
        where = f"at its first time {first:g}"
        advice = f"begin at T = {sde.T:g}, or pass the state there"
    raise ValueError(
        f"grid: expected to begin with the prior's noise, sigma = {sde.prior_std:.4g}, "
        f"got sigma = {sigma:.4g} {where}; {advice} instead of a shape"
    )


def noised_data(
    sde: ForwardSDE, x0: Tensor, t: float, times: Tensor, generator: Generators
) -> tuple[Tensor, int]:
    """Return data perturbed to the first of times (N + 1,) that is at most t, and its index."""
    check_number(t, "t")
    check_state(x0, "x0")
    check_finite(x0, "x0")
    if not float(times[-2]) <= t <= sde.T:  # a NaN fails too
        raise ValueError(
            f"t: expected a time of at least {float(times[-2]):g}, where the grid has a step left, "
            f"and at most T = {sde.T:g}, got {t}"
        )
    first = int((times > t).sum())
    start = times[first].to(x0.device, schedule_dtype(x0.device)).expand(len(x0))
    return sde.perturb(x0, start, generator=generator).x, first


def check_step(step: Step, x: Tensor, part: object) -> None:
    """Raise unless a part returned a Step with a state like x."""
    if not isinstance(step, Step):
        raise TypeError(f"{type(part).__name__}.step: expected a Step, got {type(step).__name__}")
    got = step.x
    if got.shape != x.shape or got.dtype != x.dtype or got.device != x.device:
        raise ValueError(
            f"{type(part).__name__}.step: expected a state of shape {tuple(x.shape)}, {x.dtype}, "
            f"{x.device}, got {tuple(got.shape)}, {got.dtype}, {got.device}"
        )


def check_path(path: ObservedPath, step: Step, predictor: object) -> None:
    """Raise if a predictor added noise that is not the path's."""
    if path.used or step.x is step.mean or torch.equal(step.x, step.mean):
        return
    name = type(predictor).__name__
    raise ValueError(
        f"{name}: expected noise from diffusionkit.random.step_noise, which follows the path given "
        "as generator, got other noise; draw it with step_noise, or pass generators"
    )
