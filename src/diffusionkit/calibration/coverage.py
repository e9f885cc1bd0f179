"""Expected coverage of posteriors, by distances to random points (TARP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_device, check_finite, check_known, check_state
from ..random import Generators, rand
from ._cases import checked, weighted
from ._uniform import uniform_p_value
from .ranks import ranks_of, uniform_numbers

_NAMES = ("samples", "truth")


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedCoverage:
    """The share of cases whose truth is inside credible regions of given probabilities.

    The tensors are in float64 on the CPU.

    Args:
        levels: the credibility levels (K,).
        coverage: the shares of cases (K,), equal to the levels for exact posteriors.
        stderr: the standard errors of the shares (K,).
        p_value: the p-value of the Kolmogorov-Smirnov test that the coverage is right.
        credibility: the level (n,) of the region that has each truth on its surface.
    """

    levels: Tensor
    coverage: Tensor
    stderr: Tensor
    p_value: float
    credibility: Tensor


def expected_coverage(
    samples: Tensor,
    truth: Tensor,
    *,
    references: Tensor | None = None,
    levels: Tensor | None = None,
    generator: Generators = None,
) -> ExpectedCoverage:
    r"""Estimate the coverage of credible regions around random points: TARP.

    In each case the region of level c is the ball around a reference point that contains the share
    c of the posterior. With r the number of the m samples that are closer to the reference than the
    truth is,

    .. math::
        u = \frac{r + \mathrm{uniform}(0, 1)}{m + 1}, \quad
        \mathrm{coverage}(c) = P(u < c) = c

    for an exact posterior, at every m and level. Its standard error over cases is
    sqrt(coverage (1 - coverage) / n), which a bootstrap over the cases repeats. Coverage above the
    levels at small ones and below at large ones shows posteriors that are too narrow, the reverse
    posteriors that are too wide. No density is evaluated, and all parameters are tested together.

    Reference points may depend on the truth only through the data: coverage is right for all of
    them if and only if the posteriors are. The default points detect a wrong width; with them
    shifts average out, and posteriors that ignore the data, such as the prior, pass. A point far
    from all truths detects a shift along its direction, as do ranks, and points computed from the
    data, such as an estimate of the parameters, detect whether the data are used.

    Coordinates are standardized by mean and deviation of the truths before distances are taken.

    Args:
        samples: the samples (n, m, *D), independent within each posterior.
        truth: the parameters (n, *D) that the data were simulated with, n >= 2.
        references: the reference points (n, *D), by default uniform in the box that contains the
            truths.
        levels: the credibility levels (K,) within [0, 1], by default 0, .05, ..., 1.
        generator: the source of randomness: one, one for each case, or None.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or levels are outside [0, 1].
        TypeError: if an argument has the wrong type.

    Source: Lemos et al., Sampling-Based Accuracy Testing of Posterior Estimators for General
    Inference, 2023, arXiv 2302.03026.

    >>> import torch
    >>> from diffusionkit.calibration import expected_coverage
    >>> generator = torch.Generator().manual_seed(0)
    >>> draws = torch.randn(500, 20, 2, generator=generator)
    >>> samples, truth = draws[:, 1:], draws[:, 0]
    >>> exact = expected_coverage(samples, truth, generator=generator)
    >>> narrow = expected_coverage(
    ...     0.5 * samples, truth, generator=generator
    ... )
    >>> exact.p_value > 0.01, narrow.p_value > 0.01
    (True, False)
    """
    samples, truth = checked(samples, truth, names=_NAMES)
    _, samples, truth = weighted(None, samples, truth, _NAMES)
    n, m = samples.shape[:2]
    if n < 2:
        raise ValueError(f"truth: expected at least two cases, got {n}")
    if levels is None:
        levels = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    check_state(levels, "levels")
    check_known(levels, "levels")
    levels = levels.cpu().double()
    check_finite(levels, "levels")
    if levels.ndim != 1 or bool(((levels < 0) | (levels > 1)).any()):
        raise ValueError(
            f"levels: expected shape (K,) and values within [0, 1], got shape "
            f"{tuple(levels.shape)} and {levels.flatten()[:4].tolist()}"
        )
    x, y = samples.reshape(n, m, -1), truth.reshape(n, -1)
    mean, std = y.mean(0), y.std(0)
    std = torch.where(std > 0, std, 1.0)
    x, y = (x - mean) / std, (y - mean) / std
    if references is None:
        low, high = y.aminmax(dim=0)
        u = rand(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        center = low + (high - low) * u
    else:
        check_state(references, "references")
        check_device(references, truth, "references", "truth")
        check_finite(references, "references")
        if references.shape != truth.shape:
            raise ValueError(
                f"references: expected the shape of truth, {tuple(truth.shape)}, "
                f"got {tuple(references.shape)}"
            )
        center = (references.to(y.dtype).reshape(n, -1) - mean) / std
    distance = torch.linalg.vector_norm(x - center.unsqueeze(1), dim=2)
    of_truth = torch.linalg.vector_norm(y - center, dim=1)
    u = uniform_numbers(ranks_of(distance, of_truth, generator), m, generator)
    coverage = (u.unsqueeze(1) < levels).double().mean(0)
    stderr = (coverage * (1 - coverage) / n).sqrt()
    return ExpectedCoverage(levels, coverage, stderr, float(uniform_p_value(u)), u)
