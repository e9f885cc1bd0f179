"""Score models as the U-Net of pipelines and schedulers of diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_choice, check_count, check_flag, check_positive, check_state
from .._coefficients import expand
from .._loops import evaluation_mode
from .._model_checks import check_model
from .._precision import network_dtype
from .._schedules import exact
from ..interfaces import ForwardSDE, ScoreModel
from ..models import ScheduleTransformedModel
from ..sde import EDMSDE, DDPMChain, FlowMatchingSDE
from ..values import Prediction
from .denoisers import each
from .flow_match import is_flow_match, train_timesteps
from .schedulers import (
    PREDICTIONS,
    Scheduler,
    chain_from_scheduler,
    scheduler_config,
    scheduler_settings,
)


class UNetOutput(NamedTuple):
    """The output of a `UNetAdapter`.

    Args:
        sample: the prediction (B, C, ...).
    """

    sample: Tensor


class UNetConfig(dict[str, Any]):
    """A configuration, whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """Return an entry."""
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class UNetAdapter(nn.Module):
    """A score model with the interface of diffusers' `UNet2DModel`; made by `to_diffusers`.

    Attributes:
        model: the score model, on the process of the scheduler.
        config: ``sample_size``, ``in_channels``, ``out_channels`` and ``prediction_type``.
    """

    def __init__(
        self,
        model: ScoreModel,
        settings: Mapping[str, Any],
        sample_size: int | tuple[int, ...],
        channels: int,
    ) -> None:
        """Move the model to the scheduler's process."""
        super().__init__()
        kind = settings.get("prediction_type", "epsilon")
        self.sigma_data: float | None = None
        self._timesteps: int | None = None
        if is_flow_match(settings):
            if settings.get("invert_sigmas", False):
                raise ValueError("invert_sigmas: expected False, got True")
            self._timesteps = train_timesteps(settings)
            self.model, kind = on_process(model, FlowMatchingSDE()), "flow"
        elif "sigma_data" in settings:
            check_positive(settings["sigma_data"], "sigma_data")
            check_choice("prediction_type", kind, ("epsilon", "v_prediction"))
            self.sigma_data = settings["sigma_data"]
            sde = EDMSDE(settings.get("sigma_min", 0.002), settings.get("sigma_max", 80.0))
            self.model = on_process(model, sde)
        else:
            check_choice("prediction_type", kind, tuple(PREDICTIONS))
            self.chain = chain_from_scheduler(settings)
            self.model = on_process(model, self.chain)
        learned = settings.get("variance_type") == "learned_range"
        self.config = UNetConfig(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=2 * channels if learned else channels,
            prediction_type=kind,
        )
        self._learned = learned

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        return network_dtype(self.model) or torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        first = next(iter((*self.model.parameters(), *self.model.buffers())), None)
        return torch.device("cpu") if first is None else first.device

    @override
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **cond: Any,
    ) -> UNetOutput | tuple[Tensor]:
        """Return the prediction of the scheduler's prediction type, in the dtype of the sample.

        Args:
            sample: the state (B, C, ...), as the scheduler's `scale_model_input` returns it.
            timestep: the timestep, (B,) or one for all.
            class_labels: the class labels (B,), None for models without.
            return_dict: whether to return an object with the prediction in ``.sample``, or a tuple.
            cond: other conditions, passed to the model.

        Raises:
            ValueError: if shapes differ, a timestep is outside the chain, or the scheduler expects
                a learned variance and the model predicts none.
            TypeError: if sample is not a floating-point tensor.
        """
        check_state(sample, "sample")
        check_flag(return_dict, "return_dict")
        t = exact(each(timestep, sample, "timestep"))
        if class_labels is not None:
            cond = {**cond, "class_labels": class_labels}
        with evaluation_mode(self.model):
            if self._timesteps is not None:
                prediction = self.model.predict(sample, t / self._timesteps, **cond)
                out = prediction.eps - prediction.x0
            elif self.sigma_data is None:
                out = self._on_chain(sample, t, cond)
            else:
                out = self._preconditioned(sample, t, self.sigma_data, cond)
        out = out.to(sample.dtype)
        return UNetOutput(out) if return_dict else (out,)

    def _on_chain(self, sample: Tensor, step: Tensor, cond: dict[str, Any]) -> Tensor:
        """Return the prediction in a state of the chain, at steps (B,) that may be fractions."""
        prediction = self.model.predict(sample, (step + 1) / self.chain.steps, **cond)
        out = _of_type(prediction, self.config.prediction_type)
        if not self._learned:
            return out
        fraction = prediction.log_var_fraction
        if fraction is None:
            raise ValueError(
                "model: expected one that predicts a variance, for a scheduler with "
                "variance_type='learned_range', got none"
            )
        return torch.cat([out, (2 * fraction - 1).to(out.dtype)], 1)

    def _preconditioned(
        self, sample: Tensor, label: Tensor, std: float, cond: dict[str, Any]
    ) -> Tensor:
        r"""Return the output F of EDM's network for its input c_in x and label log(sigma) / 4."""
        sigma = torch.exp(4 * label)
        scale = torch.sqrt(sigma.square() + std**2)
        x = sample * expand(scale, sample)
        data = self.model.predict(x.to(sample.dtype), sigma, **cond).x0
        sign = -1.0 if self.config.prediction_type == "v_prediction" else 1.0
        kept, out = std**2 / scale.square(), sign * sigma * std / scale
        return (data - expand(kept, data) * x) / expand(out, data)


