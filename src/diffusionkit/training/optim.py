"""Small functions around the optimiser: warm-up, and a clipped step that refuses NaN."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .._checks import check_count, check_positive

logger = logging.getLogger(__name__)


def linear_warmup(optimizer: Optimizer, steps: int = 5000) -> LambdaLR:
    """Return a scheduler that raises the learning rate linearly from 1/steps to all of it.

    Call its `.step()` after each optimiser step.

    Args:
        optimizer: the optimiser, its learning rate the final one.
        steps: the length of the warm-up; the papers use 5000.

    Raises:
        ValueError: if steps < 1.
    """
    check_count(steps, "steps")
    return LambdaLR(optimizer, lambda step: min((step + 1) / steps, 1.0))


@dataclass(frozen=True)
class StepReport:
    """What became of an optimiser step.

    Args:
        norm: the norm of the gradients before clipping.
        skipped: whether the step was left out because a gradient was not finite.
    """

    norm: float
    skipped: bool


def clipped_step(
    optimizer: Optimizer, max_norm: float = 1.0, *, parameters: Iterable[Tensor] | None = None
) -> StepReport:
    """Clip the gradients to a norm and take an optimiser step, unless a gradient is not finite.

    A step with a NaN or infinite gradient is left out and logged as a warning; the parameters
    and the optimiser's state stay as they are. Gradients are set to None in both cases.

    Args:
        optimizer: the optimiser.
        max_norm: the largest norm of all gradients together; `math.inf` only measures it.
        parameters: the parameters to clip, all of the optimiser's by default.

    Raises:
        ValueError: if max_norm is not positive, or no parameter has a gradient.
    """
    if max_norm != math.inf:
        check_positive(max_norm, "max_norm")
    every = [p for group in optimizer.param_groups for p in group["params"]]
    chosen = [p for p in (every if parameters is None else parameters) if p.grad is not None]
    if not chosen:
        raise ValueError("expected gradients, got none: call loss.backward() first")
    norm = whole = _norm(chosen)
    if parameters is not None:
        whole = _norm(every)
    finite = math.isfinite(float(norm)) and math.isfinite(float(whole))
    if finite:
        if max_norm != math.inf:
            torch.nn.utils.clip_grads_with_norm_(chosen, max_norm, norm)
        optimizer.step()
    else:
        logger.warning("skipped an optimiser step: the gradient's norm is %s", float(whole))
    optimizer.zero_grad(set_to_none=True)
    return StepReport(norm=float(norm), skipped=not finite)


def _norm(parameters: list[Tensor]) -> Tensor:
    """Return the norm of all gradients there are."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
