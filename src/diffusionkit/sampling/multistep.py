r"""Multistep solvers: one evaluation a step, and a memory of what the model said before.

With l = log(alpha / sigma), half the log-SNR, as the time the probability flow is solved by

.. math::
    \frac{x_s}{\sigma_s} = \frac{x_t}{\sigma_t} + \int_{l_t}^{l_s} e^{l} x_0(l)\, dl, \qquad
    \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t} - \int_{l_t}^{l_s} e^{-l} \epsilon(l)\, dl,

for every linear process. A multistep solver puts the polynomial through its last predictions, of
the data or of the noise, into the integral. Order 1 is `DDIM`, both ways.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from .._checks import check_step_times, readable
from .._grid_times import Instant, instant, tabulated
from .._schedules import exact
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..random import Generators, increment_like
from ..values import Coefficient, add_noise, linear
from .predictors import StepCoefficients

# Sixteen points: 2e-15 of the integral even in a step of length 10 in l, half of the whole way.
_POINTS, _SHARES = (0.5 * torch.tensor(part) for part in np.polynomial.legendre.leggauss(16))
_POINTS = _POINTS + 0.5

Past: TypeAlias = tuple[tuple[Tensor, Tensor], ...]


def lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """Return the Lagrange polynomials of nodes (m, n) at points (q, n): (m, q, n)."""
    rows = []
    for j, node in enumerate(nodes):
        others = torch.cat([nodes[:j], nodes[j + 1 :]]).unsqueeze(1)
        rows.append(((at - others) / (node - others)).prod(0))
    return torch.stack(rows)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A move, and the coefficients of the predictions that are remembered, newest first."""

    move: StepCoefficients
    past: Sequence[Coefficient]


