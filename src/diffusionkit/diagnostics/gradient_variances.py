"""The variance of an objective's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_callable, check_count, check_part
from .._loops import Progress, with_progress
from .._model_checks import check_model
from .._schedules import exact
from ..interfaces import ScoreModel
from ._data import as_tensor, check_generator, draw_rows, kernel, mean_and_error
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
    r"""Estimate the variance of the gradient of a batch's mean loss at each time.

    .. math::
        \mathrm{Tr\,Cov}(g) = \tfrac12 E \|g - g'\|^2, \quad
        g = \nabla_\theta \frac1B \sum_{i=1}^B \ell_i(\theta; t)

    with the mean over independent pairs of batches, each with new data, noise and references. The
    estimate is unbiased. All samples of a batch have the same time. The model's training mode and
    .grad do not change. With the same seed and reference size, different objectives get the same
    data and noise.

    Args:
        model: the score model; its parameters that require a gradient are included.
        objective: a function of (model, x0, reference=, t=, generator=) that returns losses (B,),
            such as `ScoreMatching`.
        data: the data set, as in `dsm_variance`, in the model's dtype.
        t: the times (K,).
        batch_size: the size B of the batches.
        reference_size: the size of the reference batch, which contains the batch; None for
            objectives without references.
        pairs: the number of pairs of batches at each time.
        label: the name in a legend.
        generator: the generator of data, noise and references.
        progress: whether to show progress, or a function that wraps the iterable of pairs.

    Raises:
        ValueError: if the model has no trainable parameters, reference_size < batch_size, a count
            is too small, and as `dsm_variance` does.
        TypeError: if a part has the wrong type.

    Source: Xu et al., Stable Target Field for Reduced Variance Score Estimation in Diffusion
    Models, 2023, arXiv 2302.00670 (section 5, on the variance of the target).
    """
    check_model(model)
    check_callable(objective, "objective")
    check_part(label, str, "label")
    check_count(batch_size, "batch_size")
    check_count(pairs, "pairs", least=2)
    if reference_size is not None:
        check_count(reference_size, "reference_size", least=batch_size)
    check_generator(generator)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected parameters that require a gradient, got none")
    rows, (alpha, sigma) = as_tensor(data), kernel(model.sde, t)
    device = parameters[0].device

    def gradient(time: float) -> Sequence[Tensor]:
        drawn = draw_rows(rows, (reference_size or batch_size,), generator).to(device)
        dtype = torch.promote_types(drawn.dtype, torch.float32)  # as when an objective draws times
        times = torch.full((batch_size,), time, device=device, dtype=dtype)
        reference = None if reference_size is None else drawn
        x0 = drawn[:batch_size]
        with torch.enable_grad():
            losses = objective(model, x0, reference=reference, t=times, generator=generator)
            return torch.autograd.grad(losses.mean(), parameters, materialize_grads=True)

    values = torch.zeros(len(t), pairs, dtype=torch.float64)
    steps = [(i, k) for i in range(len(t)) for k in range(pairs)]
    for i, k in with_progress(steps, progress):
        pair = zip(gradient(float(t[i])), gradient(float(t[i])), strict=True)
        values[i, k] = 0.5 * sum(float(exact((a - b).detach()).square().sum()) for a, b in pair)
    return Estimate(t, sigma / alpha, *mean_and_error(values), "variance (gradient)", label)
