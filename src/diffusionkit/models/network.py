"""A network made into a score model, one class for each thing a network may predict."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_part, check_state, check_times
from .._grid_times import instant
from ..interfaces import ForwardSDE, ScoreModel
from ..values import Coefficient, Prediction
from .labels import Label, LogSigmaLabel, SigmaLabel, TimeLabel

_LEARNED = ("learned_range", "learned")
_VARIANCES = (*_LEARNED, "fixed_small", "fixed_large")


class NetworkModel(ScoreModel):
    r"""A network whose output F states a x0 + b eps; subclasses say which a and b.

    The variance of the model's steps may be learned with it. The output is then (B, 2 C, ...):
    first C channels of what is described here, then as many v, which say

    .. math::
        \log \mathrm{var} = u \log v_{forward} + (1 - u) \log v_{posterior}, \quad
        u = (v + 1) / 2,

    with "learned_range", of a step of any length, or log var = v itself with "learned", of the
    steps that the network was trained on. Without learning it is v_posterior, which None and
    "fixed_small" mean, or v_forward, "fixed_large". Who takes steps reads it off the prediction
    and off the model's `variance`.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D). An output object
            with the tensor in `.sample`, as diffusers' networks return, will do too.
        sde: the forward process.
        label: what the network is told about time, a callable (sde, t) -> (B,).
        data_range: the range of the data that the network was trained on. Likelihoods refuse
            data outside it, and whoever makes pictures of samples will want it.
        variance: "learned_range", "learned", "fixed_small", "fixed_large" or None.

    Raises:
        TypeError: if the network or the label is not callable, or sde is not a ForwardSDE.
        ValueError: if there is no such variance.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (section 3.1).
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sde: ForwardSDE,
        *,
        label: Label | None = None,
        data_range: tuple[float, float] | None = None,
        variance: str | None = None,
    ) -> None:
        """Join the network and its process."""
        super().__init__()
        label = self._default_label() if label is None else label
        check_part(sde, ForwardSDE, "sde")
        for name, part in (("network", network), ("label", label)):
            if not callable(part):
                raise TypeError(f"{name}: expected a callable, got {type(part).__name__}")
        if variance is not None and variance not in _VARIANCES:
            raise ValueError(
                f"variance: expected one of {', '.join(_VARIANCES)}, or None, got {variance!r}"
            )
        self.network = network
        self.sde = sde
        self.label = label
        self.data_range = data_range
        self.variance = variance

    @staticmethod
    def _default_label() -> Label:
        return TimeLabel()

    @abc.abstractmethod
    def parameterization(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        """Return a and b of the output a x0 + b eps, from alpha and sigma, (B,) or floats."""

    def scale_input(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """Return what the network sees of the state, (B, *D): the state itself by default."""
        return x

    def predict(self, x: Tensor, t: Tensor, **cond: Any) -> Prediction:
        """Predict data and noise of a state x (B, *D) at times t (B,).

        Raises:
            ValueError: if t is not (B,), lies outside [0, T] or on another device, or the
                network's output has another shape than x.
            TypeError: if x or t is not a floating-point tensor.
        """
        check_state(x)
        if instant(t, self.sde) is None:
            check_times(t, self.sde.T, x.shape[0], x)
        alpha, sigma = self.sde.kernel(t)
        # A half-precision label could not tell a thousand times apart.
        label = self.label(self.sde, t).to(torch.promote_types(x.dtype, torch.float32))
        output = self.network(self.scale_input(x, alpha, sigma), label, **cond)
        learned = self.variance in _LEARNED
        if learned or not isinstance(output, Tensor) or output.shape != x.shape:
            output = self._tensor(output, x)
        a, b = self.parameterization(alpha, sigma)
        if not learned:
            return Prediction.from_output(x, output, alpha, sigma, a=a, b=b)
        output, v = output.chunk(2, 1)
        prediction = (
            {"log_var": v} if self.variance == "learned" else {"log_var_fraction": (v + 1) / 2}
        )
        return Prediction.from_output(x, output, alpha, sigma, a=a, b=b, **prediction)

    def _tensor(self, output: Any, x: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"network: expected a tensor of shape {tuple(x.shape)}, "
                    f"got {type(output).__name__}"
                )
        shape, learned = tuple(x.shape), ""
        if self.variance in _LEARNED:
            if x.ndim < 2:
                raise ValueError(f"x: expected channels (B, C, ...), with a learned variance, "
                                 f"got shape {shape}")  # fmt: skip
            shape, learned = (len(x), 2 * x.shape[1], *x.shape[2:]), ", with a learned variance"
        if output.shape != shape:
            raise ValueError(
                f"network: expected an output of shape {shape}{learned}, got {tuple(output.shape)}"
            )
        return output


class EpsModel(NetworkModel):
    r"""A network that predicts the noise: F = eps, score = -F / sigma.

    The default label is 999 t / T.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D).
        sde: the forward process.
        label: what the network is told about time, a callable (sde, t) -> (B,).
        data_range: the range of the data, for whoever makes pictures of samples.
        variance: what the network says of a step's variance, see `NetworkModel`.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.

    >>> import torch
    >>> from diffusionkit import VPSDE
    >>> model = EpsModel(lambda x, noise_label: torch.zeros_like(x), VPSDE())
    >>> model.predict(torch.ones(2, 3), torch.tensor([0.1, 0.9])).eps.shape
    torch.Size([2, 3])
    """

    def parameterization(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        return 0.0, 1.0


class X0Model(NetworkModel):
    r"""A network that predicts the data: F = x0, score = (alpha F - x) / sigma^2.

    The default label is 999 t / T.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D).
        sde: the forward process.
        label: what the network is told about time, a callable (sde, t) -> (B,).
        data_range: the range of the data, for whoever makes pictures of samples.
        variance: what the network says of a step's variance, see `NetworkModel`.

    Source: Salimans and Ho, Progressive Distillation, 2022, arXiv 2202.00512.
    """

    def parameterization(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        return 1.0, 0.0


class VModel(NetworkModel):
    r"""A network that predicts the velocity: F = alpha eps - sigma x0.

    The default label is 999 t / T.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D).
        sde: the forward process.
        label: what the network is told about time, a callable (sde, t) -> (B,).
        data_range: the range of the data, for whoever makes pictures of samples.
        variance: what the network says of a step's variance, see `NetworkModel`.

    Source: Salimans and Ho, Progressive Distillation, 2022, arXiv 2202.00512.
    """

    def parameterization(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        return -sigma, alpha


class RawScoreModel(NetworkModel):
    r"""A network that predicts the score itself: F = -eps / sigma.

    Its output spans as many decades as sigma does, so the network is expected to divide by
    sigma, as the NCSN++ of VE does. The default label is sigma / alpha.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D).
        sde: the forward process.
        label: what the network is told about time, a callable (sde, t) -> (B,).
        data_range: the range of the data, for whoever makes pictures of samples.
        variance: what the network says of a step's variance, see `NetworkModel`.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.
    """

    @staticmethod
    def _default_label() -> Label:
        return SigmaLabel()

    def parameterization(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        return 0.0, -1.0 / sigma


class ScaledScoreModel(NetworkModel):
    r"""A network that predicts sigma times the score: F = sigma score = -eps.

    The default label is log(sigma / (2 alpha)), with which this is EDM's VE preconditioning.

    Args:
        network: maps (x (B, *D), noise_label (B,), **cond) to a tensor (B, *D).
        sde: the forward process.
        label: what the network is told about time, a callable (sde, t) -> (B,).
        data_range: the range of the data, for whoever makes pictures of samples.
        variance: what the network says of a step's variance, see `NetworkModel`.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (table 1).
    """

    @staticmethod
    def _default_label() -> Label:
        return LogSigmaLabel(1.0, reference=2.0)

    def parameterization(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        return 0.0, -1.0
