"""The frozen values that parts pass to one another: Perturbed, Prediction, Step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from typing_extensions import override

from ._checks import readable
from ._coefficients import Coefficient, equals, linear, per_sample, scaled, squares
from ._precision import at_least_float32
from ._repr import Described


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Perturbed(Described):
    r"""Data with noise: x = alpha x0 + sigma eps.

    Args:
        x0: the data (B, *D).
        eps: the standard normal noise (B, *D).
        x: the noisy data (B, *D).
        t: the times (B,).
        alpha: the scale of the data (B,).
        sigma: the standard deviation of the noise (B,).
    """

    x0: Tensor
    eps: Tensor
    x: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Step(Described):
    """The result of a predictor's or corrector's step.

    Args:
        x: the new state (B, *D).
        mean: the same update without the noise that was added last (B, *D).
        state: a predictor's memory, passed to its next step.
        prediction: the model's last prediction in this step, if the part returns it.
    """

    x: Tensor
    mean: Tensor
    state: Any = None
    prediction: Prediction | None = None


class Prediction:
    r"""The data and the noise that a model predicts in a noisy state x = alpha x0 + sigma eps.

    A network predicts one linear combination F = a x0 + b eps of data and noise, its
    parameterization. With x = alpha x0 + sigma eps it determines both:

    .. math::
        x_0 = (b x - \sigma F) / \Delta, \quad \epsilon = (\alpha F - a x) / \Delta,
        \quad \Delta = \alpha b - \sigma a.

    The output is kept in the model's parameterization, so that errors are measured in it: at
    sigma = 1e-3 the difference of two noises computed from two x0 has lost three digits, the
    difference of the two x0 none.

    A prediction has the dtype of the state, at least float32: what a network computed in another
    dtype is converted once, here.

    Args:
        x: the noisy state (B, *D).
        x0: the predicted data (B, *D).
        eps: the predicted noise (B, *D).
        alpha: the scale of the data (B,).
        sigma: the standard deviation of the noise (B,).
        log_var: the logarithm of a learned transition variance (B, *D), or None.
        log_var_fraction: where a learned log-variance lies between the posterior's, 0, and the
            forward step's, 1, (B, *D), or None: one output for steps of any length.
    """

    __slots__ = (
        "_a",
        "_alpha",
        "_b",
        "_eps",
        "_log_var",
        "_log_var_fraction",
        "_output",
        "_sigma",
        "_unit",
        "_x",
        "_x0",
    )

    _x: Tensor
    _x0: Tensor | None
    _eps: Tensor | None
    _output: Tensor | None
    _a: Coefficient
    _b: Coefficient
    _unit: Hashable  # the output whose error is `output_error`, see _units.py

    def __init__(
        self,
        x: Tensor,
        x0: Tensor,
        eps: Tensor,
        alpha: Coefficient,
        sigma: Coefficient,
        log_var: Tensor | None = None,
        log_var_fraction: Tensor | None = None,
    ) -> None:
        self._x = wide = at_least_float32(x)
        self._x0, self._eps = _fitting(wide, x0, "x0"), _fitting(wide, eps, "eps")
        self._alpha, self._sigma = alpha, sigma
        self._log_var, self._log_var_fraction = log_var, log_var_fraction
        self._output, self._a, self._b, self._unit = None, 0.0, 1.0, None

    @override
    def __repr__(self) -> str:
        return f"Prediction(x of shape {tuple(self._x.shape)}, {self._x.dtype})"

    @classmethod
    def from_output(
        cls,
        x: Tensor,
        output: Tensor,
        alpha: Coefficient,
        sigma: Coefficient,
        *,
        a: Coefficient,
        b: Coefficient,
        log_var: Tensor | None = None,
        log_var_fraction: Tensor | None = None,
    ) -> Prediction:
        """Build a prediction from a network output = a x0 + b eps.

        Args:
            x: the noisy state (B, *D).
            output: the value of the combination (B, *D).
            alpha: the scale of the data (B,).
            sigma: the standard deviation of the noise (B,).
            a: the coefficient of x0, (B,) or a float.
            b: the coefficient of eps, (B,) or a float.
            log_var: the logarithm of a learned transition variance (B, *D), or None.
            log_var_fraction: where it lies between the posterior's and the forward step's
                (B, *D), or None.
        """
        self = object.__new__(cls)  # which Dynamo of torch 2.6 can trace
        self._x = wide = x if x.dtype.itemsize >= 4 else at_least_float32(x)
        self._x0, self._eps, self._output = None, None, _fitting(wide, output, "output")
        self._alpha, self._sigma, self._a, self._b = alpha, sigma, a, b
        self._log_var, self._log_var_fraction = log_var, log_var_fraction
        self._unit = None if isinstance(a, Tensor) or a != 0.0 else "eps"
        return self

    @classmethod
    def from_eps(cls, x: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
        """Build a prediction from the noise (B, *D)."""
        return cls.from_output(x, eps, alpha, sigma, a=0.0, b=1.0)

    @classmethod
    def from_x0(cls, x: Tensor, x0: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
        """Build a prediction from the data (B, *D)."""
        return cls.from_output(x, x0, alpha, sigma, a=1.0, b=0.0)

    @classmethod
    def from_v(cls, x: Tensor, v: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
        """Build a prediction from v = alpha eps - sigma x0 (Salimans and Ho, 2022)."""
        return cls.from_output(x, v, alpha, sigma, a=-sigma, b=alpha)

    @classmethod
    def from_score(
        cls, x: Tensor, score: Tensor, alpha: Coefficient, sigma: Coefficient
    ) -> Prediction:
        """Build a prediction from the score, -eps / sigma (B, *D)."""
        return cls.from_output(x, score, alpha, sigma, a=0.0, b=-1.0 / sigma)

    @property
    def x(self) -> Tensor:
        """The noisy state (B, *D)."""
        return self._x

    @property
    def output(self) -> Tensor | None:
        """The model's output a x0 + b eps (B, *D); None if both data and noise were given."""
        return self._output

    @property
    def parameterization(self) -> tuple[Coefficient, Coefficient]:
        """The coefficients a and b of the output, (B,) or floats."""
        return self._a, self._b

    @property
    def log_var(self) -> Tensor | None:
        """The logarithm of a learned transition variance (B, *D), or None."""
        return self._log_var

    @property
    def log_var_fraction(self) -> Tensor | None:
        """The learned log-variance as a fraction from the posterior's to the forward step's."""
        return self._log_var_fraction

    @property
    def alpha(self) -> Tensor:
        """The scale of the data (B,)."""
        return per_sample(self._alpha, self._x)

    @property
    def sigma(self) -> Tensor:
        """The standard deviation of the noise (B,)."""
        return per_sample(self._sigma, self._x)

    @property
    def x0(self) -> Tensor:
        """The predicted data (B, *D)."""
        if self._x0 is None:
            known = equals(self._b, 0.0) and equals(self._a, 1.0)
            self._x0 = self._output if known else self.combine(x=0.0, x0=1.0)
        return cast(Tensor, self._x0)

    @property
    def eps(self) -> Tensor:
        """The predicted noise (B, *D)."""
        if self._eps is None:
            self._eps = self._noise(1.0)
        return self._eps

    @property
    def score(self) -> Tensor:
        """The score -eps / sigma (B, *D), the gradient of log p_t.

        Raises:
            ValueError: if sigma is 0, where there is no score (read on the CPU only).
        """
        sigma = self._sigma
        if isinstance(sigma, Tensor):
            noisy = not readable(sigma) or bool((sigma.detach() > 0).all())
        else:
            noisy = sigma > 0
        if not noisy:
            raise ValueError("t: expected times with noise for a score, got sigma = 0")
        return self._noise(-1.0 / sigma)

    @property
    def v(self) -> Tensor:
        """The velocity alpha eps - sigma x0 (B, *D) (Salimans and Ho, 2022)."""
        return linear(self._alpha, self.eps, -self._sigma, self.x0)

    def _noise(self, factor: Coefficient) -> Tensor:
        """Return factor * eps in one pass over the state."""
        if self._eps is not None:
            return scaled(factor, self._eps)
        a, b, alpha = self._a, self._b, self._alpha
        if equals(a, 0.0):
            return scaled(factor / b, cast(Tensor, self._output))
        ratio = factor / (alpha * b - self._sigma * a)
        return linear(-ratio * a, self._x, ratio * alpha, cast(Tensor, self._output))

    def combine(self, *, x: Coefficient, x0: Coefficient) -> Tensor:
        """Return x * (the noisy state) + x0 * (the predicted data), in one pass.

        Every linear step of a sampler has this form. The two coefficients are first turned
        into those of the noisy state and the model's own output, so that no prediction is
        converted and nothing is rounded twice.

        Args:
            x: the coefficient of the noisy state, (B,) or a float.
            x0: the coefficient of the predicted data, (B,) or a float.

        Returns:
            The combination (B, *D).
        """
        of_state, of_output, output = self._coefficients(x, x0)
        return linear(of_state, self._x, of_output, output)

    def add_to(self, base: Tensor, *, x: Coefficient, x0: Coefficient) -> Tensor:
        """Return a state (B, *D) plus the combination of `combine`.

        Args:
            base: the state that it is added to (B, *D).
            x: the coefficient of the noisy state, (B,) or a float.
            x0: the coefficient of the predicted data, (B,) or a float.
        """
        of_state, of_output, output = self._coefficients(x, x0)
        if not equals(of_state, 0.0):
            base = linear(1.0, base, of_state, self._x)
        return linear(1.0, base, of_output, output)

    def _coefficients(
        self, x: Coefficient, x0: Coefficient
    ) -> tuple[Coefficient, Coefficient, Tensor]:
        """Return the coefficients of the state and of the output in a combination, and it."""
        if self._output is None:
            return x, x0, cast(Tensor, self._x0)
        if equals(self._b, 0.0):
            return x, x0 if equals(self._a, 1.0) else x0 / self._a, self._output
        delta = self._alpha * self._b - self._sigma * self._a
        if equals(delta, 0.0):
            raise ValueError(
                "model: expected a prediction of x0 or of a velocity at alpha = 0, as those of "
                "VelocityModel, VModel, X0Model and EDMModel, got one of the noise or the score, "
                "which does not determine the data there; start a little before, from a state or "
                "with a grid such as torch.linspace(0.99 * sde.T, sde.t_stop, steps + 1)"
            )
        ratio = x0 / delta
        return x + ratio * self._b, -ratio * self._sigma, self._output

    def noise_error(self, target: Prediction) -> Tensor:
        r"""Return eps - target.eps (B, *D), measured in the model's own parameterization.

        .. math::
            \hat\epsilon - \epsilon = \frac{\alpha}{\Delta} (F - a x_0 - b \epsilon)

        holds for a target with the same noisy state, and loses no digits at any sigma.

        Args:
            target: the data and noise to compare with.
        """
        return scaled(self.noise_factor(), self.output_error(target))

    def output_error(self, target: Prediction) -> Tensor:
        """Return F - a x0 - b eps (B, *D), the error of the model's output.

        It is the error of v for a prediction of both data and noise, and that of the noise for one
        of any multiple of it.

        Args:
            target: the data and noise to compare with, with the same noisy state.
        """
        value, wanted = self._compared(target)
        return value - wanted

    def squared_error(self, target: Prediction) -> Tensor:
        """Return the squares of the error of the model's output (B, *D), in one pass.

        Args:
            target: the data and noise to compare with, with the same noisy state.
        """
        if self._output is not None and self._unit == "eps" and not isinstance(self._b, Tensor):
            if self._b == 1.0:
                return squares(self._output, target.eps)
            if self._b == -1.0:
                return squares(self._output, -target.eps)  # of either sign
        return squares(*self._compared(target))

    def _compared(self, target: Prediction) -> tuple[Tensor, Tensor]:
        """Return the value whose error is that of the output, and its target, each (B, *D)."""
        if self._output is None:
            # Of data and noise, the velocity alone determines both wherever alpha or sigma is 0.
            return self.v, target.v
        a, b = self._a, self._b
        if equals(a, 0.0):  # b may be infinite: that of the score is at sigma = 0
            return self.eps, target.eps
        if equals(b, 0.0):
            return self._output, scaled(a, target.x0)
        return self._output, linear(a, target.x0, b, target.eps)

    def noise_factor(
        self, alpha: Coefficient | None = None, sigma: Coefficient | None = None
    ) -> Coefficient:
        """Return the noise's error over that of the output, (B,) or a float.

        Args:
            alpha: another scale of the data, (B,) or a float.
            sigma: another standard deviation of the noise, (B,) or a float.
        """
        a, b = self._a, self._b
        alpha = self._alpha if alpha is None else alpha
        sigma = self._sigma if sigma is None else sigma
        if self._output is None:
            return alpha / (alpha * alpha + sigma * sigma)
        if equals(a, 0.0):
            return 1.0
        if equals(b, 0.0):
            return -alpha / (sigma * a)
        return alpha / (alpha * b - sigma * a)


def _fitting(x: Tensor, value: Tensor, name: str) -> Tensor:
    """Return a value in the dtype of a state, or raise unless it is a tensor of its shape."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of shape {tuple(x.shape)}, got {type(value).__name__}"
        )
    if value.shape != x.shape:
        raise ValueError(
            f"{name}: expected the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    return value if value.dtype == x.dtype else value.to(x.dtype)
