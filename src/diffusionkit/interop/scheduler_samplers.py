"""The samplers of diffusers' DDPM, DDIM and flow-matching schedulers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_number
from .._coefficients import Coefficient, add_noise, linear
from .._grid_times import kernel
from .._loops import Progress
from .._model_checks import check_model
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..models import Clip, DenoisedModel, DynamicThreshold
from ..random import Generators, step_noise
from ..sampling import DDIM, Ancestral, PCSampler, TabulatedPredictor
from ..sde import FlowMatchingSDE
from ..values import Prediction
from .flow_match import FLOW_MATCH, flow_match_sampler, is_flow_match
from .schedulers import Scheduler, chain_from_scheduler, scheduler_settings, timesteps
from .unet_adapter import on_process

_VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "forward",
    "fixed_large_log": "forward",
    "learned_range": "model",
}
_SMALL = ("fixed_small", "fixed_small_log")
_ELSEWHERE = {
    "DEISMultistepScheduler": "DEIS",
    "DPMSolverMultistepScheduler": "DPMSolver2M",
    "DPMSolverSinglestepScheduler": "DPMSolver2S",
    "EulerAncestralDiscreteScheduler": "Ancestral",
    "EulerDiscreteScheduler": "DDIM",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "SASolverScheduler": "SASolver",
    "UniPCMultistepScheduler": "UniPC",
}


def sampler_from_scheduler(
    model: ScoreModel,
    scheduler: Scheduler | str | os.PathLike[str],
    steps: int | None = None,
    *,
    eta: float = 0.0,
    mu: float | None = None,
    progress: Progress = False,
) -> PCSampler:
    r"""Return the sampler that takes the steps of a DDPM, DDIM or flow-matching scheduler.

    From the same noise, and so from a generator with the same seed, it returns the images of the
    pipeline before their conversion to [0, 1]. The settings become

    * ``variance_type``: the ``variance`` of `Ancestral`,
    * ``clip_sample``, ``clip_sample_range``: a `DenoisedModel` with `Clip`,
    * ``thresholding``, its ratio and maximum: a `DenoisedModel` with `DynamicThreshold`,
    * ``timestep_spacing``, ``steps_offset``: the grid,
    * ``set_alpha_to_one``: the last time of the grid, and ``denoise``.

    A ``FlowMatchEulerDiscreteScheduler`` becomes `Euler` on a `FlowMatchingSDE`, with its
    ``shift``, ``use_dynamic_shifting``, ``time_shift_type`` and ``shift_terminal`` in the grid. The
    grid that pipelines of Flux pass as ``sigmas`` is
    ``ShiftedGrid(math.exp(mu), UniformGrid(t_end=0.0))``.

    DDIMScheduler clips the predicted data only, not the noise that belongs to them (its
    ``use_clipped_model_output=False``); so does this sampler.

    Args:
        model: the score model, on any process.
        scheduler: the scheduler, its configuration, or a file or folder with it.
        steps: the number of steps, ``num_inference_steps``; all of the chain for None.
        eta: the fraction of the ancestral sampler's noise, of DDIMScheduler.
        mu: the logarithm of the shift, of a flow-matching scheduler with ``use_dynamic_shifting``;
            the shift itself where its ``time_shift_type`` is "linear".
        progress: as in `PCSampler`.

    Raises:
        ValueError: if the scheduler is another one (the error names our counterpart), or steps in
            a way that no grid of noise levels describes: DDIMScheduler where its steps do not end
            at its next timestep, or a last step that adds noise to the result.
        TypeError: if an argument has the wrong type.

    >>> from diffusionkit import DDPMChain, EpsModel
    >>> from diffusionkit.interop import (
    ...     sampler_from_scheduler, scheduler_config
    ... )
    >>> model = EpsModel(lambda x, noise_label: x, DDPMChain.linear(1000))
    >>> config = scheduler_config(model) | {"_class_name": "DDPMScheduler"}
    >>> sampler_from_scheduler(model, config, 50).predictor
    Ancestral(variance='posterior')
    """
    check_model(model)
    plain = DDIM(eta)  # raises if eta is invalid
    settings = scheduler_settings(scheduler)
    if is_flow_match(settings):
        if eta > 0:
            raise ValueError(f"eta: expected 0 for a {FLOW_MATCH}, got {eta}; use DDIM(eta)")
        moved = on_process(model, FlowMatchingSDE())
        return flow_match_sampler(moved, settings, steps, mu, progress)
    if mu is not None:
        raise ValueError(f"mu: expected None for a scheduler other than {FLOW_MATCH}, got {mu!r}")
    chain = chain_from_scheduler(scheduler)
    settings |= {"num_train_timesteps": chain.steps}
    steps = chain.steps if steps is None else steps
    chosen = timesteps(settings, steps)
    model = on_process(model, chain)
    name = settings.get("_class_name", "DDPMScheduler")
    if name == "DDPMScheduler":
        if eta > 0:
            raise ValueError(f"eta: expected 0 for a DDPMScheduler, got {eta}; use DDIMScheduler")
        return _ancestral(model, settings, chain.time(chosen), chosen, progress)
    if name == "DDIMScheduler":
        return _implicit(model, settings, chain.time(chosen), chosen, plain, progress)
    ours = f"; its counterpart is {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
    raise ValueError(
        f"scheduler: expected a DDPMScheduler, DDIMScheduler or {FLOW_MATCH}, got {name:.60}{ours}"
    )


def _ancestral(
    model: ScoreModel,
    settings: Mapping[str, Any],
    times: Tensor,
    chosen: list[int],
    progress: Progress,
) -> PCSampler:
    variance = settings.get("variance_type") or "fixed_small"
    check_choice("variance_type", variance, tuple(_VARIANCES))
    if chosen[-1] > 0 and variance not in _SMALL:
        raise ValueError(
            f"variance_type: expected 'fixed_small' where the last timestep is {chosen[-1]}, not "
            f"0, since DDPMScheduler adds noise to the result otherwise, got {variance!r}; use "
            "timestep_spacing='leading' without an offset"
        )
    change = _change(settings)
    return PCSampler(
        model if change is None else DenoisedModel(model, change),
        Ancestral(variance=_VARIANCES[variance]),
        grid=times,
        progress=progress,
    )


def _implicit(
    model: ScoreModel,
    settings: Mapping[str, Any],
    times: Tensor,
    chosen: list[int],
    plain: DDIM,
    progress: Progress,
) -> PCSampler:
    stride = settings["num_train_timesteps"] // len(chosen)
    ends = [step - stride for step in chosen]
    if ends[:-1] != chosen[1:] or ends[-1] >= 0:
        raise ValueError(
            "timestep_spacing: expected timesteps that are "
            f"{stride} = {settings['num_train_timesteps']} // {len(chosen)} apart, which "
            "DDIMScheduler assumes, got others; use timestep_spacing='leading', or a number of "
            "steps that divides the chain's with 'trailing'"
        )
    change = _change(settings)
    kept = not settings.get("set_alpha_to_one", True)  # the noise of the chain's first step
    if kept and chosen[-1] == 0 and change is not None:
        raise ValueError(
            "set_alpha_to_one: expected True, or no clipping and thresholding, got False with them"
        )
    if kept and chosen[-1] > 0:
        times = torch.cat([times, times.new_tensor([1 / settings["num_train_timesteps"]])])
    predictor: Predictor = plain
    if change is not None:
        model, predictor = _ClippedData(model, change), ClippedDDIM(plain.eta)
    return PCSampler(model, predictor, grid=times, denoise=not kept, progress=progress)


def _change(settings: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Return what a scheduler does to predicted data, or None."""
    if settings.get("thresholding", False):
        most = settings.get("sample_max_value", 1.0)
        check_number(most, "sample_max_value")
        if most <= 1.0:
            return Clip(-1.0, 1.0)
        return DynamicThreshold(settings.get("dynamic_thresholding_ratio", 0.995), largest=most)
    if settings.get("clip_sample", True):
        most = settings.get("clip_sample_range", 1.0)
        check_number(most, "clip_sample_range")
        return Clip(-most, most)
    return None


