"""Consistency checks of a forward process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import check_part
from .._coefficients import expand
from .._grid_times import grid_times
from .._schedules import drift_and_diffusion
from ..interfaces import ForwardSDE
from .report import Report, largest_difference, run_checks


def check_sde(sde: ForwardSDE) -> Report:
    """Check a forward SDE against its interface and for consistency.

    Checks the end points, shapes, the monotonicity of the log-SNR, drift and diffusion against
    alpha and sigma, the inverse of the log-SNR, the composition of transitions, the perturbation,
    the prior, and the process at a sampler's times.

    Args:
        sde: the process.

    Returns:
        The report, if there are no problems.

    Raises:
        InconsistentError: with all problems; a ValueError.
        TypeError: if sde is not a ForwardSDE.

    >>> from diffusionkit import VPSDE
    >>> from diffusionkit.testing import check_sde
    >>> print(check_sde(VPSDE()))
    VPSDE: 8 checks, no problems
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
        _on_a_grid,
    )
    with torch.no_grad():
        return run_checks(type(sde).__name__, checks, sde)


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
            fine = torch.isfinite(value) & (value > 0)
            if name == "alpha":  # no signal may be left at T
                fine[-1] |= value[-1] == 0
            if not bool(fine.all()):
                bad = int((~fine).nonzero()[0])
                yield (
                    f"{name}: expected finite positive values on [t_min, T], "
                    f"got {name}({float(t[bad]):.4g}) = {float(value[bad]):.4g}"
                )
                return
    alpha, sigma = sde.marginal(torch.zeros(1, dtype=torch.float64))
    # A process with noise at time 0, such as VDM's, may scale the data there too.
    if not abs(float(alpha) - 1) < max(1e-6, float(sigma) ** 2):
        yield f"expected alpha(0) = 1, the data themselves, got {float(alpha):.6g}"
    if not 0 <= float(sigma) < float(sde.marginal(_times(sde))[1][-1]):
        yield f"expected 0 <= sigma(0) < sigma(T), got sigma(0) = {float(sigma):.6g}"
    alpha, sigma = sde.marginal(_times(sde))
    ratio = sigma / alpha
    if not bool((ratio.diff() > 0).all()):
        where = float(_times(sde)[int(ratio.diff().argmin())])
        yield f"expected log-SNR to decrease in t, but it does not near t = {where:.4g}"


def _drift_and_diffusion(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde)
    # Away from the knots of a piecewise schedule.
    t = (0.49 * t[:-1] + 0.51 * t[1:]).contiguous()
    f, g = drift_and_diffusion(sde.marginal, t, sde.T)
    if problem := largest_difference(sde.drift_coefficient(t), f, 1e-5):
        yield f"f is not d log(alpha)/dt: {problem}"
    if bool((g <= 0).any()):
        where = float(t[int(g.argmin())])
        yield f"d sigma^2/dt - 2 f sigma^2 is not positive near t = {where:.4g}: not an SDE"
    elif problem := largest_difference(sde.diffusion(t).square(), g.square(), 1e-5):
        yield f"g^2 is not d sigma^2/dt - 2 f sigma^2: {problem}"
    x = torch.ones(len(t), 2, dtype=torch.float64)
    drift = sde.drift(x, t)
    if drift.shape != x.shape or largest_difference(drift[:, 1], sde.drift_coefficient(t), 1e-9):
        yield f"drift(x, t) is not f(t) x of shape (B, *D), got shape {tuple(drift.shape)}"


def _log_snr(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde)
    alpha, sigma = sde.marginal(t)
    if problem := largest_difference(sde.log_snr(t), 2 * torch.log(alpha / sigma), 1e-6):
        yield f"log_snr is not log(alpha^2 / sigma^2): {problem}"
    if problem := largest_difference(sde.time_at_log_snr(sde.log_snr(t)), t, 1e-6):
        yield f"time_at_log_snr does not invert log_snr: {problem}"


def _transition(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde)
    s, m, t = t[:-2], t[1:-1], t[2:]
    (alpha_s, sigma_s), (alpha_t, sigma_t) = sde.marginal(s), sde.marginal(t)
    scale, std = sde.transition(s, t)
    if problem := largest_difference(scale, alpha_t / alpha_s, 1e-6):
        yield f"the scale is not alpha_t / alpha_s: {problem}"
    if problem := largest_difference(scale**2 * sigma_s**2 + std**2, sigma_t**2, 1e-6):
        yield f"scale^2 sigma_s^2 + std^2 is not sigma_t^2: {problem}"
    (first, std_first), (second, std_second) = sde.transition(s, m), sde.transition(m, t)
    if problem := largest_difference(first * second, scale, 1e-6):
        yield f"scales of s to t and s to m to t differ: {problem}"
    if problem := largest_difference(second**2 * std_first**2 + std_second**2, std**2, 1e-6):
        yield f"variances of s to t and s to m to t do not compose: {problem}"
    scale, std = sde.transition(t, t)
    if bool(((scale - 1).abs() > 1e-6).any() or (std.abs() > 1e-6 * sigma_t).any()):
        yield "the transition from t to t is not the identity"


def _perturb(sde: ForwardSDE) -> Iterator[str]:
    t = _times(sde, 5)
    x0 = torch.linspace(-1, 1, 5 * 6, dtype=torch.float64).view(5, 2, 3)
    sample = sde.perturb(x0, t, generator=torch.Generator().manual_seed(0))
    if sample.x.shape != x0.shape or sample.alpha.shape != t.shape:
        yield f"expected x of shape {tuple(x0.shape)}, got {tuple(sample.x.shape)}"
        return
    alpha, sigma = (expand(c, x0) for c in sde.marginal(t))
    if largest_difference(sample.x.flatten(), (alpha * x0 + sigma * sample.eps).flatten(), 1e-6):
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
    if problem := largest_difference(sde.prior_log_prob(x), density, 1e-6):
        yield f"prior_log_prob is not that of N(0, prior_std^2 I): {problem}"


def _on_a_grid(sde: ForwardSDE) -> Iterator[str]:
    grid = _times(sde, 5).flip(0)
    x = torch.ones(3, 2)
    for t, time in zip(grid_times(sde, grid, x), grid, strict=True):
        for name, got, expected in zip(
            ("alpha", "sigma"), sde.perturbation_kernel(x, t), sde.marginal(time[None]), strict=True
        ):
            if problem := largest_difference(got, expected.expand_as(got), 1e-9):
                yield f"{name} of a batch at a sampler's time is not that of one sample: {problem}"
                return
