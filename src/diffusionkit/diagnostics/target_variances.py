r"""The variance of targets, by noise level.

For a finite data set everything about the posterior of the data given a noisy state,

.. math::
    p(x_k | x) = w_k = \mathrm{softmax}_k\!\left(-\|x - \alpha x_k\|^2 / (2 \sigma^2)\right),

is known exactly. What is estimated is the mean over noisy states only. The values are those of the
data handed in: a sample from a continuous law resembles the law as long as many of its points are
within the noise of one another. Where clusters are far apart for the noise, a few states between
them decide: a mean over states that met none of them is too small, and so is its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._checks import check_count
from .._loops import Progress, with_progress
from .._schedules import exact
from ..interfaces import ForwardSDE
from ..random import rand, randn
from ._data import check_generator, draw_index, draw_rows, gathered, kernel, mean_and_error
from .estimates import Estimate

Units: TypeAlias = Literal["score", "noise", "x0"]
Divergence: TypeAlias = Literal["f", "tv"]
_Statistic: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_NUMBERS = 2**22  # in the largest intermediate tensor


def dsm_variance(
    sde: ForwardSDE,
    data: Tensor | Iterable[Any],
    t: Tensor,
    *,
    units: Units = "score",
    samples: int = 1000,
    generator: torch.Generator | None = None,
    progress: Progress = False,
) -> Estimate:
    r"""Return the variance of the denoising target given the noisy state.

    .. math::
        V_{DSM}(t) = E_x \, \mathrm{Tr\,Cov}_{p(x_0 | x)}(\mathrm{target}), \quad
        V_{noise} = \frac{\alpha^2}{\sigma^2} V_{x_0}, \quad
        V_{score} = \frac{\alpha^2}{\sigma^4} V_{x_0}.

    Given x it is exact; the mean over x is estimated.

    Args:
        sde: the forward process.
        data: the data set: a tensor (N, *D), a map-style data set of tensors (*D), or a loader of
            batches (B, *D). The first part of a tuple is taken. All of it is kept, in float64.
        t: the times (K,).
        units: which target: "score", "noise" or "x0".
        samples: how many noisy states each mean is over.
        generator: the source of data and noise.
        progress: whether to show progress, or a wrapper of the chunks that does.

    Raises:
        ValueError: if the data are empty or not finite, a time lies outside [0, T] or has no noise,
            or the units are not known.
        TypeError: if a part has the wrong type.

    Source: Xu et al., Stable Target Field for Reduced Variance Score Estimation in Diffusion
    Models, 2023, arXiv 2302.00670 (equation 4).

    >>> from diffusionkit import VESDE
    >>> from diffusionkit.diagnostics import dsm_variance
    >>> found = dsm_variance(VESDE(), torch.tensor([[-1.0], [1.0]]), torch.tensor([1.0]))
    >>> bool(0.999 < found.value * found.noise**4 <= 1)  # far out, the data's own variance
    True
    """
    return _average(_spread, sde, data, t, samples, generator, progress, units=units, label="DSM")


def stf_variance(
    sde: ForwardSDE,
    data: Tensor | Iterable[Any],
    t: Tensor,
    n: int,
    *,
    units: Units = "score",
    samples: int = 1000,
    draws: int = 2,
    generator: torch.Generator | None = None,
    progress: Progress = False,
) -> Estimate:
    r"""Return the variance of the stable target given the noisy state.

    .. math::
        V_{STF}(t; n) = E_x \, E \left[\| T - E[x_0 | x] \|^2\right], \quad
        T = \frac{\sum_j w_j x_j}{\sum_j w_j}

    for the target of the data, over reference batches x_1..x_n of which one, the source of x, is
    drawn from the posterior and the others independently from the data. T is unbiased for every n,
    and its exact mean is used. With n = 1 this is V_DSM.

    Args:
        sde: the forward process.
        data: the data set, as in `dsm_variance`.
        t: the times (K,).
        n: the size of the reference batch, the source included.
        units: which target: "score", "noise" or "x0".
        samples: how many noisy states each mean is over.
        draws: how many reference batches are drawn for each noisy state.
        generator: the source of data, noise and references.
        progress: whether to show progress, or a wrapper of the chunks that does.

    Raises:
        ValueError: if a count is not positive, and as `dsm_variance` does.
        TypeError: if a part has the wrong type.

    Source: Xu et al., 2023, arXiv 2302.00670 (section 4).
    """
    check_count(n, "n")
    check_count(draws, "draws")
    statistic = partial(_stable_error, n=n, draws=draws, generator=generator)
    return _average(
        statistic, sde, data, t, samples, generator, progress,
        units=units, label=f"STF, n = {n}", width=n * draws,
    )  # fmt: skip


def posterior_divergence(
    sde: ForwardSDE,
    data: Tensor | Iterable[Any],
    t: Tensor,
    *,
    kind: Divergence = "f",
    samples: int = 1000,
    generator: torch.Generator | None = None,
    progress: Progress = False,
) -> Estimate:
    r"""Return how far the posterior of the data is from the data's own law.

    .. math::
        D(t) = E_x \sum_k w_k f\!\left(\frac{1}{N w_k}\right), \quad
        f(y) = \begin{cases} (1/y - 1)^2 & y < 3/2 \\ 8 y / 27 - 1/3 & y \ge 3/2 \end{cases}

    bounds the variance of the stable target,
    V_STF <= (V_DSM + sqrt(3) d sqrt(D) / sigma^2) / (n - 1) + O(1 / n^2). It is heavy-tailed: where
    the posterior is narrow, few noisy states decide, and the standard error is itself too small.
    The total variation, half the summed distance of the weights from 1/N, tells the phases as
    well and is at most 1.

    Args:
        sde: the forward process.
        data: the data set, as in `dsm_variance`.
        t: the times (K,).
        kind: "f" for D(t), "tv" for the total variation.
        samples: how many noisy states each mean is over.
        generator: the source of data and noise.
        progress: whether to show progress, or a wrapper of the chunks that does.

    Raises:
        ValueError: if the kind is not known, and as `dsm_variance` does.
        TypeError: if a part has the wrong type.

    Source: Xu et al., 2023, arXiv 2302.00670 (theorem 2).
    """
    kinds: dict[str, tuple[_Statistic, str]] = {
        "f": (_f_divergence, "f-divergence"),
        "tv": (_total_variation, "total variation"),
    }
    if kind not in kinds:
        raise ValueError(f"kind: expected one of {tuple(kinds)}, got {kind!r}")
    statistic, label = kinds[kind]
    return _average(statistic, sde, data, t, samples, generator, progress, units=None, label=label)


def _average(
    statistic: _Statistic,
    sde: ForwardSDE,
    data: Tensor | Iterable[Any],
    t: Tensor,
    samples: int,
    generator: torch.Generator | None,
    progress: Progress,
    *,
    units: Units | None,
    label: str,
    width: int = 1,
) -> Estimate:
    """Average statistic(log-weights (C, N), data (N, d)) over noisy states, in chunks of C.

    A state needs `width` rows of the data at once, beside its N weights.
    """
    if units not in (None, *get_args(Units)):
        raise ValueError(f"units: expected one of {get_args(Units)}, got {units!r}")
    check_count(samples, "samples", least=2)
    check_generator(generator)
    rows = exact(gathered(data)).flatten(1)
    alpha, sigma = kernel(sde, t)
    size = max(1, _NUMBERS // max(len(rows), width * rows.shape[1]))
    halves = rows.square().sum(1) / 2
    found = torch.zeros(len(t), samples, dtype=torch.float64)
    steps = [(i, start) for i in range(len(t)) for start in range(0, samples, size)]
    for i, start in with_progress(steps, progress):
        a, s = float(alpha[i]), float(sigma[i])
        x0 = draw_rows(rows, (min(size, samples - start),), generator)
        eps = randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x = a * x0 + s * eps
        # The part of the squared distance that depends on the data, over sigma^2.
        weights = torch.log_softmax(a * (x @ rows.T - a * halves) / s**2, 1)
        found[i, start : start + size] = statistic(weights, rows).cpu()
    factor = torch.ones_like(alpha)
    if units in ("noise", "score"):
        factor = (alpha / sigma).square() / (sigma.square() if units == "score" else 1.0)
    mean, error = mean_and_error(found)
    quantity = "divergence" if units is None else f"variance ({units})"
    return Estimate(t, sigma / alpha, mean * factor, error * factor, quantity, label)


def _spread(log: Tensor, rows: Tensor) -> Tensor:
    """Return the variance of the data under weights exp(log) (C, N), (C,).

    Around the likeliest point, whose own share is left out: weights that are all but one to
    rounding still give a variance that is right, where E|x|^2 - |E x|^2 would give noise.
    """
    best = log.argmax(1, keepdim=True)
    weights = log.exp()
    centre, norms = rows[best.squeeze(1)], rows.square().sum(1)
    squares = norms + norms[best] - 2 * centre @ rows.T
    others, shift = weights.scatter(1, best, 0.0), weights @ rows - centre
    return ((others * squares.clamp_min(0.0)).sum(1) - shift.square().sum(1)).clamp_min(0.0)


def _stable_error(
    log: Tensor, rows: Tensor, *, n: int, draws: int, generator: torch.Generator | None
) -> Tensor:
    """Return the squared error of stable targets for weights exp(log) (C, N), (C,)."""
    weights = log.exp()
    u = rand((len(log), draws), generator=generator, device=log.device, dtype=log.dtype)
    edges = weights.cumsum(1)
    source = torch.searchsorted(edges, u * edges[:, -1:], right=True).clamp_max(len(rows) - 1)
    others = draw_index(len(rows), (len(log), draws, n - 1), generator, rows)
    index = torch.cat([source.unsqueeze(2), others], 2)
    share = torch.softmax(log.gather(1, index.flatten(1)).view(index.shape), 2)
    target = (share.unsqueeze(2) @ rows[index]).squeeze(2)
    return (target - (weights @ rows).unsqueeze(1)).square().sum(2).mean(1)


def _f_divergence(log: Tensor, rows: Tensor) -> Tensor:
    weights, n = log.exp(), log.shape[1]
    ratio = log + math.log(n)  # of posterior to data, whose inverse is y
    near = weights * torch.expm1(ratio).square()
    return torch.where(ratio > math.log(2 / 3), near, 8 / (27 * n) - weights / 3).sum(1)


def _total_variation(log: Tensor, rows: Tensor) -> Tensor:
    return torch.expm1(log + math.log(log.shape[1])).abs().mean(1) / 2
