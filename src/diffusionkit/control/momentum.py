"""Momentum of the guidance direction along a sampling trajectory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_number
from .._keywords import explained
from ..interfaces import ScoreModel, Step
from ..random import Generators
from ..sampling.wrapped import WrappedPredictor
from ._directions import remembering
from .extrapolation import ExtrapolatedModel


@explained
@dataclass(frozen=True, repr=False)
class GuidanceMomentum(WrappedPredictor):
    r"""A predictor whose steps add momentum to the direction of guidance.

    .. math::
        \bar d_k = d_k + \mathrm{factor}\; \bar d_{k-1}

    in place of the direction d of `ClassifierFreeGuidance` or `Autoguidance`, before its
    projection. A negative factor subtracts the direction of the previous steps: the paper's reverse
    momentum. The average is in `Step.state`, like the memory of a multistep predictor: the model
    stays a function of state and time, and a run, `edit` and time travel start without one.

    - All evaluations of a step use the average of the steps before it; the first one makes the new
      average. So a predictor with two evaluations, such as `Heun`, has one update a step, and with
      one evaluation a step this is the paper's algorithm. Code that updates a buffer in every
      evaluation would count the second one as a step.
    - Correctors leave the distribution of the model unchanged, so they evaluate the model without
      momentum, and do not change the average.
    - Outside the interval of the guidance there is no direction, and the average stays as it is.
    - Nested guided models have separate averages.

    With momentum, the run no longer solves the equations of any score: do not use it if the
    distribution of the samples matters. Likelihoods and `ProbabilityFlow` have no momentum.

    Args:
        predictor: the predictor of the steps.
        factor: the momentum, beta in the paper, which takes -.75 to -.25.

    Raises:
        ValueError: unless -1 < factor < 1; in the first step, if the model has no guidance by
            a difference.
        TypeError: if predictor is not a Predictor or factor not a number.

    Source: Sadat et al., 2025, arXiv 2410.02416 (section 4 and algorithm 1).

    >>> import torch
    >>> from diffusionkit import (
    ...     DDIM, VPSDE, AdaptiveProjection, ClassifierFreeGuidance,
    ...     GuidanceMomentum, PCSampler, X0Model
    ... )
    >>> def network(x, noise_label, class_labels):
    ...     return 0.5 * torch.tanh(x) + class_labels[:, None]
    >>> model = X0Model(network, VPSDE())
    >>> guided = ClassifierFreeGuidance(
    ...     model, 5.0, null={"class_labels": 0},
    ...     projection=AdaptiveProjection(max_norm=2.5))
    >>> sampler = PCSampler(guided, GuidanceMomentum(DDIM(), -0.5), steps=5)
    >>> sampler((4, 3), class_labels=torch.tensor([1, 1, 2, 2])).shape
    torch.Size([4, 3])
    """

    factor: float = -0.5

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.factor, "factor")
        if not (math.isfinite(self.factor) and -1 < self.factor < 1):
            raise ValueError(f"factor: expected a number in (-1, 1), got {self.factor}")

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
        if state is None:
            _check_guided(model)
        inner, before = (None, {}) if state is None else state
        with remembering(before, self.factor) as memory:
            step = self.predictor.step(model, x, t, s, inner, generator=generator, **cond)
        after = memory.after
        if not torch.is_grad_enabled():  # guidance by gradients records graphs of its own
            after = {owner: average.detach() for owner, average in after.items()}
        return replace(step, state=(step.state, after))


def _check_guided(model: ScoreModel) -> None:
    """Raise unless a model has a direction that momentum can be added to."""
    if not any(isinstance(part, ExtrapolatedModel) for part in model.modules()):
        raise ValueError(
            "model: expected ClassifierFreeGuidance or Autoguidance, whose direction has "
            f"momentum, got {type(model).__name__} without either"
        )
