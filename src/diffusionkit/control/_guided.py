"""Shared parts of guidance: wrapping a model, and gradients in any gradient mode."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, readable
from .._coefficients import Coefficient, expand, linear
from .._grid_times import copy_grid_point, kernel
from .._log_snr import FAINTEST
from .._model_checks import check_model
from .._precision import NetworkDtype, arithmetic_dtype, at_least_float32, backward_factor
from .._schedules import exact, home, schedule_dtype
from ..interfaces import ForwardSDE, ScoreModel
from ..values import Prediction


class GuidedModel(ScoreModel):
    """A wrapper that changes another model's predictions and keeps its attributes."""

    def __init__(self, model: ScoreModel) -> None:
        """Keep the model, and copy its process, data range and variance."""
        super().__init__()
        check_model(model)
        self.model = model
        self.sde = model.sde
        self.data_range = getattr(model, "data_range", None)
        self.variance = getattr(model, "variance", None)
        self._dtype = NetworkDtype(model)

    def _with_signal(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return states (B, *D) and times (B,) at which a gradient determines the data's shift.

        They are the same wherever there is signal. Where alpha = 0 the shift is 0 / 0; its limit is
        taken with the same noise at the time where sigma / alpha is `LARGEST_RATIO`.
        """
        alpha, sigma = kernel(self.sde, x, t)
        if isinstance(alpha, Tensor) and not readable(alpha):
            return x, t
        ends = torch.as_tensor(alpha, device=t.device) == 0
        if not bool(ends.any()):
            return x, t
        faintest = torch.full_like(t, FAINTEST, dtype=schedule_dtype(t.device))
        at = torch.where(ends, self.sde.time_at_log_snr(faintest), exact(t))
        noise = expand(self.sde.marginal(at)[1] / sigma, x)
        return torch.where(_rows(ends, x), (x * noise).to(x.dtype), x), at

    def _shifted(
        self, prediction: Prediction, x: Tensor, t: Tensor, grad: Tensor, at: Tensor
    ) -> Prediction:
        """Return a prediction with a gradient (B, *D), taken at times `at`, added to its score.

        Data and noise are shifted separately, so that neither loses digits to the other at any
        sigma or alpha. At alpha = 0 the noise is the state, whatever the data.
        """
        alpha, sigma = kernel(self.sde, x, t)
        x0, eps = (_without_graph(part) for part in (prediction.x0, prediction.eps))
        learned = (
            None if value is None else _without_graph(value)
            for value in (prediction.log_var, prediction.log_var_fraction)
        )
        alpha_at, sigma_at = kernel(self.sde, x, at)
        x0 = linear(1.0, x0, sigma_at * (sigma_at / alpha_at), grad)
        if at is not t:
            grad = torch.where(_rows(torch.as_tensor(alpha, device=t.device) == 0, x), 0.0, grad)
        return Prediction(x, x0, linear(1.0, eps, -sigma, grad), alpha, sigma, *learned)

    def _factor(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Coefficient | None:
        """Return the factor of backward passes from the predicted data to a state.

        The data are at most max(1, sigma, sigma^2) / alpha times as large as a network's output.
        """
        dtype = arithmetic_dtype(self._dtype(self.model), x)
        if dtype != torch.float16:
            return None
        noise = torch.as_tensor(sigma).clamp_min(1.0)
        return backward_factor(noise * noise / alpha, dtype)

    @contextlib.contextmanager
    def _differentiable(
        self, x: Tensor, t: Tensor, cond: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Any], bool]]:
        """Record gradients by a state, also where the caller has disabled them.

        Yields the state as a leaf, the times and the conditions in a form that autograd may save,
        and whether the caller differentiates through the gradient.
        """
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = at_least_float32(x)
            leaf = x if x.requires_grad else _recordable(x).detach().requires_grad_()
            saved = {name: _recordable(value) for name, value in cond.items()}
            yield leaf, _recordable(t), saved, keep


def check_scale(scale: float) -> None:
    """Raise unless a scale is a finite number."""
    check_number(scale, "scale")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


def check_process(
    part: object, sde: ForwardSDE, name: str, *, rtol: float = 1e-3, advice: str = ""
) -> None:
    """Raise if a part was made for another process (values are read on the CPU only).

    Args:
        part: a classifier or a model; without a process it is taken to fit.
        sde: the process of the model.
        name: the part's name, for the error.
        rtol: how much alpha and sigma may differ, relatively.
        advice: the end of the error.
    """
    own = getattr(part, "sde", None)
    if own is sde or not isinstance(own, ForwardSDE):
        return
    if own.T != sde.T:
        raise ValueError(f"{name}: expected a process with T = {sde.T:g}, got {own.T:g}{advice}")
    t = sde.T * torch.linspace(0.1, 1.0, 4, dtype=torch.float64)
    expected, got = (_marginals(process, t) for process in (sde, own))
    if not readable(t) or torch.allclose(got, expected, rtol=rtol):
        return
    k = int((got - expected).abs().sum(0).argmax())
    raise ValueError(
        f"{name}: expected the process of the model, {type(sde).__name__} with alpha and sigma "
        f"= {expected[:, k].tolist()} at t = {float(t[k]):g}, "
        f"got {type(own).__name__} with {got[:, k].tolist()}{advice}"
    )


@torch.no_grad()
def _marginals(sde: ForwardSDE, t: Tensor) -> Tensor:
    """Return alpha and sigma (2, n) at times (n,), on the CPU."""
    return torch.stack(sde.marginal(t.to(home(sde), schedule_dtype(home(sde))))).to(t)


def shape_or_type(value: object) -> str:
    """Return the shape of a tensor, or the type of anything else, for an error message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _rows(flags: Tensor, x: Tensor) -> Tensor:
    """Return flags () or (B,) in a shape that selects samples of a state (B, *D)."""
    return flags.expand(len(x)).view(-1, *(1,) * (x.ndim - 1))


def _without_graph(value: Tensor) -> Tensor:
    """Return a tensor without guidance's own graph, unless the caller records gradients."""
    return value if torch.is_grad_enabled() else value.detach()


def _recordable(value: Any) -> Any:
    """Return a value that autograd may save: a tensor made in inference mode is copied.

    Call it outside inference mode. A copy of a sampler's time keeps its tabulated values.
    """
    if not (isinstance(value, Tensor) and value.is_inference()):
        return value
    return copy_grid_point(value, value.clone())


def gradient(
    value: Tensor,
    x: Tensor,
    name: str,
    *,
    along: Tensor | None = None,
    factor: Coefficient | None = None,
    keep: bool = False,
) -> Tensor:
    """Return the gradient by x (B, *D) of a value's sum, or of its product with `along`.

    Args:
        value: a function of x, with its graph.
        x: the state.
        name: the function's name, for the error.
        along: the vector of a vector-Jacobian product, of the value's shape.
        factor: scales the backward pass, (B,) or a float, so that it does not overflow; None for
            no scaling.
        keep: whether the gradient is differentiated in turn.

    Raises:
        ValueError: if no gradient flows from the value to x.
    """
    found: Tensor | None = None
    if value.requires_grad:
        again = along is not None or keep  # there are several products with one graph
        along = torch.ones_like(value) if along is None else along
        along = along if factor is None else along * expand(factor, along)
        (found,) = torch.autograd.grad(
            value, x, along, retain_graph=again, create_graph=keep, allow_unused=True
        )
    if found is None:
        raise ValueError(f"{name}: expected a differentiable function, got one without a gradient")
    return found if factor is None else found / expand(factor, found)
