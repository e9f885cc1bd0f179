"""`check_sde` reports what is inconsistent, and nothing else."""

import pytest
import torch
from support.user_processes import PROCESSES, Cosine, class_name

from diffusionkit import (
    VPSDE,
)
from diffusionkit.testing import InconsistentError, check_sde


@pytest.mark.parametrize("sde", PROCESSES, ids=class_name)
def test_consistent_processes_pass(sde) -> None:
    report = check_sde(sde)
    assert report.ok
    assert report.problems == ()
    assert str(report) == f"{type(sde).__name__}: 8 checks, no problems"


class WrongStart(Cosine):
    def marginal(self, t):
        alpha, sigma = super().marginal(t)
        return 0.5 * alpha, sigma


class LogSNRIncreases(Cosine):
    def marginal(self, t):
        return torch.ones_like(t), 0.01 + torch.sin(3 * t)


class ShrinksTooFast(Cosine):
    """log-SNR falls, but at a point d sigma^2/dt - 2 f sigma^2 is 0."""

    def marginal(self, t):
        return torch.ones_like(t), 0.1 + (t - 0.5).clamp_min(0)


class LacksAFactor(VPSDE):
    """The derivative of sigma without its 1/2, and g^2 from it: samples never converge."""

    def diffusion(self, t):
        alpha, sigma = self.marginal(t)
        f = self.drift_coefficient(t)
        slope = -2 * f * alpha**2 / sigma
        return (2 * sigma * slope - 2 * f * sigma**2).sqrt()


class OneValue(Cosine):
    def marginal(self, t):
        return (torch.cos(t),)


class WrongShape(Cosine):
    def marginal(self, t):
        if t.ndim > 2:  # a bisection with these shapes would run out of memory
            raise MemoryError
        alpha, sigma = super().marginal(t)
        return alpha[:, None], sigma[:, None]


class WrongDtype(Cosine):
    def marginal(self, t):
        alpha, sigma = super().marginal(t)
        return alpha.float(), sigma.float()


class NegativeNoise(Cosine):
    def marginal(self, t):
        alpha, sigma = super().marginal(t)
        return alpha, -sigma


class NotANumber(Cosine):
    def marginal(self, t):
        return torch.cos(t), torch.log(t - 0.5)


class WrongTimes(Cosine):
    t_min = 2.0


class StopsTooEarly(Cosine):
    t_stop = 1e-9


class WrongDrift(VPSDE):
    def drift_coefficient(self, t):
        return -self.beta(t)  # without the half


class WrongDriftShape(VPSDE):
    def drift(self, x, t):
        return self.drift_coefficient(t)


class WrongDiffusion(VPSDE):
    def diffusion(self, t):
        return self.beta(t)  # g^2 instead of g


class WrongLogSNR(VPSDE):
    def log_snr(self, t):
        return 0.5 * super().log_snr(t)

    def time_at_log_snr(self, log_snr):
        return super().time_at_log_snr(2 * log_snr)


class WrongInverse(VPSDE):
    def time_at_log_snr(self, log_snr):
        return 1.001 * super().time_at_log_snr(log_snr)


class WrongTransition(VPSDE):
    def transition(self, s, t):
        scale, std = super().transition(s, t)
        return scale, std**2


class WrongScale(VPSDE):
    def transition(self, s, t):
        scale, std = super().transition(s, t)
        return 1 / scale, std


class NoIdentity(VPSDE):
    def transition(self, s, t):
        scale, std = super().transition(s, t)
        return scale, std + 1e-4


class WrongPerturb(VPSDE):
    def perturb(self, x0, t, *, generator=None):
        sample = super().perturb(x0, t, generator=generator)
        object.__setattr__(sample, "x", sample.x * 1.01)
        return sample


class WrongPriorStd(VPSDE):
    prior_std = 50.0


class WrongPriorSample(VPSDE):
    def prior_sample(self, shape, **options):
        return 2 * super().prior_sample(shape, **options)


class WrongPriorLogProb(VPSDE):
    def prior_log_prob(self, x):
        return super().prior_log_prob(x) / x.shape[1]  # per dimension


class Raises(VPSDE):
    def log_snr(self, t):
        raise RuntimeError("not today")


