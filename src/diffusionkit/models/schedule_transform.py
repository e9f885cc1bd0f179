"""A model of one process as a model of another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_part
from .._coefficients import expand, linear
from .._grid_times import kernel
from .._model_checks import check_model
from .._schedules import exact, home, schedule_dtype
from ..interfaces import ForwardSDE, ScoreModel
from ..values import Prediction


class ScheduleTransformedModel(ScoreModel):
    r"""A model of one process as a model of another, with the state rescaled and time changed.

    At equal noise-to-signal ratios the noisy data of two processes differ only in scale:

    .. math::
        x' = \frac{\alpha'(t')}{\alpha(t)} x, \quad
        \frac{\sigma'(t')}{\alpha'(t')} = \frac{\sigma(t)}{\alpha(t)},

    and the data and the noise predicted from x' at t' are those of x at t. So a network trained on
    one process can be sampled, and its likelihood computed, on any other. EDM's VP preconditioning
    is `ScheduleTransformedModel(EpsModel(network, VPSDE()), EDMSDE())`, and its iDDPM
    preconditioning is the same with a `DDPMChain`. Below the smallest noise of the model's own
    process, the model is evaluated at that noise. A process with alpha(T) = 0, such as
    `FlowMatchingSDE`, has more noise than any other; there the model is evaluated at its own T,
    where hardly any signal is left.

    Args:
        model: the score model of its own process.
        sde: the process to use it in.

    Raises:
        ValueError: if sde has noise levels between its t_min and T that the model's process lacks.
        TypeError: if a part has the wrong type.

    Source: Karras et al., 2022, arXiv 2206.00364 (appendix C).

    >>> import torch
    >>> from diffusionkit import (
    ...     EDMSDE, VPSDE, EpsModel, ScheduleTransformedModel
    ... )
    >>> model = EpsModel(lambda x, noise_label: x, VPSDE())
    >>> model = ScheduleTransformedModel(model, EDMSDE())
    >>> # the input of the network
    >>> model.predict(torch.ones(1, 2), torch.tensor([1.0])).eps
    tensor([[0.7071, 0.7071]])
    """

    def __init__(self, model: ScoreModel, sde: ForwardSDE) -> None:
        """Join the model and the process."""
        super().__init__()
        check_model(model)
        check_part(sde, ForwardSDE, "sde")
        self.model = model
        self.sde = sde
        (most, least), (most_known, least_known) = _range(sde, sde.t_min), _range(model.sde, 0.0)
        lacking = least < least_known - 1e-6 and not math.isinf(least)
        if lacking or most > most_known + 1e-6:
            known, wanted = (
                [f"{math.exp(-0.5 * value):.4g}" for value in pair]
                for pair in ((most_known, least_known), (most, least))
            )
            raise ValueError(
                f"sde: expected sigma / alpha within that of the model's process, "
                f"{' to '.join(known)}, got {' to '.join(wanted)}"
            )
        # The log-SNR below which the model's own process has no times, if there is any.
        self._least = least_known if least < least_known - 1e-6 else None

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        alpha, sigma = kernel(self.sde, x, t)
        log_snr = self.sde.log_snr(exact(t))
        known = log_snr if self._least is None else log_snr.clamp_min(self._least)
        inner = self.model.sde.time_at_log_snr(known)
        # The ratio of the scales, which is that of the noises: finite where either is 0.
        inner_alpha, inner_sigma = self.model.sde.marginal(inner)
        scale = expand(((inner_alpha**2 + inner_sigma**2) / (alpha**2 + sigma**2)) ** 0.5, x)
        prediction = self.model.predict((x * scale).to(x.dtype), inner, **cond)
        fraction = prediction.log_var_fraction  # independent of the scale
        x0, eps = prediction.x0, prediction.eps
        if self._least is not None:
            noise = linear(1 / sigma, x, -alpha / sigma, x0)
            faint = (log_snr < self._least).view(-1, *(1,) * (x.ndim - 1))
            eps = torch.where(faint, noise, eps)
        return Prediction(x, x0, eps, alpha, sigma, log_var_fraction=fraction)


@torch.no_grad()
def _range(sde: ForwardSDE, first: float) -> list[float]:
    """Return the log-SNR at a first time and at T."""
    device = home(sde)
    ends = torch.tensor([first, sde.T], dtype=schedule_dtype(device), device=device)
    values: list[float] = sde.log_snr(ends).tolist()
    return values