def _of_type(prediction: Prediction, kind: str) -> Tensor:
    if kind == "v_prediction":
        return prediction.v
    return prediction.x0 if kind == "sample" else prediction.eps


def on_process(model: ScoreModel, sde: ForwardSDE) -> ScoreModel:
    """Return a model of another process, itself if the two have the same noise levels.

    Raises:
        ValueError: if the process has noise levels that the model's lacks.
    """
    if _same(model.sde, sde):
        return model
    try:
        return ScheduleTransformedModel(model, sde)
    except ValueError as error:
        raise ValueError(
            f"scheduler: expected noise levels of the model's process ({error}); use a scheduler "
            "made of interop.scheduler_config(model)"
        ) from error


@torch.no_grad()
def _same(one: ForwardSDE, other: ForwardSDE) -> bool:
    """Return whether two processes agree at the steps of the second, if that is a chain."""
    if one == other:
        return True
    if not isinstance(other, DDPMChain) or one.T != other.T or hasattr(one, "parameters"):
        return False
    times = other.time(range(other.steps))
    pairs = zip(one.marginal(times), other.marginal(times), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=0.0) for a, b in pairs)


def to_diffusers(
    model: ScoreModel,
    scheduler: Scheduler | str | os.PathLike[str] | None = None,
    *,
    sample_size: int | tuple[int, ...],
    channels: int = 3,
) -> UNetAdapter:
    r"""Return a score model as the U-Net of a pipeline of diffusers, for one scheduler.

    The state of a scheduler with betas is that of its `DDPMChain` (schedulers that step in sigma
    scale it before they call the network). At timestep i the model is evaluated on its own process
    at the time with the same noise-to-signal ratio,

    .. math::
        \frac{\sigma(t)}{\alpha(t)} = \sqrt{\frac{1 - \bar\alpha_i}{\bar\alpha_i}},

    and returns the scheduler's prediction type. For `EDMEulerScheduler` and similar schedulers,
    which have a ``sigma_data``, it returns the output of a network with EDM's preconditioning. For
    a ``FlowMatchEulerDiscreteScheduler``, with timesteps 1000 t, it is the velocity eps - x0.

    Between two timesteps, where `EulerDiscreteScheduler` and others interpolate, the noise level is
    that of the chain, which may differ slightly from theirs.

    Args:
        model: the score model, of any process.
        scheduler: the scheduler, its configuration, or a file or folder with it; by default
            `scheduler_config(model)`.
        sample_size: the height and width of images, which pipelines read.
        channels: the channels of images, which pipelines read.

    Raises:
        ValueError: if the scheduler has noise levels that the model's process lacks (then make it
            of `scheduler_config(model)`), has no betas, or another prediction type.
        TypeError: if an argument has the wrong type.

    Source: Karras et al., 2022, arXiv 2206.00364 (appendix C).

    >>> import torch
    >>> from diffusionkit import DDPMChain, EpsModel
    >>> from diffusionkit.interop import to_diffusers
    >>> model = EpsModel(lambda x, noise_label: x, DDPMChain.linear(1000))
    >>> unet = to_diffusers(model, sample_size=8)
    >>> x = torch.ones(2, 3, 8, 8)
    >>> unet(x, 999).sample.shape, unet.config.in_channels
    (torch.Size([2, 3, 8, 8]), 3)
    """
    check_model(model)
    check_count(channels, "channels")
    sizes = (sample_size,) if isinstance(sample_size, int) else sample_size
    if not isinstance(sizes, (tuple, list)) or not sizes:
        raise TypeError(f"sample_size: expected an integer or several, got {sample_size!r:.60}")
    for size in sizes:
        check_count(size, "sample_size")
    chosen = scheduler_config(model) if scheduler is None else scheduler
    settings = scheduler_settings(chosen)
    if "sigma_data" not in settings and not is_flow_match(settings):
        # An unknown schedule is read off the scheduler itself.
        settings["trained_betas"] = chain_from_scheduler(chosen).betas.tolist()
        settings["rescale_betas_zero_snr"] = False
    return UNetAdapter(model, settings, sample_size, channels)
