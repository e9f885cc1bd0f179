r"""The whole contract: seven interfaces, and the distribution of training times.

B is the batch and D the shape of one sample, of any rank. Every public time is a tensor (B,).
Randomness is explicit: `generator` is a torch.Generator, a sequence of B of them (then a sample
does not depend on its batch, up to the network's own rounding), or None for torch's global state.
Users' code always gets tensors (B,) for times, alpha and sigma.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ._batch_times import kernel_at
from ._checks import check_floating_dtype, check_shape, check_state, check_times, check_transition
from ._coefficients import linear, noised
from ._gaussian import normal_log_prob
from ._grid_times import kernel_tensors
from ._nfe import counts
from ._precision import at_least_float32, narrowed, state_dtype
from ._repr import described
from ._returned import (
    check_log_prob,
    check_times_and_weights,
    check_weights,
    per_time,
    wrap,
)
from ._schedules import bisect, drift_and_diffusion, exact, home, schedule_dtype
from .random import Generators, given_noise, randn, randn_like
from .values import Perturbed, Prediction, Step

_PER_TIME = {
    "marginal": per_time("alpha", "sigma"),
    "transition": per_time("scale", "std"),
    "drift_coefficient": per_time("drift_coefficient"),
    "diffusion": per_time("diffusion"),
    "log_snr": per_time("log_snr"),
    "time_at_log_snr": per_time("time_at_log_snr"),
}


class ForwardSDE(abc.ABC):
    r"""A linear SDE dx = f(t) x dt + g(t) dw on [0, T] with scalar coefficients.

    Its perturbation kernel p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I) determines everything:

    .. math::
        f = \frac{d \log \alpha}{dt}, \quad g^2 = \frac{d \sigma^2}{dt} - 2 f \sigma^2, \quad
        \mathrm{log\,snr} = \log \frac{\alpha^2}{\sigma^2}.

    A subclass defines `marginal`; the rest follows by automatic differentiation and bisection, and
    may be overridden with closed forms. `diffusionkit.testing.check_sde` reports inconsistencies.

    Attributes:
        T: the largest time, where hardly any signal is left.
        t_min: the smallest time for training and likelihood.
        t_stop: the time at which samplers stop by default.
        prior_std: the standard deviation of the prior, the distribution of x_T.
        grid_rho: times of samplers are equally spaced in t^(1 / grid_rho) by default.
    """

    T: float = 1.0
    t_min: float = 1e-5
    grid_rho: float = 1.0

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the shapes of everything that a process returns for times (B,)."""
        super().__init_subclass__(**kwargs)
        for name, check in _PER_TIME.items():
            wrap(cls, name, check)
        wrap(cls, "prior_log_prob", check_log_prob)

    @property
    def t_stop(self) -> float:
        """The time at which samplers stop by default: t_min, unless overridden."""
        return self.t_min

    @property
    def prior_std(self) -> float:
        """The standard deviation of the prior: sigma(T), unless overridden."""
        here = home(self)
        last = torch.tensor([self.T], dtype=schedule_dtype(here), device=here)
        return float(self.marginal(last)[1].detach())

    @abc.abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha(t) and sigma(t), each (B,), in the dtype of the times t (B,).

        This is the definition of the process. Code that uses a process with a state calls
        `perturbation_kernel`, which validates its arguments and keeps full precision.
        """

    def perturbation_kernel(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each (B,), in float64, for a state x (B, *D) at times t (B,).

        Raises:
            ValueError: if shapes or devices differ, or a time is outside [0, T].
            TypeError: if x or t is not a floating-point tensor.
        """
        return kernel_tensors(self, x, t)

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
        scale = torch.where(s == t, torch.ones_like(gain), alpha_t / alpha_s)  # 0 / 0
        return scale, sigma_t * torch.sqrt(-torch.expm1(gain))

    def perturb(
        self, x0: Tensor, t: Tensor, *, eps: Tensor | None = None, generator: Generators = None
    ) -> Perturbed:
        """Return x = alpha x0 + sigma eps for data x0 (B, *D) at times t (B,), eps drawn or given.

        Data in half precision are widened to float32: the noise near t = 0 is below their rounding.

        Raises:
            ValueError: if shapes or devices differ, or a time is outside [0, T].
            TypeError: if x0 or t is not a floating-point tensor.
        """
        check_state(x0, "x0")
        check_times(t, self.T, x0.shape[0], x0)
        if eps is not None:
            eps = at_least_float32(given_noise(x0, eps))
        x0 = x0 if x0.dtype.itemsize >= 4 else x0.float()
        eps = randn_like(x0, generator) if eps is None else eps
        alpha, sigma = kernel_at(self, t)
        x, alpha, sigma = noised(alpha, x0, sigma, eps)
        return Perturbed(x0, eps, x, t, alpha, sigma)

    def prior_sample(
        self,
        shape: Sequence[int],
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw a state at T, N(0, prior_std^2 I), of a shape (B, *D).

        Raises:
            ValueError: if dtype is float16 and a number overflows it (read on the CPU only).
        """
        check_floating_dtype(dtype)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        wide = state_dtype(dtype)
        z = randn(check_shape(shape), generator=generator, device=device, dtype=wide)
        return narrowed(z * self.prior_std, dtype, "prior", "use float32 or bfloat16")

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of the prior at x (B, *D), in nats, (B,), at least in float32."""
        check_state(x)
        return normal_log_prob(x, self.prior_std)


class ScoreModel(nn.Module, abc.ABC):
    """A model of the score of p_t, which owns its process: one source of truth.

    Attributes:
        sde: the forward process.
    """

    sde: ForwardSDE

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Count evaluations: a sampler's `nfe`."""
        super().__init_subclass__(**kwargs)
        counts(cls, _check_prediction)

    @abc.abstractmethod
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        """Predict the data and the noise in a state x (B, *D) at times t (B,).

        The prediction is in the dtype of the state, at least float32. Conditions may have any name:
        declare x and t as positional-only. A tensor (B, ...) has one condition for each sample. A
        tensor (1, ...), with two dimensions or more, is expanded to (B, ...) before it arrives
        here, and so are class_labels () or (1,).
        """

    @override
    def __repr__(self) -> str:
        return described(self)

    @override
    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        """Return the score, the gradient of log p_t at x, (B, *D)."""
        return self.predict(x, t, **cond).score


class Weighting(abc.ABC):
    """The weight of the noise-prediction error ||eps_hat - eps||^2 at each time.

    It may be infinite where a model's error vanishes, as at alpha = 0: objectives weight the error
    of the model's own output.
    """

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the shape of the weights."""
        super().__init_subclass__(**kwargs)
        wrap(cls, "__call__", check_weights)

    @abc.abstractmethod
    def __call__(self, sde: ForwardSDE, t: Tensor) -> Tensor:
        """Return the weights (B,) at times t (B,)."""


class TargetEstimator(abc.ABC):
    """The regression target."""

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the shapes of the target."""
        super().__init_subclass__(**kwargs)
        wrap(cls, "__call__", _check_target)

    @abc.abstractmethod
    def __call__(
        self, sample: Perturbed, reference: Tensor | None = None, /, **cond: Any
    ) -> Prediction:
        """Return the target for noisy data; some targets use reference data (n, *D)."""


class TimeSampler(abc.ABC):
    """The distribution of training times.

    Attributes:
        unbiased: whether E[weight h(t)] is the mean of h over [t_min, T]. A distribution that is
            part of the objective, such as EDM's log-normal, returns weights of one instead.
    """

    unbiased: bool = True

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the shapes of times and weights."""
        super().__init_subclass__(**kwargs)
        wrap(cls, "sample", check_times_and_weights)

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
        """Adapt to the losses (n,) at times (n,)."""


class Predictor(abc.ABC):
    """A step from time t to an earlier time s, on any grid."""

    @abc.abstractmethod
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any = None,
        /,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        """Take a state x (B, *D) from times t (B,) to s (B,), s < t.

        `state` is `Step.state` of this predictor's previous step, None in the first. Noise comes
        from `diffusionkit.random.step_noise`, which follows a Brownian path if there is one.
        """

    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:  # noqa: B027
        """Precompute values that depend on the times only; samplers call this before a run."""

    def default_grid(self, sde: ForwardSDE, steps: int) -> Tensor | None:
        """Return the times (steps + 1,) of a run without a grid; None for those of the process."""
        return None


class Corrector(abc.ABC):
    """A Markov chain step at a fixed time t, which leaves the distribution p_t unchanged."""

    @abc.abstractmethod
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
        """Update a state x (B, *D) at times t (B,)."""


class Constraint(abc.ABC):
    """Known information about the data, imposed on a noisy state."""

    @abc.abstractmethod
    def __call__(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, *, generator: Generators = None
    ) -> Tensor:
        """Return a state x (B, *D) whose known part is drawn from p(x_t | x_0).

        Args:
            x: the state (B, *D).
            alpha: the scale of the data (B,); 1 for the data themselves.
            sigma: the standard deviation of the noise (B,). Where all are 0, for a mean or for
                data, no noise is drawn.
            generator: the source of randomness.
        """


def _check_prediction(prediction: Any, args: tuple[Any, ...], cond: dict[str, Any]) -> None:
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"{type(args[0]).__name__}: expected a Prediction, got {type(prediction).__name__}"
        )
    shape = (args[1] if len(args) > 1 else cond["x"]).shape
    if prediction._x.shape != shape:
        raise ValueError(
            f"{type(args[0]).__name__}: expected a prediction of shape {tuple(shape)}, "
            f"got {tuple(prediction.x.shape)}"
        )


def _check_target(part: object, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not isinstance(target, Prediction):
        raise TypeError(
            f"{type(part).__name__}: expected a Prediction, got {type(target).__name__}"
        )
    sample: Perturbed = args[0] if args else kwargs["sample"]
    if target._x.shape != sample.x.shape:
        raise ValueError(
            f"{type(part).__name__}: expected a target of the shape of x, "
            f"{tuple(sample.x.shape)}, got {tuple(target.x.shape)}"
        )


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
