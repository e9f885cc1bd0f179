"""Correctors: Markov chains that leave the distribution p_t unchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_count, check_positive
from .._coefficients import add_noise, expand
from .._grid_times import kernel
from .._keywords import explained
from .._precision import at_least_float32
from ..interfaces import Corrector, ScoreModel, Step
from ..random import Generators, randn_like

# The dimension at which the step size follows the norm of the score halfway, see `Langevin`.
_HALFWAY = 64


@explained
@dataclass(frozen=True)
class Langevin(Corrector):
    r"""Langevin dynamics with the step size set by a signal-to-noise ratio.

    .. math::
        x \leftarrow x + \varepsilon s + \sqrt{2 \varepsilon}\, z, \quad
        \varepsilon = 2\, (\mathrm{snr}\, \sigma)^2
        \left(\frac{d}{\|\sigma s\|^2}\right)^w, \quad
        w = \frac{d^2}{d^2 + 64^2}, \quad s = \nabla \log p_t(x)

    for samples of d numbers. At image sizes w is 1 and this is the paper's rule, 2 (snr ||z|| /
    ||s||)^2: the score term of a step is snr times as long as the noise. A step size that depends
    on x changes the distribution that the steps preserve, to p_t(x) ||s||^(2w) here. In many
    dimensions ||s|| hardly varies; in two, that adds 40% to a standard deviation even for a
    Gaussian, and long steps where the score is almost zero add more. So w tends to 0 in few
    dimensions, where the step size depends on sigma only, as in `AnnealedLangevin`: w / d is at
    most 1 / 128. The paper's additional factor 1 - beta_k (VP) tends to 1 as the steps shrink, and
    is 1 here.

    Args:
        snr: the ratio. The paper uses .16 at CIFAR-10, .17 at CelebA 64, .075 at LSUN and
            256 px, .15 at 1024 px.
        steps: the number of steps at each time.
        norm: "sample" uses the norm of each sample's score, as above; "batch" the paper's rule
            with means of both norms over the batch, as in its released code: samples then depend
            on their batch.

    Raises:
        ValueError: unless snr > 0, steps >= 1, and norm is "sample" or "batch".

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (algorithms 4 and 5).
    """

    snr: float = 0.16
    steps: int = 1
    norm: str = "sample"

    def __post_init__(self) -> None:
        check_positive(self.snr, "snr")
        check_count(self.steps, "steps")
        check_choice("norm", self.norm, ("sample", "batch"))

    @override
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        /,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        _, sigma = kernel(model.sde, x, t)
        mean = x = at_least_float32(x)
        for _ in range(self.steps):
            # In terms of eps = -sigma s, which most models predict directly.
            prediction = model.predict(x, t, **cond)
            eps = prediction.eps
            noise = randn_like(x, generator)
            push = self._step_size(eps, noise)
            pull, unit = push * push, sigma
            if isinstance(unit, Tensor):
                factor = expand(unit, x)
                push, pull, unit = push * factor, pull * factor, 1.0
            mean = _moved(x, pull, eps, -2 * self.snr**2 * unit)
            x = add_noise(mean, push, noise, 2 * self.snr * unit)
        return Step(x, mean, prediction=prediction)

    def _step_size(self, eps: Tensor, noise: Tensor) -> Tensor:
        """Return sqrt(varepsilon / 2) / (snr sigma), (B, 1, ..., 1)."""
        if self.norm == "batch":
            ratio = _norm(noise).mean() / _norm(eps).mean()
        else:
            d = eps[0].numel()
            ratio = (math.sqrt(d) / _norm(eps)) ** (d**2 / (d**2 + _HALFWAY**2))
        # A score of 0 sets no step size: the state does not change.
        return torch.nan_to_num(ratio, posinf=0.0)


def _norm(x: Tensor) -> Tensor:
    """Return the norm of each sample (B, 1, ..., 1), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.ndim == 1:
        return x.abs().to(dtype)
    dims = tuple(range(1, x.ndim))
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    return norm


def _moved(x: Tensor, factor: Tensor, along: Tensor, value: float) -> Tensor:
    """Return x + value * factor * along, in the dtype of x."""
    if factor.dtype == x.dtype:
        return torch.addcmul(x, factor, along, value=value)
    return (x + value * factor * along).to(x.dtype)


@explained
@dataclass(frozen=True)
class AnnealedLangevin(Corrector):
    r"""Langevin dynamics with a step size proportional to the variance of the noise.

    .. math::
        \varepsilon = 2 (\mathrm{snr}\, \sigma)^2, \quad
        x \leftarrow x + \varepsilon s + \sqrt{2 \varepsilon}\, z

    Args:
        snr: the ratio of the step to sigma.
        steps: the number of steps at each time.

    Raises:
        ValueError: unless snr > 0 and steps >= 1.

    Source: Song and Ermon, Generative Modeling by Estimating Gradients of the Data
    Distribution, 2019, arXiv 1907.05600; Song et al., 2021, arXiv 2011.13456.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        check_positive(self.snr, "snr")
        check_count(self.steps, "steps")

    @override
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        /,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        alpha, sigma = kernel(model.sde, x, t)
        pull, mean = 2 * self.snr**2, x
        for _ in range(self.steps):
            prediction = model.predict(x, t, **cond)
            mean = prediction.combine(x=1 - pull, x0=pull * alpha)
            x = add_noise(mean, 2 * self.snr * sigma, randn_like(mean, generator))
        return Step(x, mean, prediction=prediction)
