"""Learning-rate schedules, and optimizer steps with gradient clipping that skip NaN gradients."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .._checks import check_count, check_number, check_part, check_positive
from .._schedules import schedule_dtype
from ..distributed._group import largest
from ..distributed._sharded import is_sharded

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


def inverse_sqrt_decay(optimizer: Optimizer, steps: int = 70_000, *, warmup: int = 1) -> LambdaLR:
    r"""Return a scheduler that lowers the learning rate with the root of the step, as in EDM2.

    .. math:: \mathrm{lr}_i = \mathrm{lr}\, \min\!\left(\frac{i + 1}{\mathrm{warmup}}, 1\right)
        \Big/ \sqrt{\max(i / \mathrm{steps}, 1)}

    at step i = 0, 1, ... Call its `.step()` after each optimizer step. With weights of constant
    magnitude, see `normalize_weights`, this is the only decay of the effective learning rate.

    Args:
        optimizer: the optimizer, set to the largest learning rate. EDM2's is 0.012 for XS, 0.010
            for S down to 0.0065 for XXL, with Adam and betas (0.9, 0.99).
        steps: the number of optimizer steps before the decay; EDM2's are 70,000 for ImageNet-512
            and 35,000 for ImageNet-64, with a batch size of 2048.
        warmup: the length of the linear warm-up in optimizer steps; EDM2's is 10 million images,
            4883 steps.

    Raises:
        ValueError: if steps or warmup is < 1.
        TypeError: if the optimizer is none.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024,
    arXiv 2312.02696 (equation 67).

    >>> import torch
    >>> from diffusionkit import inverse_sqrt_decay
    >>> optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    >>> scheduler = inverse_sqrt_decay(optimizer, steps=25)
    >>> for _ in range(100):
    ...     optimizer.step()
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.5]
    """
    check_part(optimizer, Optimizer, "optimizer")
    check_count(steps, "steps")
    check_count(warmup, "warmup")
    return LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0) / math.sqrt(max(step / steps, 1.0))
    )


@dataclass(frozen=True)
class StepReport:
    """The result of an optimizer step.

    Args:
        norm: the norm of the gradients before clipping; NaN while gradients are accumulated.
        skipped: whether no step was taken: a gradient was not finite, or gradients are accumulated.
    """

    norm: float
    skipped: bool


def clipped_step(
    optimizer: Optimizer, max_norm: float = 1.0, *, parameters: Iterable[Tensor] | None = None
) -> StepReport:
    """Clip the gradients to a norm and take an optimizer step, unless a gradient is not finite.

    With a NaN or infinite gradient the step is skipped, with a warning in the log; parameters and
    optimizer state do not change. Gradients are set to None in both cases.

    Parameters may be sharded, as by `fully_shard`, or not, or some of both. All processes of a
    process group must call this equally often: they exchange one tensor of three numbers, so that
    all clip by the same factor, or all skip the step. The host waits for the device once.

    Call this when the gradients are complete. If they are accumulated over several backward
    passes, that is after the last one. Inside `accelerator.accumulate` it may be called after each:
    with an optimizer that accelerate prepared, nothing is done before the last one.

    Args:
        optimizer: the optimizer.
        max_norm: the largest norm of all gradients together; with `math.inf` nothing is clipped.
        parameters: the parameters to clip, all of the optimizer's by default.

    Raises:
        ValueError: if max_norm is not positive, or no parameter has a gradient in some process.
        TypeError: if the optimizer is none, or a parameter is not a tensor.
    """
    check_part(optimizer, Optimizer, "optimizer")
    check_number(max_norm, "max_norm")
    max_norm = float(max_norm)
    if max_norm != math.inf:
        check_positive(max_norm, "max_norm")
    every = [p for group in optimizer.param_groups for p in group["params"]]
    chosen = every if parameters is None else _checked(parameters)
    if _accumulates(optimizer):
        return StepReport(norm=math.nan, skipped=True)
    clipped = [p.grad for p in chosen if p.grad is not None]
    grads = [clipped]
    if parameters is not None:
        grads.append([p.grad for p in every if p.grad is not None])
    norms = _agreed_norms(grads, [*chosen, *every])
    finite = all(map(math.isfinite, norms))
    if finite:
        if max_norm != math.inf:
            _clip(clipped, max_norm, norms[0])
        optimizer.step()
    else:
        logger.warning("skipped an optimizer step: the norm of the gradients is %s", norms[-1])
    optimizer.zero_grad(set_to_none=True)
    return StepReport(norm=norms[0], skipped=not finite)


def _checked(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters as a list, or raise unless they are tensors."""
    if not isinstance(parameters, Iterable) or isinstance(parameters, Tensor):
        raise TypeError(f"parameters: expected tensors, got {type(parameters).__name__}")
    chosen = list(parameters)
    for p in chosen:
        check_part(p, Tensor, "parameters")
    return chosen


def _accumulates(optimizer: Optimizer) -> bool:
    """Whether an optimizer that accelerate prepared ignores steps, to accumulate gradients."""
    state = getattr(optimizer, "gradient_state", None)
    return getattr(state, "sync_gradients", True) is False


def _agreed_norms(grads: list[list[Tensor]], parameters: list[Tensor]) -> list[float]:
    """Return the norms of lists of gradients, the largest of all processes.

    Raises:
        ValueError: if the first list is empty in some process.
    """
    norms = [_norm(some) for some in grads]
    first = next((x for x in (*norms, *parameters) if x is not None), torch.zeros(()))
    zero = torch.zeros((), dtype=schedule_dtype(first.device), device=first.device)
    # A process without gradients also takes part, since the others wait for it.
    numbers = [zero + (norms[0] is None), *(zero if norm is None else norm for norm in norms)]
    alike = torch.stack([number.to(zero.device, zero.dtype) for number in numbers])
    missing, *found = largest(alike).tolist()
    if missing:
        raise ValueError("parameters: expected gradients, got none; call loss.backward() first")
    return cast(list[float], found)


def _norm(grads: list[Tensor]) -> Tensor | None:
    """Return the norm of gradients, at least in float32, or None if there are none."""
    norms: list[Tensor] = []
    for (mesh, _, dtype), some in _alike(grads).items():
        # The norm of a tensor of half precision may not fit in half precision.
        wide = torch.float32 if dtype.itemsize < 4 else None
        if mesh is not None and wide:  # torch 2.15 cannot do it for all sharded tensors at once
            parts = [torch.linalg.vector_norm(grad, dtype=wide) for grad in some]
        else:
            parts = list(torch._foreach_norm(some, 2, dtype=wide))
        if mesh is not None:
            total: Any = torch.linalg.vector_norm(torch.stack(parts))
            parts = [total.full_tensor()]
        norms += parts
    if not norms:
        return None
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return norm


def _clip(grads: list[Tensor], max_norm: float, norm: float) -> None:
    """Multiply gradients in place by max_norm / norm, unless that is at least 1."""
    double = any(grad.dtype == torch.float64 for grad in grads)
    dtype = torch.float64 if double else torch.float32
    factor = float(max_norm / (torch.tensor(norm, dtype=dtype) + 1e-6))
    if factor < 1.0:
        for some in _alike(grads).values():
            torch._foreach_mul_(some, factor)


def _alike(grads: list[Tensor]) -> dict[tuple[Any, torch.device, torch.dtype], list[Tensor]]:
    """Return gradients by device mesh, which is None unless they are sharded, device and dtype."""
    groups: defaultdict[tuple[Any, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for grad in grads:
        mesh = cast(Any, grad).device_mesh if is_sharded(grad) else None
        groups[mesh, grad.device, grad.dtype].append(grad)
    return groups
