"""The variance of an objective's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_part
from .._loops import Progress, with_progress
from ..interfaces import ScoreModel
from ._data import check_generator, draw_rows, gathered, kernel, mean_and_error
from .estimates import Estimate


def gradient_variance(
    model: ScoreModel,
    objective: Callable[..., Tensor],
    data: Tensor | Iterable[Any],
    t: Tensor,
    *,
    batch_size: int = 64,
    reference_size: int | None = None,
    pairs: int = 16,
    label: str = "gradient",
    generator: torch.Generator | None = None,
    progress: Progress = False,
) -> Estimate:
    r"""Return the trace of the covariance of the gradient of a batch's mean loss, time by time.

    .. math::
        \mathrm{Tr\,Cov}(g) = \tfrac12 E \|g - g'\|^2, \quad
        g = \nabla_\theta \frac1B \sum_{i=1}^B \ell_i(\theta; t)

    over independent pairs of batches, each with its own data, noise and references: unbiased. All
    times of a batch are the same. The model stays in the mode it is in and its .grad as it is. With
    one seed and one reference size, two objectives see the same data and noise.

    Args:
        model: the score model; its parameters that require a gradient count.
        objective: returns losses (B,) of (model, x0, reference=, t=, generator=), such as
            `ScoreMatching`.
        data: the data set, as in `dsm_variance`, in the model's dtype.
        t: the times (K,).
        batch_size: B.
        reference_size: the size of the reference batch, drawn anew with each batch, which is
            inside it; None for objectives that need none.
        pairs: how many pairs of batches each mean is over.
        label: the name in a legend.
        generator: the source of data, noise and references.
        progress: whether to show progress, or a wrapper of the pairs that does.

    Raises:
        ValueError: if the model has no parameters to train, there are fewer references than data
            in a batch, a count is too small, and as `dsm_variance` does.
        TypeError: if a part has the wrong type.

    Source: Xu et al., 2023, arXiv 2302.00670 (section 5, where the target's variance is measured).
    """
    check_part(model, ScoreModel, "model")
    check_count(batch_size, "batch_size")
    check_count(pairs, "pairs", least=2)
    if reference_size is not None:
        check_count(reference_size, "reference_size", least=batch_size)
    check_generator(generator)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected parameters that require a gradient, got none")
    rows, (alpha, sigma) = gathered(data), kernel(model.sde, t)
    device = parameters[0].device

    def gradient(time: float) -> Sequence[Tensor]:
        drawn = draw_rows(rows, (reference_size or batch_size,), generator).to(device)
        # As the objective's own times are.
        dtype = torch.promote_types(drawn.dtype, torch.float32)
        times = torch.full((batch_size,), time, device=device, dtype=dtype)
        reference = None if reference_size is None else drawn
        x0 = drawn[:batch_size]
        with torch.enable_grad():
            losses = objective(model, x0, reference=reference, t=times, generator=generator)
            return torch.autograd.grad(losses.mean(), parameters, materialize_grads=True)

    found = torch.zeros(len(t), pairs, dtype=torch.float64)
    steps = [(i, k) for i in range(len(t)) for k in range(pairs)]
    for i, k in with_progress(steps, progress):
        both = zip(gradient(float(t[i])), gradient(float(t[i])), strict=True)
        found[i, k] = 0.5 * sum(float((a - b).double().square().sum()) for a, b in both)
    return Estimate(t, sigma / alpha, *mean_and_error(found), "variance (gradient)", label)
