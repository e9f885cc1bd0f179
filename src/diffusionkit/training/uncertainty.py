"""Losses weighted by a learned uncertainty, so that all noise levels contribute equally."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_callable, check_count, check_part, check_state, check_times
from .._magnitude import MPLinear, mp_cosines
from .._repr import described
from ..interfaces import ForwardSDE, ScoreModel, TimeSampler
from ..models import LogSigmaLabel
from ..models.labels import Label, checked_label
from ..random import Generators
from .objectives import ScoreMatching
from .times import LogNormalTimes, times_and_weights, weighted_losses
from .weighting import EDMWeighting

# The label where it is infinite: at alpha = 0 it is the logarithm of an infinite ratio.
_LARGEST = 25.0


class LearnedUncertainty(nn.Module):
    r"""An objective weighted by a learned uncertainty u of its losses at each noise level.

    .. math:: \ell_i' = w_i \left( e^{-u(t_i)}\, \ell_i + u(t_i) \right), \qquad
        u = \frac{v \cdot e}{\|v\|}, \quad e_j = \sqrt 2 \cos(f_j c + \phi_j),

    with losses l, weights w of the time sampler, the noise label c, fixed random frequencies f and
    phases, and a learned vector v. The loss is smallest at u = log E[l | t], where each noise level
    contributes a loss of 1 to the weighted mean and its gradients are as large as those of any
    other. So the distribution of training times can be chosen freely, and the relative weight
    of the objective at different times does not matter. The weighted loss is negative where losses
    are small.

    Since v is normalized, u has a bounded size: with 128 features it can be about 4 in magnitude
    over EDM's whole range of noise, enough for losses weighted by `EDMWeighting`. The bound grows
    with the square root of the number of features; use 1024 for losses that span more decades.

    The default is the loss of EDM2. Train the parameters of this module with those of the model,
    and pass both to `normalize_weights`. For evaluation call the objective itself, whose losses are
    comparable between models.

    Args:
        objective: returns losses (B,) of a model and data, given t, generator and conditions, and
            has `times`, such as `ScoreMatching`; by default that of EDM2 for images, with
            `EDMWeighting` and `LogNormalTimes(-0.4, 1.0)`.
        features: the number of frequencies.
        label: the noise label c, log(sigma / alpha) / 4 by default.

    Attributes:
        times: the time sampler of the objective.

    Raises:
        TypeError: if the objective or the label is not callable, or it has no `times`.
        ValueError: if these times adapt to losses.

    Source: Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses, 2018,
    arXiv 1705.07115; Karras et al., Analyzing and Improving the Training Dynamics of Diffusion
    Models, 2024, arXiv 2312.02696 (section 2.2, equation 21).

    >>> import torch
    >>> from diffusionkit import EDMSDE, EDMModel, LearnedUncertainty
    >>> from diffusionkit.networks import MLP
    >>> model, objective = EDMModel(MLP(2), EDMSDE()), LearnedUncertainty()
    >>> objective(model, torch.randn(8, 2)).shape
    torch.Size([8])
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self,
        objective: Callable[..., Tensor] | None = None,
        *,
        features: int = 128,
        label: Label | None = None,
    ) -> None:
        """Draw the frequencies and an initial weight."""
        super().__init__()
        check_count(features, "features", most=2**20)
        if objective is None:
            objective = ScoreMatching(EDMWeighting(), times=LogNormalTimes(-0.4, 1.0))
        label = LogSigmaLabel() if label is None else label
        check_callable(objective, "objective")
        check_callable(label, "label")
        times: Any = getattr(objective, "times", None)
        check_part(times, TimeSampler, "objective.times")
        if type(times).update is not TimeSampler.update:
            raise ValueError(
                "objective: expected times that do not adapt to losses, which are weighted here, "
                f"got {type(times).__name__}"
            )
        self.objective = objective
        self.features = features
        self.label = label
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.linear = MPLinear(features, 1)

    @property
    def times(self) -> TimeSampler:
        """The time sampler of the objective."""
        times: TimeSampler = getattr(self.objective, "times")  # noqa: B009 - of a Callable
        return times

    @override
    def __repr__(self) -> str:
        return described(self)

    def log_variance(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return u (B,) at times t (B,) of a process, in float32 at least."""
        check_part(sde, ForwardSDE, "sde")
        check_times(t, sde.T)
        wide = torch.promote_types(self.frequencies.dtype, torch.float32)
        frequencies, phases = self.frequencies.to(wide), self.phases.to(wide)
        label = checked_label(self.label(sde, t), t).to(frequencies)
        label = label.nan_to_num(math.nan, _LARGEST, -_LARGEST)
        u: Tensor = self.linear(mp_cosines(label, frequencies, phases))
        return u.squeeze(1)

    @override
    def forward(
        self,
        model: ScoreModel,
        x0: Tensor,
        /,
        *,
        t: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """Return the losses (B,) of data x0 (B, *D).

        Args:
            model: the score model, with the process `model.sde`.
            x0: the data (B, *D).
            t: times (B,) with weight 1; drawn from the objective's time sampler by default.
            generator: the generator of times and noise.
            cond: passed to the objective: conditions, a mask or reference data.

        Raises:
            ValueError: as the objective does.
            TypeError: as the objective does, and if model is not a ScoreModel.
        """
        check_part(model, ScoreModel, "model")
        check_state(x0, "x0")
        t, weight = times_and_weights(self.times, model.sde, x0, t, generator)
        loss = self.objective(model, x0, t=t, generator=generator, **cond)
        u = self.log_variance(model.sde, t).to(loss.dtype)
        return weighted_losses(torch.exp(-u) * loss + u, weight)