BROKEN_SDES = [
    (WrongStart(), "marginal: expected alpha(0) = 1, the data themselves, got 0.5"),
    (LogSNRIncreases(), "marginal: expected log-SNR to decrease in t, but it does not near t = "),
    (ShrinksTooFast(), "drift and diffusion: d sigma^2/dt - 2 f sigma^2 is not positive near t = "),
    (
        OneValue(),
        "OneValue: expected a tuple of alpha and sigma, got tuple of 1",
    ),
    (
        WrongShape(),
        "WrongShape: expected alpha as a tensor of the shape of t, (33,)",
    ),
    (WrongDtype(), "expected shape (33,) and torch.float64, got (33,) and torch.float32"),
    (NegativeNoise(), "marginal: sigma: expected finite positive values on [t_min, T], got sigma("),
    (NotANumber(), "marginal: sigma: expected finite positive values on [t_min, T], got sigma("),
    (WrongTimes(), "end points: expected 0 < t_min < T, got t_min = 2.0 and T = 0.99"),
    (StopsTooEarly(), "end points: expected t_min <= t_stop < T, got t_stop = 1e-09"),
    (WrongDrift(), "drift and diffusion: f is not d log(alpha)/dt: got "),
    (WrongDriftShape(), "drift and diffusion: drift(x, t) is not f(t) x of shape (B, *D), got"),
    (WrongDiffusion(), "drift and diffusion: g^2 is not d sigma^2/dt - 2 f sigma^2: got"),
    (LacksAFactor(), "drift and diffusion: g^2 is not d sigma^2/dt - 2 f sigma^2: got"),
    (WrongLogSNR(), "log snr: log_snr is not log(alpha^2 / sigma^2): got"),
    (WrongInverse(), "log snr: time_at_log_snr does not invert log_snr: got"),
    (WrongTransition(), "transition: scale^2 sigma_s^2 + std^2 is not sigma_t^2: got"),
    (WrongTransition(), "transition: variances of s to t and s to m to t do not compose: got"),
    (WrongScale(), "transition: the scale is not alpha_t / alpha_s: got"),
    (NoIdentity(), "transition: the transition from t to t is not the identity"),
    (WrongPerturb(), "perturb: x is not alpha x0 + sigma eps"),
    (WrongPriorStd(), "prior: expected a prior_std near sigma(T) = 0.999978, got 50"),
    (WrongPriorSample(), "prior: prior_sample: expected standard deviation 1, got"),
    (WrongPriorLogProb(), "prior: prior_log_prob is not that of N(0, prior_std^2 I): got"),
    (Raises(), "log snr: raised RuntimeError: not today"),
]


@pytest.mark.parametrize(("sde", "problem"), BROKEN_SDES, ids=class_name)
def test_inconsistent_processes_are_reported(sde, problem) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_sde(sde)
    report = caught.value.report
    assert not report.ok
    assert any(problem in found for found in report.problems), str(report)
    assert all(found in str(caught.value) for found in report.problems)
    assert str(caught.value).startswith(f"{type(sde).__name__}: {len(report.problems)} problem")


@pytest.mark.parametrize(
    ("sde", "count"),
    [(WrongDrift(), 1), (WrongDiffusion(), 1), (WrongInverse(), 1),
     (WrongPerturb(), 1), (WrongPriorLogProb(), 1), (StopsTooEarly(), 1)],
    ids=class_name,
)  # fmt: skip
def test_no_other_problem_is_reported(sde, count) -> None:
    with pytest.raises(InconsistentError) as caught:
        check_sde(sde)
    assert len(caught.value.report.problems) == count


def test_bisection_raises_if_log_snr_changes_the_shape() -> None:
    """The inverse calls log_snr eighty times; its values must not grow."""
    with pytest.raises(InconsistentError) as caught:
        check_sde(WrongShape())
    assert "MemoryError" not in str(caught.value)
    with pytest.raises(ValueError, match=r"expected alpha .* \(3,\), got \(3, 1\)"):
        WrongShape().time_at_log_snr(torch.zeros(3))


def test_all_problems_are_listed_together() -> None:
    class Inconsistent(VPSDE):
        prior_std = 50.0

        def diffusion(self, t):
            return self.beta(t)

        def time_at_log_snr(self, log_snr):
            return 1.001 * super().time_at_log_snr(log_snr)

    with pytest.raises(InconsistentError, match=r"g\^2 is not(.|\n)*does not invert(.|\n)*prior"):
        check_sde(Inconsistent())
