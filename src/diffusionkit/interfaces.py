r"""The whole contract: seven interfaces, and the times a loss is taken at.

B is the batch and D the shape of one sample, of any rank. Every public time is a tensor (B,).
Randomness is explicit: `generator` is a torch.Generator, a sequence of B of them (then a sample
does not depend on the batch it is drawn in, as far as the network's own arithmetic does not), or
None for torch's global state.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_shape, check_state, check_times, check_transition
from ._gaussian import normal_log_prob
from ._grid_times import instant
from ._nfe import counted
from ._schedules import bisect, drift_and_diffusion, exact, home
from .random import Generators, randn, randn_like
from .values import Coefficient, Perturbed, Prediction, Step, linear


class ForwardSDE(abc.ABC):
    r"""A linear SDE dx = f(t) x dt + g(t) dw on [0, T] with scalar coefficients.

    Its kernel p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I) determines everything:

    .. math::
        f = \frac{d \log \alpha}{dt}, \quad g^2 = \frac{d \sigma^2}{dt} - 2 f \sigma^2, \quad
        \mathrm{log\,snr} = \log \frac{\alpha^2}{\sigma^2}.

    A subclass writes `marginal`; the rest follows by automatic differentiation and bisection,
    and may be overridden by closed forms. `diffusionkit.testing.check_sde` says what does not
    fit together.

    Attributes:
        T: the last time, where the data are forgotten.
        t_min: the smallest time for training and likelihood.
        t_stop: the time at which samplers stop by default.
        prior_std: the standard deviation of the prior, the law of x_T.
    """

    T: float = 1.0
    t_min: float = 1e-5

    @property
    def t_stop(self) -> float:
        """The time at which samplers stop by default: t_min, unless overridden."""
        return self.t_min

    @property
    def prior_std(self) -> float:
        """The standard deviation of the prior: sigma(T), unless overridden."""
        last = torch.tensor([self.T], dtype=torch.float64, device=home(self))
        return float(self.marginal(last)[1].detach())

    @abc.abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha(t) and sigma(t), each (B,), for times t (B,), in the dtype of t."""

    def kernel(self, t: Tensor) -> tuple[Coefficient, Coefficient]:
        """Return alpha and sigma in float64, as floats where a sampler has tabulated them."""
        known = instant(t, self)
        return (known.alpha, known.sigma) if known else self.marginal(exact(t))

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """Return f(t) = d log alpha / dt, (B,)."""
        return drift_and_diffusion(self.marginal, t, self.T)[0]

    def diffusion(self, t: Tensor) -> Tensor:
        """Return g(t), (B,)."""
        return drift_and_diffusion(self.marginal, t, self.T)[1]

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Return f(t) x, (B, *D), for a state x (B, *D) at times t (B,)."""
        check_state(x)
        check_times(t, self.T, x.shape[0], x)
        f = self.drift_coefficient(exact(t))
        return linear(f, x, 0.0, x)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), (B,), decreasing in t."""
        alpha, sigma = self.marginal(t)
        return 2 * (torch.log(alpha) - torch.log(sigma))

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time (B,) of a log-SNR (B,), within [0, T]."""
        return bisect(self.log_snr, log_snr, self.T)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return scale and std, each (B,), of p(x_t | x_s) = N(scale x_s, std^2 I), s <= t.

        .. math::
            \mathrm{scale} = \alpha_t / \alpha_s, \quad \mathrm{std}^2 = -\sigma_t^2\,
            \mathrm{expm1}(\mathrm{log\,snr}_t - \mathrm{log\,snr}_s).
        """
        check_transition(s, t, self.T)
        (alpha_s, _), (alpha_t, sigma_t) = self.marginal(s), self.marginal(t)
        gain = self.log_snr(t) - self.log_snr(s)
        gain = torch.where(s == t, torch.zeros_like(gain), gain)  # inf - inf at s = t = 0
        return alpha_t / alpha_s, sigma_t * torch.sqrt(-torch.expm1(gain))

    def perturb(self, x0: Tensor, t: Tensor, *, generator: Generators = None) -> Perturbed:
        """Draw x = alpha x0 + sigma eps for data x0 (B, *D) at times t (B,).

        Raises:
            ValueError: if shapes or devices differ, or a time lies outside [0, T].
            TypeError: if x0 or t is not a floating-point tensor.
        """
        check_state(x0, "x0")
        check_times(t, self.T, x0.shape[0], x0)
        eps = randn_like(x0, generator)
        alpha, sigma = self.marginal(exact(t))
        x = linear(alpha, x0, sigma, eps)
        target = Prediction.from_eps(x, eps, alpha, sigma)
        return Perturbed(x0=x0, eps=eps, x=x, t=t, alpha=target.alpha, sigma=target.sigma)

    def prior_sample(
        self,
        shape: Sequence[int],
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw a state at T, N(0, prior_std^2 I), of a shape (B, *D)."""
        z = randn(check_shape(shape), generator=generator, device=device, dtype=dtype)
        return z * self.prior_std

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of the prior at x (B, *D), in nats, (B,)."""
        check_state(x)
        return normal_log_prob(x, self.prior_std)


class ScoreModel(nn.Module, abc.ABC):
    """A model of the score of p_t. It owns its process: one source of truth.

    Attributes:
        sde: the forward process.
    """

    sde: ForwardSDE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Count the evaluations of every model, so that samplers can tell their number."""
        super().__init_subclass__(**kwargs)
        if "predict" in cls.__dict__:
            cls.predict = counted(cls.predict)  # type: ignore[method-assign]

    @abc.abstractmethod
    def predict(self, x: Tensor, t: Tensor, **cond: Any) -> Prediction:
        """Predict data and noise of a state x (B, *D) at times t (B,)."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the score, the gradient of log p_t at x, (B, *D)."""
        return self.predict(x, t, **cond).score


class Weighting(abc.ABC):
    """The weight of the noise-prediction error ||eps_hat - eps||^2 at each time."""

    @abc.abstractmethod
    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return the weights (B,) at times t (B,)."""


class TargetEstimator(abc.ABC):
    """What a model is regressed on."""

    @abc.abstractmethod
    def __call__(
        self, sample: Perturbed, reference: Tensor | None = None, **cond: Any
    ) -> Prediction:
        """Return the target for noisy data, given reference data (n, *D) if it uses any."""


class TimeSampler(abc.ABC):
    """The law of the times a loss is taken at.

    Attributes:
        unbiased: whether E[weight h(t)] is the mean of h over [t_min, T]; a law that defines the
            objective by itself, as EDM's log-normal, returns weights of one instead.
    """

    unbiased: bool = True

    @abc.abstractmethod
    def sample(
        self,
        sde: ForwardSDE,
        n: int,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw times (n,) and weights (n,), E[weight h(t)] = mean of h over [t_min, T]."""

    def update(self, t: Tensor, loss: Tensor) -> None:  # noqa: B027 - adaptive samplers override
        """Learn from the losses (n,) found at times (n,)."""


class Predictor(abc.ABC):
    """A move from time t to an earlier time s, on any grid."""

    @abc.abstractmethod
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any = None,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        """Move a state x (B, *D) from times t (B,) to s (B,), s < t.

        `state` is what this predictor returned in its last Step, None at the first.
        """

    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:  # noqa: B027
        """Precompute what depends on the times alone; samplers call it before the first step."""


class Corrector(abc.ABC):
    """A move that leaves the time, and the law p_t, where they are."""

    @abc.abstractmethod
    def step(
        self, model: ScoreModel, x: Tensor, t: Tensor, *, generator: Generators = None, **cond: Any
    ) -> Step:
        """Move a state x (B, *D) at times t (B,)."""


class Constraint(abc.ABC):
    """What is known of the data, and how a state is made to agree with it at any noise."""

    @abc.abstractmethod
    def __call__(
        self, x: Tensor, alpha: Coefficient, sigma: Coefficient, *, generator: Generators = None
    ) -> Tensor:
        """Return a state x (B, *D) with its known part drawn anew from p(x_t | x_0).

        At sigma = 0 nothing is drawn: a mean gets its alpha, data get alpha = 1.
        """


__all__ = [
    "Constraint",
    "Corrector",
    "ForwardSDE",
    "Generators",
    "Perturbed",
    "Prediction",
    "Predictor",
    "ScoreModel",
    "Step",
    "TargetEstimator",
    "TimeSampler",
    "Weighting",
]
