"""Learning-rate warm-up, and optimizer steps with gradient clipping that skip NaN gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .._checks import check_count, check_number, check_part, check_positive

logger = logging.getLogger(__name__)


def linear_warmup(optimizer: Optimizer, steps: int = 5000) -> LambdaLR:
    """Return a scheduler that raises the learning rate linearly from 1/steps of its final value.

    Call its `.step()` after each optimizer step.

    Args:
        optimizer: the optimizer, set to the final learning rate.
        steps: the length of the warm-up in optimizer steps; the papers use 5000.

    Raises:
        ValueError: if steps < 1.
        TypeError: if the optimizer is none.
    """
    check_part(optimizer, Optimizer, "optimizer")
    check_count(steps, "steps")
    return LambdaLR(optimizer, lambda step: min((step + 1) / steps, 1.0))


@dataclass(frozen=True)
class StepReport:
    """The result of an optimizer step.

    Args:
        norm: the norm of the gradients before clipping.
        skipped: whether the step was skipped because a gradient was not finite.
    """

    norm: float
    skipped: bool


def clipped_step(
    optimizer: Optimizer, max_norm: float = 1.0, *, parameters: Iterable[Tensor] | None = None
) -> StepReport:
    """Clip the gradients to a norm and take an optimizer step, unless a gradient is not finite.

    With a NaN or infinite gradient the step is skipped, with a warning in the log; parameters and
    optimizer state do not change. Gradients are set to None in both cases.

    Args:
        optimizer: the optimizer.
        max_norm: the largest norm of all gradients together; with `math.inf` nothing is clipped.
        parameters: the parameters to clip, all of the optimizer's by default.

    Raises:
        ValueError: if max_norm is not positive, or no parameter has a gradient.
        TypeError: if the optimizer is none, or a parameter is not a tensor.
    """
    check_part(optimizer, Optimizer, "optimizer")
    check_number(max_norm, "max_norm")
    if max_norm != math.inf:
        check_positive(max_norm, "max_norm")
    every = [p for group in optimizer.param_groups for p in group["params"]]
    selected = every if parameters is None else _checked(parameters)
    chosen = [p for p in selected if p.grad is not None]
    if not chosen:
        raise ValueError("parameters: expected gradients, got none; call loss.backward() first")
    norm = _norm(chosen)
    whole = norm if parameters is None else _norm(every)
    finite = math.isfinite(float(norm)) and math.isfinite(float(whole))
    if finite:
        if max_norm != math.inf:
            torch.nn.utils.clip_grads_with_norm_(chosen, max_norm, norm)
        optimizer.step()
    else:
        logger.warning("skipped an optimizer step: the norm of the gradients is %s", float(whole))
    optimizer.zero_grad(set_to_none=True)
    return StepReport(norm=float(norm), skipped=not finite)


def _checked(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters as a list, or raise unless they are tensors."""
    if not isinstance(parameters, Iterable) or isinstance(parameters, Tensor):
        raise TypeError(f"parameters: expected tensors, got {type(parameters).__name__}")
    chosen = list(parameters)
    for p in chosen:
        check_part(p, Tensor, "parameters")
    return chosen


def _norm(parameters: list[Tensor]) -> Tensor:
    """Return the norm of all gradients, of those parameters that have one, at least in float32."""
    grads = [p.grad for p in parameters if p.grad is not None]
    # Tensors of half precision enter by their norms, which may not fit in half precision.
    half = [g for g in grads if g.dtype.itemsize < 4]
    norms = torch._foreach_norm(half, 2, dtype=torch.float32) if half else []
    return torch.nn.utils.get_total_norm([*norms, *(g for g in grads if g.dtype.itemsize >= 4)])
