r"""The variance of regression targets at each noise level.

For a finite data set the posterior of the data given a noisy state,

.. math::
    p(x_k | x) = w_k = \mathrm{softmax}_k\!\left(-\|x - \alpha x_k\|^2 / (2 \sigma^2)\right),

is known exactly; only the mean over noisy states is estimated. The values are those of the given
data set. They approximate those of a continuous distribution it was drawn from only if each point
has many others within the noise. If clusters are far apart relative to the noise, a few states
between them dominate: a mean over states that misses them is too small, as is its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._checks import check_choice, check_count
from .._loops import Progress, with_progress
from .._schedules import exact
from ..interfaces import ForwardSDE
from ..random import rand, randn
from ._data import as_tensor, check_generator, draw_index, draw_rows, kernel, mean_and_error
from .estimates import Estimate

Units: TypeAlias = Literal["score", "noise", "x0"]
Divergence: TypeAlias = Literal["f", "tv"]
_Statistic: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_NUMBERS = 2**22  # the size of the largest intermediate tensor


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
    r"""Estimate the variance of the denoising target given the noisy state.

    .. math::
        V_{DSM}(t) = E_x \, \mathrm{Tr\,Cov}_{p(x_0 | x)}(\mathrm{target}), \quad
        V_{noise} = \frac{\alpha^2}{\sigma^2} V_{x_0}, \quad
        V_{score} = \frac{\alpha^2}{\sigma^4} V_{x_0}.

    The variance given x is exact; its mean over x is estimated.

    Args:
        sde: the forward process.
        data: the data set: a tensor (N, *D), a map-style data set of tensors (*D), or a loader of
            batches (B, *D). Of tuples the first entry is used. Held in memory in float64.
        t: the times (K,).
        units: the target: "score", "noise" or "x0".
        samples: the number of noisy states at each time.
        generator: the generator of data and noise.
        progress: whether to show progress, or a function that wraps the iterable of chunks.

    Raises:
        ValueError: if the data are empty or not finite, a time is outside [0, T] or without noise,
            or the units are unknown.
        TypeError: if a part has the wrong type.

    Source: Xu et al., Stable Target Field for Reduced Variance Score Estimation in Diffusion
    Models, 2023, arXiv 2302.00670 (equation 4).

    >>> import torch
    >>> from diffusionkit import VESDE
    >>> from diffusionkit.diagnostics import dsm_variance
    >>> data, t = torch.tensor([[-1.0], [1.0]]), torch.tensor([1.0])
    >>> found = dsm_variance(VESDE(), data, t)
    >>> # at high noise, the variance of the data
    >>> bool(0.999 < found.value * found.noise**4 <= 1)
    True
    """
    check_choice("units", units, get_args(Units))
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
    r"""Estimate the variance of the stable target given the noisy state.

    .. math::
        V_{STF}(t; n) = E_x \, E \left[\| T - E[x_0 | x] \|^2\right], \quad
        T = \frac{\sum_j w_j x_j}{\sum_j w_j}

    over reference batches x_1..x_n with one datum, the source of x, drawn from the posterior and
    the others drawn independently from the data. T is unbiased for every n, and its exact mean
    E[x_0 | x] is used. With n = 1 this is V_DSM. For the units see `dsm_variance`.

    Args:
        sde: the forward process.
        data: the data set, as in `dsm_variance`.
        t: the times (K,).
        n: the size of the reference batch, including the source.
        units: the target: "score", "noise" or "x0".
        samples: the number of noisy states at each time.
        draws: the number of reference batches for each noisy state.
        generator: the generator of data, noise and references.
        progress: whether to show progress, or a function that wraps the iterable of chunks.

    Raises:
        ValueError: if a count is not positive, and as `dsm_variance` does.
        TypeError: if a part has the wrong type.

    Source: Xu et al., Stable Target Field for Reduced Variance Score Estimation in Diffusion
    Models, 2023, arXiv 2302.00670 (section 4).
    """
    check_choice("units", units, get_args(Units))
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
    r"""Estimate the divergence of the posterior of the data from the data distribution.

    .. math::
        D(t) = E_x \sum_k w_k f\!\left(\frac{1}{N w_k}\right), \quad
        f(y) = \begin{cases} (1/y - 1)^2 & y < 3/2 \\ 8 y / 27 - 1/3 & y \ge 3/2 \end{cases}

    bounds the variance of the stable target,
    V_STF <= (V_DSM + sqrt(3) d sqrt(D) / sigma^2) / (n - 1) + O(1 / n^2). The summand is
    heavy-tailed: where the posterior is narrow, a few noisy states dominate, and the standard
    error is too small. The total variation, half the sum of ``|w_k - 1/N|``, shows the same
    phases of the process and is at most 1.

    Args:
        sde: the forward process.
        data: the data set, as in `dsm_variance`.
        t: the times (K,).
        kind: "f" for D(t), "tv" for the total variation.
        samples: the number of noisy states at each time.
        generator: the generator of data and noise.
        progress: whether to show progress, or a function that wraps the iterable of chunks.

    Raises:
        ValueError: if the kind is unknown, and as `dsm_variance` does.
        TypeError: if a part has the wrong type.

    Source: Xu et al., Stable Target Field for Reduced Variance Score Estimation in Diffusion
    Models, 2023, arXiv 2302.00670 (theorem 2).
    """
    kinds: dict[str, tuple[_Statistic, str]] = {
        "f": (_f_divergence, "f-divergence"),
        "tv": (_total_variation, "total variation"),
    }
    check_choice("kind", kind, tuple(kinds))
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

    Each state needs memory for `width` rows of the data and for its N weights.
    """
    check_count(samples, "samples", least=2)
    check_generator(generator)
    rows = exact(as_tensor(data)).flatten(1)
    rows = rows - rows.mean(0)  # all results are the same, and data far from zero keep their digits
    alpha, sigma = kernel(sde, t)
    size = max(1, _NUMBERS // max(len(rows), width * rows.shape[1]))
    halves = rows.square().sum(1) / 2
    values = torch.zeros(len(t), samples, dtype=torch.float64)
    steps = [(i, start) for i in range(len(t)) for start in range(0, samples, size)]
    for i, start in with_progress(steps, progress):
        a, s = float(alpha[i]), float(sigma[i])
        x0 = draw_rows(rows, (min(size, samples - start),), generator)
        eps = randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x = a * x0 + s * eps
        # The terms of -|x - a x_k|^2 / (2 s^2) that depend on k.
        weights = torch.log_softmax(a * (x @ rows.T - a * halves) / s**2, 1)
        values[i, start : start + size] = statistic(weights, rows).cpu()
    factor = torch.ones_like(alpha)
    if units in ("noise", "score"):
        factor = (alpha / sigma).square() / (sigma.square() if units == "score" else 1.0)
    mean, error = mean_and_error(values)
    quantity = "divergence" if units is None else f"variance ({units})"
    return Estimate(t, sigma / alpha, mean * factor, error * factor, quantity, label)


def _spread(log: Tensor, rows: Tensor) -> Tensor:
    """Return the variance of the data under weights exp(log) (C, N), (C,).

    Computed around the most likely point, whose term vanishes. Where one weight is 1 up to
    rounding, this keeps its digits, and E|x|^2 - |E x|^2 would not.
    """
    best = log.argmax(1, keepdim=True)
    weights = log.exp()
    center, norms = rows[best.squeeze(1)], rows.square().sum(1)
    squares = norms + norms[best] - 2 * center @ rows.T
    others, shift = weights.scatter(1, best, 0.0), weights @ rows - center
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
    ratio = log + math.log(n)  # log(posterior / data distribution) = -log(y)
    near = weights * torch.expm1(ratio).square()
    return torch.where(ratio > math.log(2 / 3), near, 8 / (27 * n) - weights / 3).sum(1)


def _total_variation(log: Tensor, rows: Tensor) -> Tensor:
    return torch.expm1(log + math.log(log.shape[1])).abs().mean(1) / 2
