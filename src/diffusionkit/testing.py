"""Checks for people who write their own process or score model: what does not fit, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_part, check_shape
from ._schedules import drift_and_diffusion, exact
from .interfaces import ForwardSDE, Prediction, ScoreModel
from .values import expand

__all__ = ["InconsistentError", "Report", "check_score_model", "check_sde"]


class InconsistentError(ValueError):
    """A part contradicts itself or its interface; the text lists how."""

    def __init__(self, report: Report) -> None:
        """Keep the report."""
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Report:
    """What was checked and what was found.

    Args:
        subject: the part that was checked.
        checks: the names of the checks that were made.
        problems: what does not fit, one sentence each; empty when all is well.
    """

    subject: str
    checks: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def __str__(self) -> str:
        if self.ok:
            return f"{self.subject}: {len(self.checks)} checks, no problems"
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        return f"{self.subject}: {len(self.problems)} {noun}{lines}"


Check = Callable[..., Iterator[str]]


def _run(subject: str, checks: Sequence[Check], *arguments: Any) -> Report:
    problems: list[str] = []
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            problems += [f"{name}: {problem}" for problem in check(*arguments)]
        # The part under test is somebody's own: whatever it raises is a finding.
        except Exception as error:
            problems.append(f"{name}: raised {type(error).__name__}: {error}")
    report = Report(subject, tuple(c.__name__.strip("_") for c in checks), tuple(problems))
    if not report.ok:
        raise InconsistentError(report)
    return report


def _differ(got: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """Return where two tensors (n,) differ most, or None if they agree."""
    scale = expected.abs().max().clamp_min(1e-300)
    error = (got - expected).abs() / (expected.abs() + 1e-6 * scale)
    error = torch.where(torch.isfinite(got), error, torch.inf)
    worst = int(error.argmax())
    if float(error[worst]) <= tolerance:
        return None
    return (
        f"got {float(got[worst]):.6g}, expected {float(expected[worst]):.6g}, "
        f"relative error {float(error[worst]):.1e}"
    )


def check_sde(sde: ForwardSDE) -> Report:
    """Check that a forward SDE fits its interface and itself.

    Looks at the end points, the shapes, the monotony of the log-SNR, drift and diffusion
    against alpha and sigma, the inverse of the log-SNR, the composition of transitions, the
    perturbation and the prior.

    Args:
        sde: the process.

    Returns:
        The report, when nothing is wrong.

    Raises:
        InconsistentError: listing everything that is wrong; a ValueError.
        TypeError: if sde is not a ForwardSDE.

    >>> from diffusionkit import VPSDE
    >>> print(check_sde(VPSDE()))
    VPSDE: 7 checks, no problems
    """
    check_part(sde, ForwardSDE, "sde")
    checks = (
        _end_points,
        _marginal,
        _drift_and_diffusion,
        _log_snr,
        _transition,
        _perturb,
        _prior,
    )
    with torch.no_grad():
        return _run(type(sde).__name__, checks, sde)


def _times(sde: ForwardSDE, n: int = 33) -> Tensor:
    """Return increasing times (n,) from t_min to T, dense near t_min."""
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    t = sde.t_min * (sde.T / sde.t_min) ** u
    t[-1] = sde.T
    return t


def _end_points(sde: ForwardSDE) -> Iterator[str]:
    if not 0 < sde.t_min < sde.T:
        yield f"expected 0 < t_min < T, got t_min = {sde.t_min} and T = {sde.T}"
    if not sde.t_min <= sde.t_stop < sde.T:
        yield f"expected t_min <= t_stop < T, got t_stop = {sde.t_stop}"


def _marginal(sde: ForwardSDE) -> Iterator[str]:
    for dtype in (torch.float32, torch.float64):
        t = _times(sde).to(dtype)
        values: tuple[Tensor, ...] = sde.marginal(t)
        if len(values) != 2:
            yield f"expected alpha and sigma, got {len(values)} values"
            return
        for name, value in zip(("alpha", "sigma"), values, strict=True):
            if value.shape != t.shape or value.dtype != dtype:
                yield (
                    f"{name}: expected shape {tuple(t.shape)} and {dtype}, "
                    f"got {tuple(value.shape)} and {value.dtype}"
                )
                return
            if not bool(torch.isfinite(value).all() and (value > 0).all()):
                bad = int((~(torch.isfinite(value) & (value > 0))).nonzero()[0])
                yield (
                    f"{name}: expected finite positive values on [t_min, T], "
                    f"got {name}({float(t[bad]):.4g}) = {float(value[bad]):.4g}"
                )
                return
    alpha, sigma = sde.marginal(torch.zeros(1, dtype=torch.float64))
    # A process that starts with noise, as VDM's do, may have scaled the data by as little.
    if not abs(float(alpha) - 1) < max(1e-6, float(sigma) ** 2):
        yield f"expected alpha(0) = 1, the data themselves, got {float(alpha):.6g}"
    if not 0 <= float(sigma) < float(sde.marginal(_times(sde))[1][-1]):
        yield f"expected 0 <= sigma(0) < sigma(T), got sigma(0) = {float(sigma):.6g}"
    alpha, sigma = sde.marginal(_times(sde))
    ratio = sigma / alpha
    if not bool((ratio.diff() > 0).all()):
        where = float(_times(sde)[int(ratio.diff().argmin())])
        yield f"expected log-SNR to decrease in t, it does not near t = {where:.4g}"


def _drift_and_diffusion(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde)
    # Inside each half of a piecewise schedule, not on its joints.
    t = (0.49 * t[:-1] + 0.51 * t[1:]).contiguous()
    f, g = drift_and_diffusion(sde.marginal, t, sde.T)
    if problem := _differ(sde.drift_coefficient(t), f, 1e-5):
        yield f"f is not d log(alpha)/dt: {problem}"
    if bool((g <= 0).any()):
        where = float(t[int(g.argmin())])
        yield f"d sigma^2/dt - 2 f sigma^2 is not positive near t = {where:.4g}: no SDE has it"
    elif problem := _differ(sde.diffusion(t).square(), g.square(), 1e-5):
        yield f"g^2 is not d sigma^2/dt - 2 f sigma^2: {problem}"
    x = torch.ones(len(t), 2, dtype=torch.float64)
    drift = sde.drift(x, t)
    if drift.shape != x.shape or _differ(drift[:, 1], sde.drift_coefficient(t), 1e-9):
        yield f"drift(x, t) is not f(t) x of shape (B, *D), got shape {tuple(drift.shape)}"


def _log_snr(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde)
    alpha, sigma = sde.marginal(t)
    if problem := _differ(sde.log_snr(t), 2 * torch.log(alpha / sigma), 1e-6):
        yield f"log_snr is not log(alpha^2 / sigma^2): {problem}"
    if problem := _differ(sde.time_at_log_snr(sde.log_snr(t)), t, 1e-6):
        yield f"time_at_log_snr does not invert log_snr: {problem}"


def _transition(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde)
    s, m, t = t[:-2], t[1:-1], t[2:]
    (alpha_s, sigma_s), (alpha_t, sigma_t) = sde.marginal(s), sde.marginal(t)
    scale, std = sde.transition(s, t)
    if problem := _differ(scale, alpha_t / alpha_s, 1e-6):
        yield f"the scale is not alpha_t / alpha_s: {problem}"
    if problem := _differ(scale**2 * sigma_s**2 + std**2, sigma_t**2, 1e-6):
        yield f"scale^2 sigma_s^2 + std^2 is not sigma_t^2: {problem}"
    (first, std_first), (second, std_second) = sde.transition(s, m), sde.transition(m, t)
    if problem := _differ(first * second, scale, 1e-6):
        yield f"scales of s to t and s to m to t do not agree: {problem}"
    if problem := _differ(second**2 * std_first**2 + std_second**2, std**2, 1e-6):
        yield f"variances of s to t and s to m to t do not compose: {problem}"
    if bool((sde.transition(t, t)[1].abs() > 1e-6 * sigma_t).any()):
        yield "the transition from t to t is not the identity"


def _perturb(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde, 5)
    x0 = torch.linspace(-1, 1, 5 * 6, dtype=torch.float64).view(5, 2, 3)
    sample = sde.perturb(x0, t, generator=torch.Generator().manual_seed(0))
    if sample.x.shape != x0.shape or sample.alpha.shape != t.shape:
        yield f"expected x of shape {tuple(x0.shape)}, got {tuple(sample.x.shape)}"
        return
    alpha, sigma = (expand(c, x0) for c in sde.marginal(t))
    if _differ(sample.x.flatten(), (alpha * x0 + sigma * sample.eps).flatten(), 1e-6):
        yield "x is not alpha x0 + sigma eps"


def _prior(sde: ForwardSDE) -> Iterator[str]:
    sigma = float(sde.marginal(torch.tensor([sde.T], dtype=torch.float64))[1])
    if not 0.9 < sde.prior_std / sigma < 1.1:
        yield f"expected a prior_std near sigma(T) = {sigma:.6g}, got {sde.prior_std:.6g}"
    z = sde.prior_sample((4000, 2), generator=torch.Generator().manual_seed(0))
    if z.shape != (4000, 2) or not 0.95 < float(z.std()) / sde.prior_std < 1.05:
        yield f"prior_sample: expected standard deviation {sde.prior_std:.6g}, got {z.std():.6g}"
    x = torch.tensor([[0.3, -0.7]], dtype=torch.float64) * sde.prior_std
    normal = torch.distributions.Normal(0.0, sde.prior_std)
    density = normal.log_prob(x).sum(1)  # type: ignore[no-untyped-call]
    if problem := _differ(sde.prior_log_prob(x), density, 1e-6):
        yield f"prior_log_prob is not that of N(0, prior_std^2 I): {problem}"


def check_score_model(
    model: ScoreModel, shape: Sequence[int], *, exact: bool = False, **cond: Any
) -> Report:
    """Check that a score model fits its interface and itself.

    Looks at types and shapes, x = alpha x0 + sigma eps, score = -eps / sigma, the independence
    of the samples of a batch, repeatability, gradients, and the direction of the score at T.

    Args:
        model: the score model.
        shape: the shape (B, *D) of a state.
        exact: whether the score is meant to be exact, and so the gradient of a log-density: its
            Jacobian must then be symmetric. A trained network's is so only roughly.
        cond: handed to the model.

    Returns:
        The report, when nothing is wrong.

    Raises:
        InconsistentError: listing everything that is wrong; a ValueError.
        TypeError: if model is not a ScoreModel.

    >>> from diffusionkit import GaussianMixtureModel, VPSDE
    >>> model = GaussianMixtureModel(VPSDE(), means=[[-2.0], [2.0]], stds=[0.5, 0.5])
    >>> print(check_score_model(model, (4, 1), exact=True))
    GaussianMixtureModel: 6 checks, no problems
    """
    check_part(model, ScoreModel, "model")
    if not isinstance(getattr(model, "sde", None), ForwardSDE):
        raise TypeError("model.sde: expected a ForwardSDE: a score model owns its process")
    sizes = check_shape(shape)
    somewhere = next(model.parameters(), next(model.buffers(), torch.zeros(())))
    generator = torch.Generator().manual_seed(0)
    sde = model.sde
    u = torch.linspace(0, 1, sizes[0], dtype=torch.float64)
    ends = sde.log_snr(torch.tensor([sde.t_min, sde.T], dtype=torch.float64))
    t = sde.time_at_log_snr(ends[0] + (0.1 + 0.8 * u) * (ends[1] - ends[0]))
    alpha, sigma = sde.marginal(t)
    z = torch.randn(sizes, generator=generator, dtype=torch.float64)
    z = z * expand((alpha**2 + sigma**2).sqrt(), z)
    dtype = somewhere.dtype if next(model.parameters(), None) is not None else torch.float32
    x, t = z.to(somewhere.device, dtype), t.to(somewhere.device)
    checks: list[Check] = [_prediction, _samples_apart, _repeatable, _gradient, _direction]
    if exact:
        checks.append(_symmetric)
    modes = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return _run(type(model).__name__, checks, model, x, t, cond)
    finally:
        for module in modes:
            module.training = True


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
        # The last sample alone, with what belongs to it.
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
            f"{share:.2f} times what the prior's would be; is its sign reversed?"
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
        yield "the Jacobian of the score is not symmetric: it is the gradient of no log-density"
