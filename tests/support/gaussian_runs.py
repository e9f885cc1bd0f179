"""Runs on Gaussian data, where steps are linear and the distribution is known at every time."""

import math

import torch

from diffusionkit import ForwardSDE, GaussianMixtureModel, PCSampler, Predictor

from . import f64
from .noise import GivenNoise

MEAN, STD = 0.7, 0.4


def gaussian(sde: ForwardSDE) -> GaussianMixtureModel:
    return GaussianMixtureModel(sde, [[MEAN]], [STD])


def marginal(sde: ForwardSDE, t: torch.Tensor) -> torch.Tensor:
    """Return the mean and standard deviation at a time (1,), (2,)."""
    alpha, sigma = sde.marginal(t)
    return torch.cat([alpha * MEAN, torch.hypot(alpha * STD, sigma)])


def distribution_after(sde: ForwardSDE, predictor: Predictor, times: torch.Tensor) -> torch.Tensor:
    """Return the mean and standard deviation (2,) at the last time, of a run from p_T.

    The state and the noise enter a step linearly: each step is taken from the states 0 and 1, and
    from 0 with noise 1.
    """
    n = len(times) - 1
    x, z = (f64(*v).repeat_interleave(n).unsqueeze(1) for v in ((0, 1, 0), (0, 0, 1)))
    t, s = times[:-1].repeat(3), times[1:].repeat(3)
    steps = predictor.step(gaussian(sde), x, t, s, generator=GivenNoise(z)).x.view(3, n)
    mean, std = marginal(sde, times[:1]).tolist()
    for offset, at_one, noisy in zip(*steps.tolist(), strict=True):
        slope = at_one - offset
        mean, std = offset + slope * mean, math.hypot(slope * std, noisy - offset)
    return f64(mean, std)


def error_after(sde: ForwardSDE, predictor: Predictor, times: torch.Tensor) -> float:
    """Return the error of the distribution at the last time."""
    found = distribution_after(sde, predictor, times)
    return float((found - marginal(sde, times[-1:])).abs().max())


def flow_error(sde: ForwardSDE, predictor: Predictor, steps: int) -> float:
    """Return the error after a segment of the flow, which keeps the number of deviations."""
    times = sde.time_at_log_snr(torch.linspace(-3.0, 6.0, steps + 1, dtype=torch.float64))
    (first_mean, first_std), (mean, std) = (marginal(sde, t) for t in (times[:1], times[-1:]))
    sampler = PCSampler(gaussian(sde), predictor, grid=times, denoise=False)
    x = sampler((first_mean + 1.5 * first_std).view(1, 1))
    return abs(float(x - mean - 1.5 * std))


def moments_after(
    sde: ForwardSDE, predictor: Predictor, times: torch.Tensor
) -> tuple[float, float]:
    """Return the mean and standard deviation at the last time, of a sampler's run from p_T.

    The rows of the batch are the run of the mean without noise, and with one deviation at the start
    or in one of the steps, which enter linearly, whatever the predictor remembers.
    """
    n = len(times) - 1
    mean, std = marginal(sde, times[:1])
    start = mean.expand(n + 2, 1).clone()
    start[1] += std
    noise = torch.eye(n + 2, dtype=torch.float64)[1:]
    sampler = PCSampler(gaussian(sde), predictor, grid=times, denoise=False)
    x = sampler(start, generator=GivenNoise(noise.__getitem__, n + 2))
    return float(x[0]), float((x[1:] - x[0]).square().sum().sqrt())


def moments_error(sde: ForwardSDE, predictor: Predictor, times: torch.Tensor) -> float:
    """Return the error of the mean and standard deviation after a sampler's run, as a fraction."""
    found, exact = moments_after(sde, predictor, times), marginal(sde, times[-1:]).tolist()
    return max(abs(a - b) for a, b in zip(found, exact, strict=True)) / exact[1]
