"""Consistency checks of a score model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_flag, check_part, check_shape
from .._coefficients import expand
from .._grid_times import grid_times
from .._loops import evaluation_mode
from .._precision import network_dtype, state_dtype
from .._schedules import exact
from ..interfaces import ForwardSDE, Prediction, ScoreModel
from .report import Check, Report, run_checks


def check_score_model(
    model: ScoreModel, shape: Sequence[int], /, *, exact: bool = False, **cond: Any
) -> Report:
    """Check a score model against its interface and for consistency.

    Checks types and shapes, x = alpha x0 + sigma eps, score = -eps / sigma, the independence of
    the samples of a batch, repeatability, gradients, the direction of the score at T, and the
    model at a sampler's times.

    Args:
        model: the score model.
        shape: the shape (B, *D) of a state.
        exact: whether the score is exact, hence the gradient of a log-density with a symmetric
            Jacobian. That of a trained network is symmetric only approximately.
        cond: passed to the model.

    Returns:
        The report, if there are no problems.

    Raises:
        InconsistentError: with all problems; a ValueError.
        TypeError: if model is not a ScoreModel.

    >>> from diffusionkit import VPSDE, GaussianMixtureModel
    >>> from diffusionkit.testing import check_score_model
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> print(check_score_model(model, (4, 1), exact=True))
    GaussianMixtureModel: 7 checks, no problems
    """
    check_part(model, ScoreModel, "model")
    if not isinstance(getattr(model, "sde", None), ForwardSDE):
        raise TypeError("model.sde: expected a ForwardSDE: a score model owns its process")
    sizes = check_shape(shape)
    check_flag(exact, "exact")
    somewhere = next(model.parameters(), next(model.buffers(), torch.zeros(())))
    generator = torch.Generator().manual_seed(0)
    sde = model.sde
    u = torch.linspace(0, 1, sizes[0], dtype=torch.float64)
    ends = sde.log_snr(torch.tensor([sde.t_min, sde.T], dtype=torch.float64))
    t = sde.time_at_log_snr(ends[0] + (0.1 + 0.8 * u) * (ends[1] - ends[0]))
    alpha, sigma = sde.marginal(t)
    z = torch.randn(sizes, generator=generator, dtype=torch.float64)
    z = z * expand((alpha**2 + sigma**2).sqrt(), z)
    own = network_dtype(model) if next(model.parameters(), None) is not None else None
    dtype = state_dtype(own)
    x, t = z.to(somewhere.device, dtype), t.to(somewhere.device)
    checks: list[Check] = [
        _prediction,
        _samples_apart,
        _repeatable,
        _gradient,
        _direction,
        _at_a_samplers_time,
    ]
    if exact:
        checks.append(_symmetric)
    with evaluation_mode(model):
        return run_checks(type(model).__name__, checks, model, x, t, cond)


Cond = dict[str, Any]


def _prediction(model: ScoreModel, x: Tensor, t: Tensor, cond: Cond) -> Iterator[str]:
    with torch.no_grad():
        prediction: Any = model.predict(x, t, **cond)
        if not isinstance(prediction, Prediction):
            yield f"expected predict to return a Prediction, got {type(prediction).__name__}"
            return
        for name in ("x0", "eps", "score"):
            value = getattr(prediction, name)
            if value.shape != x.shape or value.dtype != x.dtype:
                yield (
                    f"{name}: expected shape {tuple(x.shape)} and {x.dtype}, "
                    f"got {tuple(value.shape)} and {value.dtype}"
                )
                return
            if not bool(torch.isfinite(value).all()):
                yield f"{name}: expected finite values, got {int((~value.isfinite()).sum())} others"
                return
        alpha, sigma = (expand(c, x) for c in model.sde.marginal(exact(t)))
        scale = x.abs().max() + (alpha * prediction.x0).abs().max()
        if float((alpha * prediction.x0 + sigma * prediction.eps - x).abs().max() / scale) > 1e-4:
            yield "x0 and eps do not satisfy x = alpha x0 + sigma eps"
        score = model(x, t, **cond)
        if not torch.allclose(score * sigma, -prediction.eps, rtol=1e-3, atol=1e-4):
            yield "the score is not -eps / sigma"


def _samples_apart(model: ScoreModel, x: Tensor, t: Tensor, cond: Cond) -> Iterator[str]:
    with torch.no_grad():
        whole = model.predict(x, t, **cond).eps
        # The last sample alone, with its conditions.
        mine = {
            k: v[-1:] if isinstance(v, Tensor) and v.shape[:1] == t.shape else v
            for k, v in cond.items()
        }
        alone = model.predict(x[-1:], t[-1:], **mine).eps
    if not torch.allclose(whole[-1:], alone, rtol=1e-3, atol=1e-3):
        yield "a sample's prediction depends on the other samples of its batch, or on their times"


def _repeatable(model: ScoreModel, x: Tensor, t: Tensor, cond: Cond) -> Iterator[str]:
    with torch.no_grad():
        first, second = (model.predict(x, t, **cond).eps for _ in range(2))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        yield "in evaluation mode two predictions of the same state differ"


def _gradient(model: ScoreModel, x: Tensor, t: Tensor, cond: Cond) -> Iterator[str]:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        x0 = model.predict(x, t, **cond).x0
        if not x0.requires_grad:
            yield "the prediction is not differentiable in x: likelihoods and guidance need it"


def _direction(model: ScoreModel, x: Tensor, t: Tensor, cond: Cond) -> Iterator[str]:
    sde = model.sde
    with torch.no_grad():
        end = torch.full_like(t, sde.T)
        z = sde.prior_sample(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        z = z.to(x.device)
        score = model(z, end, **cond)
        share = -float((score * z).sum() / z.square().sum()) * sde.prior_std**2
    # 1 where the score is right, -1 where its sign is wrong, about 0 for an untrained network.
    if share < -0.5:
        yield (
            "at T the score points away from the data: along -x it is "
            f"{share:.2f} times the prior's; is its sign reversed?"
        )


def _at_a_samplers_time(model: ScoreModel, x: Tensor, t: Tensor, cond: Cond) -> Iterator[str]:
    (shared,) = grid_times(model.sde, t[len(t) // 2 :][:1].double(), x)
    with torch.no_grad():
        on_grid = model.predict(x, shared, **cond).eps
        plain = model.predict(x, shared.clone(), **cond).eps
    if not torch.allclose(on_grid, plain, rtol=1e-3, atol=1e-3):
        yield (
            "the prediction at a sampler's time differs from that at an equal tensor of times: is "
            "parameterization an elementwise function of alpha and sigma?"
        )


def _symmetric(model: ScoreModel, x: Tensor, t: Tensor, cond: Cond) -> Iterator[str]:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for _ in "uv")
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        eps = model.predict(x, t, **cond).eps
        (left,) = torch.autograd.grad(eps, x, u, retain_graph=True)
        (right,) = torch.autograd.grad(eps, x, v)
    dims = tuple(range(1, x.ndim))
    one, two = (left * v).sum(dims), (right * u).sum(dims)
    size = left.norm() * v.norm() / len(x) + 1e-12
    if float((one - two).abs().max() / size) > 1e-3:
        yield "the Jacobian of the score is not symmetric: it is not the gradient of a log-density"
