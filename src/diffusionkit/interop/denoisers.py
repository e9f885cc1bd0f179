"""Denoisers D(x, sigma) of EDM and k-diffusion, from score models and as score models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_callable, check_interval, check_number, check_state
from .._loops import evaluation_mode
from .._model_checks import check_model
from .._precision import at_least_float32
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, ScoreModel
from ..models import ScheduleTransformedModel, SigmaLabel, X0Model
from ..sde import EDMSDE

_LARGEST = 1e5  # of sigma, for chains that end without signal


class SigmaDenoiser(nn.Module):
    r"""A score model as a denoiser D(x, sigma) of data with noise, x = x0 + sigma eps.

    `as_denoiser` makes it. The model is in evaluation mode during a call.

    Attributes:
        model: the score model, on an `EDMSDE`.
        sigma_min: the noise level at which samplers of the model stop by default.
        sigma_max: the largest noise level.
    """

    def __init__(self, model: ScoreModel) -> None:
        """Move the model to an `EDMSDE`."""
        super().__init__()
        check_model(model)
        self.sigma_min, self.sigma_max = _levels(model.sde)
        self.model = ScheduleTransformedModel(model, EDMSDE(self.sigma_min, self.sigma_max))

    @override
    def forward(self, x: Tensor, sigma: Tensor | float, /, **cond: Any) -> Tensor:
        """Return the predicted data (B, *D), in the dtype of x.

        Args:
            x: the noisy data (B, *D).
            sigma: the noise levels, (B,) or one for all.
            cond: passed to the model.

        Raises:
            ValueError: if shapes differ, or a noise level is outside [0, sigma_max].
            TypeError: if x is not a floating-point tensor.
        """
        check_state(x)
        with evaluation_mode(self.model):
            prediction = self.model.predict(x, each(sigma, x, "sigma"), **cond)
        return prediction.x0.to(x.dtype)


def as_denoiser(model: ScoreModel) -> SigmaDenoiser:
    r"""Return a score model of any process as a denoiser D(x, sigma), for k-diffusion's samplers.

    .. math::
        D(x, \sigma) = \hat x_0(\alpha x, t), \quad \sigma(t) / \alpha(t) = \sigma

    Its ``sigma_min`` and ``sigma_max`` are the ends of k-diffusion's grids, such as
    ``get_sigmas_karras(n, denoiser.sigma_min, denoiser.sigma_max)``.

    Args:
        model: the score model.

    Raises:
        TypeError: if model is not a ScoreModel.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364; Crowson, k-diffusion, 2022.

    >>> import torch
    >>> from diffusionkit import VPSDE, GaussianMixtureModel
    >>> from diffusionkit.interop import as_denoiser
    >>> denoiser = as_denoiser(GaussianMixtureModel(VPSDE(), [[0.0]], [1.0]))
    >>> # x / (1 + sigma^2)
    >>> denoiser(torch.tensor([[10.0]]), torch.tensor([3.0]))
    tensor([[1.]])
    """
    return SigmaDenoiser(model)


def from_denoiser(
    denoiser: Callable[..., Any],
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    data_range: tuple[float, float] | None = None,
) -> X0Model:
    """Return a denoiser D(x, sigma, **cond), as those of EDM and k-diffusion, as a score model.

    The model is an `X0Model` on an `EDMSDE`, conditioned on sigma itself.

    Args:
        denoiser: maps noisy data (B, *D), noise levels (B,) and conditions to data (B, *D).
        sigma_min: the smallest noise level, by default that of the denoiser if it has a positive
            one, else 0.002.
        sigma_max: the largest noise level, by default that of the denoiser if it has a finite one,
            else 80.
        data_range: the range of the training data, see `NetworkModel`.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, or data_range is not low < high.
        TypeError: if denoiser is not callable, or a setting has the wrong type.

    Source: Karras et al., 2022, arXiv 2206.00364; Crowson, k-diffusion, 2022.

    >>> from diffusionkit.interop import from_denoiser
    >>> from_denoiser(lambda x, sigma: 0 * x, sigma_max=14.6).sde
    EDMSDE(sigma_min=0.002, sigma_max=14.6)
    """
    check_callable(denoiser, "denoiser")
    low = _level(denoiser, "sigma_min", 0.002) if sigma_min is None else sigma_min
    high = _level(denoiser, "sigma_max", 80.0) if sigma_max is None else sigma_max
    check_interval(low, high, "sigma_min", "sigma_max")
    return X0Model(denoiser, EDMSDE(low, high), label=SigmaLabel(), data_range=data_range)


def each(value: Tensor | float, x: Tensor, name: str) -> Tensor:
    """Return a value for each sample of x, (B,), from one for each or one for all.

    Raises:
        ValueError: if it has another shape.
        TypeError: if it is not a number or a tensor of numbers.
    """
    wide = schedule_dtype(x.device)
    if not isinstance(value, Tensor):
        check_number(value, name)
        return torch.full((len(x),), float(value), dtype=wide, device=x.device)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
    if value.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(f"{name}: expected shape () or ({len(x)},), got {tuple(value.shape)}")
    if value.device != x.device and value.numel() == 1:  # schedulers keep theirs on the CPU
        return torch.full((len(x),), value.item(), dtype=wide, device=x.device)
    t = value.to(x.device)
    t = at_least_float32(t) if t.is_floating_point() else t.to(wide)
    return t.reshape(-1).expand(len(x))


def _levels(sde: ForwardSDE) -> tuple[float, float]:
    """Return sigma / alpha at t_stop and at T."""
    here = home(sde)
    ends = torch.tensor([sde.t_stop, sde.T], dtype=schedule_dtype(here), device=here)
    low, high = torch.exp(-0.5 * sde.log_snr(ends)).detach().tolist()
    return low, min(high, _LARGEST)


def _level(denoiser: object, name: str, default: float) -> float:
    """Return a noise level of a denoiser that has a usable one."""
    try:
        value = float(getattr(denoiser, name, default))
    except (TypeError, ValueError, RuntimeError):
        return default
    return value if 0 < value < math.inf else default
