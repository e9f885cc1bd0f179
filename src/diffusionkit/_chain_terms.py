"""Terms of the variational bound of discrete chains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ._checks import readable
from ._coefficients import expand
from ._gaussian import gaussian_kl
from ._kept import Kept
from ._masks import count, total, zeroed
from ._model_checks import check_model
from ._schedules import exact
from .decoders import GaussianDecoder
from .interfaces import ForwardSDE, ScoreModel
from .values import Prediction


def prior_kl(sde: ForwardSDE, x: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return KL(N(alpha_T x, sigma_T^2 I) || N(0, prior_std^2 I)) in nats, (B,).

    .. math::
        \tfrac12 \sum (r + \alpha^2 x^2 / \pi^2 - 1 - \log r), \quad r = \sigma^2 / \pi^2

    Args:
        sde: the process.
        x: the data (B, *D), 0 where a mask is 0.
        mask: the elements of the sum (B, *D), or None for all.
    """
    alpha, sigma = sde.marginal(exact(x.new_full((len(x),), sde.T)))
    squares = exact(x).reshape(len(x), -1).square()
    ratio = (sigma / sde.prior_std).square()
    shift = (alpha / sde.prior_std).square() * squares.sum(1)
    return 0.5 * (count(x, mask) * (ratio - 1 - torch.log(ratio)) + shift)


def chain_length(model: ScoreModel) -> int:
    """Return the number of steps of a model's process, or raise unless it is a chain."""
    check_model(model)
    steps = getattr(model.sde, "steps", None)
    if not isinstance(steps, int):
        raise TypeError(
            "model.sde: expected a chain of steps, such as DDPMChain, "
            f"got {type(model.sde).__name__}"
        )
    return steps


def step_log_variances(sde: ForwardSDE, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return log v_posterior and log v_forward, each (B,), of the steps from t to s.

    .. math::
        v_{forward} = \mathrm{std}^2, \quad
        v_{posterior} = \mathrm{std}^2 \sigma_s^2 / \sigma_t^2

    with the std of p(x_t | x_s). At s = 0 the posterior variance is zero; it is replaced by that
    of the step from 2t to t, the second step of a chain.
    """
    ends = s == 0
    later, earlier = torch.where(ends, 2 * t, t), torch.where(ends, t, s)
    std = sde.transition(earlier, later)[1]
    spread = sde.marginal(earlier)[1] / sde.marginal(later)[1]
    return 2 * torch.log(std * spread), 2 * torch.log(sde.transition(s, t)[1])


def error_scale(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return sqrt(alpha^2 + sigma^2) / sigma, times which errors of the data vary little in time.

    They are those of the noise where there is little of it, and those of the data where there is
    much.
    """
    return torch.hypot(alpha, sigma) / sigma


def error_factor(model: ScoreModel, step: Tensor) -> Tensor:
    r"""Return the factors (n,) of squared errors of the data in the terms of steps (n,).

    .. math::
        KL = \frac{w^2}{2 v} \|\hat x_0 - x_0\|^2 + const,

    divided by the squares of `error_scale`, with the weight w of the data in the posterior mean and
    the variance v of the model's step, that of the posterior if it is learned. 0 for step 0.
    """
    sde, length = model.sde, chain_length(model)
    i = exact(step.to(torch.float32))
    s, t = i / length, (i + 1) / length
    alpha, sigma = sde.marginal(t)
    weight = sde.marginal(s)[0] * (sde.transition(s, t)[1] / sigma).square()
    lower, upper = step_log_variances(sde, s, t)
    log_var = upper if getattr(model, "variance", None) == "fixed_large" else lower
    factor = 0.5 * (weight / error_scale(alpha, sigma)).square() * torch.exp(-log_var)
    return torch.where(step > 0, factor, 0.0)


def step_nats(
    model: ScoreModel,
    prediction: Prediction,
    x0: Tensor,
    step: Tensor,
    decoder: GaussianDecoder,
    *,
    detach_mean: bool = False,
    clip: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Return the terms of the variational bound that belong to the given steps, in nats, (B,).

    .. math::
        KL(q(x_{i} | x_{i+1}, x_0) \,\|\, p(x_{i} | x_{i+1})), \quad i > 0; \qquad
        -\log p(x_0 | x_1), \quad i = 0

    Args:
        model: the score model of a chain.
        prediction: its prediction for the states x_{i+1} at the ends of the steps.
        x0: the data (B, *D), on the decoder's levels.
        step: the steps i (B,), counted from 0.
        decoder: the likelihood of the data in step 0.
        detach_mean: whether only the variance receives gradients.
        clip: whether the predicted data are clipped to the decoder's range.
        mask: weights of the elements (B, *D), or None.
    """
    weight, lower, upper = _step_values(model.sde, chain_length(model), step)
    dtype = torch.promote_types(x0.dtype, torch.float32)
    x0, mean = x0.to(dtype), prediction.x0.to(dtype)
    mean = mean.clamp(decoder.low, decoder.high) if clip else mean
    mean = mean.detach() if detach_mean else mean

    if getattr(model, "variance", None) == "fixed_large":
        log_var = torch.where(step == 0, lower, upper)
    else:
        log_var = lower
    lower, upper, log_var = (cast(Tensor, expand(c, mean)) for c in (lower, upper, log_var))
    if prediction.log_var is not None:
        log_var = prediction.log_var.to(dtype)
    elif prediction.log_var_fraction is not None:
        log_var = lower + prediction.log_var_fraction.to(dtype) * (upper - lower)
    difference = (x0 - mean) * expand(weight, x0)
    divergence = _sums(gaussian_kl(difference, lower, log_var), mask)
    first = step == 0
    if not readable(first):
        return torch.where(first, -_sums(decoder.log_prob(x0, mean, log_var), mask), divergence)
    # Probabilities of levels cost many times what a divergence does, and few steps are the first.
    rows = first.nonzero().flatten()
    if not len(rows):
        return divergence
    log_var = log_var.expand_as(x0)
    log_prob = decoder.log_prob(*(v[rows] for v in (x0, mean, log_var)))
    log_prob = _sums(log_prob, None if mask is None else mask[rows])
    return divergence.index_copy(0, rows, -log_prob)


def _sums(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums over the elements of each sample (B,), weighted by a mask."""
    return total(values if mask is None else zeroed(values * mask, mask))


def _step_values(sde: ForwardSDE, length: int, step: Tensor) -> Sequence[Tensor]:
    """Return values of the steps (B,): the weight of x0 in the posterior mean, and log-variances.

    Those of a chain are tabulated once.
    """
    tables: Kept[Tensor] | None = getattr(sde, "tables", None)
    if tables is None or torch.compiler.is_compiling():
        return _evaluated(sde, exact(step.to(torch.float32)), length)
    place = step.device

    def table() -> Tensor:
        steps = torch.arange(length, device=place)
        return torch.stack([*_evaluated(sde, exact(steps.to(torch.float32)), length)])

    return tables.get(("step values", place), table)[:, step].unbind(0)


def _evaluated(sde: ForwardSDE, i: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    s, t = i / length, (i + 1) / length
    # Both posterior means contain the same multiple of x_{i+1}, and none of it in step 0.
    weight = sde.marginal(s)[0] * (sde.transition(s, t)[1] / sde.marginal(t)[1]).square()
    return weight, *step_log_variances(sde, s, t)