class MultistepPredictor(Predictor):
    r"""A predictor linear in the state and in what the model said last of the data or the noise.

    .. math::
        x_s = A x_t + C x_0 + \sum_{j \ge 1} w_j (P_j - P_0) + \mathrm{std}\, z

    with A, C and std of the step of first order, P_0 what the model says now, P_1, P_2, ... what
    it said at earlier times. The order grows with the memory. A step without one, the first or
    one after a jump in time, is of first order; so is a step to a time without noise, where a
    polynomial in l has no limit and the prediction of the data is the result.

    A subclass says how much is remembered and how polynomials are integrated.

    Attributes:
        memory: how many earlier predictions are used.
        of_data: whether predictions are of the data or of the noise.
        eta: how much of the reverse SDE's noise there is; 0 is the probability flow.
    """

    of_data: ClassVar[bool] = True
    eta: float = 0.0

    @property
    @abc.abstractmethod
    def memory(self) -> int:
        """How many earlier predictions are used."""

    @property
    def rate(self) -> float:
        """The decay of the integral's weight, back in l from the end of a step."""
        return 1.0 + self.eta if self.of_data else -1.0

    @abc.abstractmethod
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        r"""Return the integrals of Lagrange polynomials over n steps, (m, n).

        .. math::
            \kappa \int_0^h e^{-\kappa \tau} \ell_j(l_s - \tau)\, d\tau, \quad h = l_s - l_t,

        at the rate kappa.

        Args:
            sde: the forward process.
            nodes: the values of l that the polynomials belong to, l_t first, (m, n).
            end: the ends l_s, (n,).
        """

    def correction(
        self, sde: ForwardSDE, t: Tensor, s: Tensor, others: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the coefficients of P - P_t, P at other times, in steps from t to s, each (n,)."""
        if not others:
            return []
        end, *levels = (0.5 * sde.log_snr(at) for at in (s, t, *others))
        nodes = torch.stack(levels)
        fit = torch.isfinite(nodes).all(0) & torch.isfinite(end)
        apart = -torch.arange(len(nodes), dtype=end.dtype, device=end.device).unsqueeze(1)
        nodes = torch.where(fit, nodes, apart)
        found = self.integrals(sde, nodes, torch.where(fit, end, 1.0))
        alpha, sigma = sde.marginal(s)
        scale = torch.where(fit, alpha if self.of_data else sigma, 0.0)
        return [scale * row for row in found[1:]]

    def weights(
        self, sde: ForwardSDE, t: Tensor, s: Tensor, past: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the coefficients w_j, each (n,), of steps from t to s that remember past times."""
        return self.correction(sde, t, s, past)

    def first_order(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        """Return A, C and std, each (n,), of steps from t to s."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = sde.marginal(s), sde.marginal(t)
        decay = (alpha_t * sigma_s) / (alpha_s * sigma_t)  # exp(-h)
        noise = sigma_s * torch.sqrt(1 - decay ** (2 * self.eta)) if self.eta > 0 else None
        return StepCoefficients(
            sigma_s / sigma_t * decay**self.eta, alpha_s * (1 - decay ** (1 + self.eta)), noise
        )

    def _plans(self, sde: ForwardSDE, t: Tensor, s: Tensor, *past: Tensor) -> _Plan:
        """Return the coefficients of steps, those of P_0 given to the state and the data."""
        move, weights = self.first_order(sde, t, s), self.weights(sde, t, s, past)
        total = sum(weights, torch.zeros_like(t))
        if self.of_data:
            return _Plan(StepCoefficients(move.x, move.x0 - total, move.std), weights)
        alpha, sigma = sde.marginal(t)
        move = StepCoefficients(move.x - total / sigma, move.x0 + total * alpha / sigma, move.std)
        return _Plan(move, weights)

    def _key(self, instants: Sequence[Instant]) -> object:
        return id(self), *(one.time for one in instants)

    def _note(self, sde: ForwardSDE, known: Sequence[Sequence[Instant]], grid: Tensor) -> None:
        """Leave the coefficients of n steps with their times: t, s and the past ones, (m, n)."""
        plan = self._plans(sde, *grid)
        parts = (plan.move.x, plan.move.x0, plan.move.std, *plan.past)
        columns = (c.tolist() if isinstance(c, Tensor) else [c] * grid.shape[1] for c in parts)
        for instants, row in zip(zip(*known, strict=True), zip(*columns, strict=True), strict=True):
            instants[0].notes[self._key(instants[1:])] = _Plan(StepCoefficients(*row[:3]), row[3:])

    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:
        """Compute the coefficients of all steps at once, and leave them with the times.

        Raises:
            ValueError: if there is but one step, which has nothing to remember.
        """
        steps = len(times) - 1
        if steps < 2:
            raise ValueError(
                f"grid: expected at least 2 steps for {type(self).__name__}, which remembers "
                f"earlier ones, got {steps}"
            )
        table = tabulated(sde, times)
        if table is None:
            return
        instants, grid = table
        for depth in range(min(self.memory, steps - 1) + 1):
            last = steps if depth == self.memory else depth + 1
            spans = [slice(depth + k, last + k) for k in (0, 1, *range(-1, -depth - 1, -1))]
            self._note(sde, [instants[k] for k in spans], torch.stack([grid[k] for k in spans]))

    def _plan(self, sde: ForwardSDE, t: Tensor, s: Tensor, past: Past, x: Tensor) -> _Plan:
        times = (t, s, *(time for time, _ in past))
        known = [one for one in (instant(at, sde) for at in times) if one is not None]
        if len(known) < len(times):
            check_step_times(s, t, sde.T, x)
            if past and readable(t) and not bool((past[0][0] > t).all()):
                raise ValueError(
                    f"state: expected one of a step that began above t = {t.tolist()[:4]}, "
                    f"got {past[0][0].tolist()[:4]}"
                )
            return self._plans(sde, *(exact(at) for at in times))
        key, notes = self._key(known[1:]), known[0].notes
        if key not in notes:  # a grid that is entered in the middle
            table = tabulated(sde, times)
            self._note(sde, [[one] for one in known], cast(Any, table)[1].unsqueeze(1))
        return cast(_Plan, notes[key])

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
        """Move a state x (B, *D) from times t (B,) to s (B,), s < t."""
        past: Past = state or ()
        plan = self._plan(model.sde, t, s, past, x)
        prediction = model.predict(x, t, **cond)
        mean, std = prediction.combine(x=plan.move.x, x0=plan.move.x0), plan.move.std
        for weight, (_, value) in zip(plan.past, past, strict=True):
            mean = linear(1.0, mean, weight, value)
        memory = ((t, prediction.x0 if self.of_data else prediction.eps), *past)[: self.memory]
        if std is None:
            return Step(mean, mean, memory)
        noise = increment_like(mean, generator, model.sde, t, s)
        return Step(add_noise(mean, std, noise), mean, memory)


class ExponentialAdams(MultistepPredictor):
    """A multistep predictor that integrates its polynomials exactly: Adams and Bashforth's rule.

    They are polynomials in l, or in what a subclass makes of it.
    """

    def positions(self, sde: ForwardSDE, l: Tensor) -> Tensor:
        """Return what the polynomials are polynomials in, at half log-SNRs l of any shape."""
        return l

    def weighted(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return points tau of quadrature over steps of length h (n,), and shares, (q, n)."""
        points, shares = (part.to(h).unsqueeze(1) for part in (_POINTS, _SHARES))
        back = points * h
        return back, self.rate * h * shares * torch.exp(-self.rate * back)

    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        """Return the integrals of Lagrange polynomials over n steps, (m, n), by quadrature."""
        back, shares = self.weighted(end - nodes[0])
        basis = lagrange(self.positions(sde, nodes), self.positions(sde, end - back))
        return (shares * basis).sum(1)


class ExponentialMidpoint(ExponentialAdams):
    """One that takes a polynomial's value half way in l for its mean over the step.

    Of order 2, whatever the polynomial.
    """

    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        """Return the integrals of Lagrange polynomials over n steps, (m, n), by one value."""
        h = end - nodes[0]
        return -torch.expm1(-self.rate * h) * lagrange(nodes, (end - 0.5 * h).unsqueeze(0))[:, 0]