class _ClippedData(ScoreModel):
    """A model whose predicted data are changed, and whose predicted noise is not.

    Its predictions do not add up to the state: they are for `ClippedDDIM`, and for nothing else.
    """

    def __init__(self, model: ScoreModel, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.sde, self.fn = model, model.sde, fn

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        found = self.model.predict(x, t, **cond)
        return Prediction(x, self.fn(found.x0), found.eps, *kernel(self.sde, x, t))


@dataclass(frozen=True, slots=True)
class _Coefficients:
    """The coefficients of x_s = data * x0 + noise * eps + std * z."""

    data: Coefficient
    noise: Coefficient
    std: Coefficient | None


@dataclass(frozen=True)
class ClippedDDIM(TabulatedPredictor[_Coefficients]):
    r"""DDIM's step from predicted data and predicted noise that need not add up to the state.

    .. math::
        x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \eta^2 \tau^2}\,\hat\epsilon + \eta \tau z

    `DDIM` computes the noise from the data. DDIMScheduler clips the data and keeps the noise.
    """

    eta: float = 0.0

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> _Coefficients:
        (alpha_s, sigma_s), (_, sigma_t) = sde.marginal(s), sde.marginal(t)
        std = self.eta * sde.transition(s, t)[1] * sigma_s / sigma_t
        noise = torch.sqrt((sigma_s.square() - std.square()).clamp_min(0.0))
        return _Coefficients(alpha_s, noise, std if self.eta > 0 else None)

    @override
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any = None,
        /,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        c = self.at(model.sde, x, t, s)
        prediction = model.predict(x, t, **cond)
        mean = linear(c.data, prediction.x0, c.noise, prediction.eps)
        if c.std is None:
            return Step(mean, mean, prediction=prediction)
        noise = step_noise(mean, model.sde, t, s, generator=generator)
        return Step(add_noise(mean, c.std, noise), mean, prediction=prediction)
