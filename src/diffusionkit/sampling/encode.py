"""Encoding data with the deterministic DDIM sampler run in reverse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_finite, check_state
from .._coefficients import Coefficient
from .._grid_times import grid_times, kernel, noise_at
from .._loops import Progress, evaluation_mode, with_progress
from .._model_checks import check_model
from .._precision import at_least_float32
from ..interfaces import ScoreModel
from ._start import result
from .grids import Grid, resolve_grid


@torch.no_grad()
def ddim_encode(
    model: ScoreModel,
    x: Tensor,
    /,
    *,
    steps: int = 1000,
    grid: Grid | Tensor | None = None,
    progress: Progress = False,
    **cond: Any,
) -> Tensor:
    r"""Return the noise (B, *D) that DDIM maps to the data: its steps, run from the data to T.

    .. math::
        x_s = \alpha_s \hat x_0(x_t, t) + \sigma_s \hat\epsilon(x_t, t), \quad s > t

    over the times of the sampler's grid in reverse order. `PCSampler(model, DDIM())` on the same
    grid recovers the data up to an error of the order of a step; `ProbabilityFlow.encode` solves
    the same equation to a tolerance. The model is in evaluation mode during the run.

    Args:
        model: the score model.
        x: the state at the last time of the grid (B, *D); the papers use the data themselves.
        steps: the number of steps, unless the grid is a tensor.
        grid: a sampler's grid: a callable (sde, steps) -> times, a tensor of decreasing times, or
            None for the process's from T to t_stop, `KarrasGrid` for an `EDMSDE`, else uniform.
        progress: True for a bar (tqdm, where installed), or a wrapper of an iterable.
        cond: passed to the model.

    Raises:
        ValueError: if the state or the result is not finite, the grid is invalid, or it ends
            without noise.
        TypeError: if a part has the wrong type.

    Source: Song et al., Denoising Diffusion Implicit Models, 2021, arXiv 2010.02502 (section 4.3).

    >>> import torch
    >>> from diffusionkit import DDPMChain, GaussianMixtureModel, ddim_encode
    >>> model = GaussianMixtureModel(DDPMChain.linear(1000), [[2.0]], [0.5])
    >>> x = torch.tensor([[2.5], [1.5]])  # one deviation up and down
    >>> ddim_encode(model, x, steps=500)
    tensor([[ 1.0071],
            [-0.9813]])
    """
    check_model(model)
    check_state(x)
    check_finite(x)
    check_count(steps, "steps")
    sde, dtype, x = model.sde, x.dtype, at_least_float32(x)
    times = grid_times(sde, resolve_grid(grid, sde, steps).flip(0), x)
    if not noise_at(times[0]) > 0:
        raise ValueError(
            "grid: expected to end at a time with noise, where encoding begins, such as "
            f"the SDE's t_stop = {sde.t_stop:g}, got {float(times[0][0]):g}"
        )
    with evaluation_mode(model):
        for t, s in with_progress(list(pairwise(times)), progress):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = kernel(sde, x, t), kernel(sde, x, s)
            ratio: Coefficient = sigma_s / sigma_t
            x = model.predict(x, t, **cond).combine(x=ratio, x0=alpha_s - alpha_t * ratio)
    return result(x, dtype, "noise")
