r"""Multistep solvers: one evaluation a step, and a memory of earlier predictions.

With l = log(alpha / sigma), half the log-SNR, as the time the probability flow is solved by

.. math::
    \frac{x_s}{\sigma_s} = \frac{x_t}{\sigma_t} + \int_{l_t}^{l_s} e^{l} x_0(l)\, dl, \qquad
    \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t} - \int_{l_t}^{l_s} e^{-l} \epsilon(l)\, dl,

for every linear process. A multistep solver integrates the polynomial through its last predictions
of the data or of the noise. Order 1 is `DDIM`, both ways.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_step_times, readable
from .._coefficients import Coefficient, add_noise, linear
from .._grid_times import GridPoint, by_row, exact_times, grid_points
from .._schedules import exact
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..random import Generators, step_noise
from ..values import Prediction
from .predictors import StepCoefficients
from .tangent_grid import TangentGrid

# Sixteen points: 2e-15 of the integral even in a step of length 10 in l, half of the whole range.
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


def padded(weights: list[Tensor], count: int, like: Tensor) -> list[Tensor]:
    """Return weights (n,) followed by zeros, `count` in all."""
    return weights + [torch.zeros_like(like)] * (count - len(weights))


def gauss(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return points of the unit interval and weights, each (q, 1), in the dtype of a tensor."""
    points, shares = (part.to(like).unsqueeze(1) for part in (_POINTS, _SHARES))
    return points, shares


@dataclass(frozen=True, slots=True)
class _MultistepCoefficients:
    """The coefficients of a step, and those of the remembered predictions, newest first."""

    step: StepCoefficients
    past: Sequence[Coefficient]


class MultistepPredictor(Predictor):
    r"""A predictor linear in the state and in the last predictions of the data or of the noise.

    .. math::
        x_s = A x_t + C x_0 + \sum_{j \ge 1} w_j (P_j - P_0) + \mathrm{std}\, z

    with A, C and std of the first-order step, P_0 the current prediction and P_1, P_2, ... those at
    earlier times. The order grows with the memory. A step without memory, the first one or one
    after time travel, is of first order; so is a step to a time without noise, unless
    `integrable` says otherwise: there a polynomial in l has no limit, and the predicted data are
    the result. A prediction at alpha = 0, where l is infinite, is left out of later polynomials.

    A subclass defines the number of remembered predictions and how polynomials are integrated.

    Attributes:
        memory: the number of earlier predictions that are used.
        of_data: whether the polynomial passes through predictions of the data or of the noise. A
            subclass for another combination of the two overrides `value`, `scale` and `parts`.
        eta: the share of the reverse SDE's noise; 0 is the probability flow.
        lower_order_final: whether in a sampler's run the last step is of first order, the one
            before it of second, and so on.
    """

    of_data: ClassVar[bool] = True
    eta: float = 0.0
    lower_order_final: bool = False

    @property
    @abc.abstractmethod
    def memory(self) -> int:
        """The number of earlier predictions that are used."""

    def eta_at(self, l: Tensor) -> Coefficient:
        """Return eta of steps from half log-SNRs l (n,), (n,) or one float for all."""
        return self.eta

    def rate(self, l: Tensor) -> Coefficient:
        """Return the decay of the weight in integrals over steps from half log-SNRs l (n,)."""
        return 1.0 + self.eta_at(l) if self.of_data else -1.0

    def value(self, prediction: Prediction) -> Tensor:
        """Return what is remembered of a prediction, P (B, *D)."""
        return prediction.x0 if self.of_data else prediction.eps

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the factor of the integrals at the end of a step, (n,)."""
        return alpha if self.of_data else sigma

    def parts(self, weight: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Tensor]:
        """Return weight * P as coefficients of the state and the predicted data, each (n,)."""
        return (0.0, weight) if self.of_data else (weight / sigma, -(weight * alpha / sigma))

    @abc.abstractmethod
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        r"""Return the integrals of Lagrange polynomials over n steps, (m, n).

        .. math::
            \kappa \int_0^h e^{-\kappa \tau} \ell_j(l_s - \tau)\, d\tau, \quad h = l_s - l_t,

        at the rate kappa.

        Args:
            sde: the forward process.
            nodes: the values of l at the predictions, l_t first, (m, n).
            end: the values l_s at the ends, (n,).
        """

    def integrable(self, nodes: Tensor, end: Tensor) -> Tensor:
        """Return whether `integrals` are finite with nodes (m, n), to ends (n,): booleans (n,).

        They are l, infinite where there is no noise and -infinite where there is no signal.
        """
        return torch.isfinite(nodes).all(0) & torch.isfinite(end)

    def correction(
        self, sde: ForwardSDE, t: Tensor, s: Tensor, others: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the coefficients of P - P_t, with P at other times, in steps from t to s, (n,)."""
        if not others:
            return []
        end, *levels = (0.5 * sde.log_snr(at) for at in (s, t, *others))
        nodes = torch.stack(levels)
        fit = self.integrable(nodes, end)
        apart = -torch.arange(len(nodes), dtype=end.dtype, device=end.device).unsqueeze(1)
        nodes = torch.where(fit, nodes, apart)
        found = self.integrals(sde, nodes, torch.where(fit, end, 1.0))
        alpha, sigma = sde.marginal(s)
        scale = torch.where(fit, self.scale(alpha, sigma), 0.0)
        weights = [scale * row for row in found[1:]]
        if len(others) == 1 or (readable(fit) and bool(fit.all())):
            return weights
        # Without the earliest prediction, which may be of a state without signal.
        fewer = padded(self.correction(sde, t, s, others[:-1]), len(others), t)
        return [torch.where(fit, w, v) for w, v in zip(weights, fewer, strict=True)]

    def weights(
        self, sde: ForwardSDE, t: Tensor, s: Tensor, past: Sequence[Tensor], most: int | None = None
    ) -> list[Tensor]:
        """Return the coefficients w_j, each (n,), of steps from t to s with past times.

        `most` is the largest order of these steps where they are the last of a run, with
        `lower_order_final`; that of steps before them is larger by one.
        """
        used = past if most is None else past[: most - 1]
        return padded(self.correction(sde, t, s, used), len(past), t)

    def first_order(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StepCoefficients:
        """Return A, C and std, each (n,), of steps from t to s."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = sde.marginal(s), sde.marginal(t)
        decay = (alpha_t * sigma_s) / (alpha_s * sigma_t)  # exp(-h)
        eta = self.eta_at(0.5 * sde.log_snr(t))
        some = isinstance(eta, Tensor) or eta > 0
        noise = sigma_s * torch.sqrt(1 - decay ** (2 * eta)) if some else None
        return StepCoefficients(
            sigma_s / sigma_t * decay**eta, alpha_s * (1 - decay ** (1 + eta)), noise
        )

    def _coefficients(
        self, sde: ForwardSDE, t: Tensor, s: Tensor, *past: Tensor, most: int | None = None
    ) -> _MultistepCoefficients:
        """Return the coefficients of steps; that of P_0 is split into state and data."""
        limit = {} if most is None else {"most": most}
        c, weights = self.first_order(sde, t, s), self.weights(sde, t, s, past, **limit)
        total = sum(weights, torch.zeros_like(t))
        of_state, of_x0 = self.parts(total, *sde.marginal(t))
        step = StepCoefficients(c.x - of_state, c.x0 - of_x0, c.std)
        return _MultistepCoefficients(step, weights)

    def _store(
        self,
        sde: ForwardSDE,
        points: Sequence[Sequence[GridPoint]],
        grid: Tensor,
        most: int | None = None,
    ) -> None:
        """Store the coefficients of n steps with their times: t, s and the past ones, (m, n)."""
        steps = tuple(tuple(point.index for point in column) for column in points)

        def rows() -> list[Any]:
            return by_row(self._coefficients(sde, *grid, most=most), sde, len(steps[0]), grid[0])

        table = points[0][0].grid.keep(self, (most, *steps), rows)
        for (first, *others), row in zip(zip(*points, strict=True), table, strict=True):
            first.store(self, others, row)

    @override
    def default_grid(self, sde: ForwardSDE, steps: int) -> Tensor | None:
        return TangentGrid()(sde, steps)

    @override
    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:
        """Compute the coefficients of all steps at once.

        Raises:
            ValueError: if the grid has one step, and earlier predictions are used.
        """
        steps = len(times) - 1
        if steps < 2 and self.memory:
            raise ValueError(
                f"grid: expected at least 2 steps for {type(self).__name__}, which remembers "
                f"earlier predictions, got {steps}"
            )
        points = grid_points(sde, times)
        if points is None:
            return
        grid = exact_times(points)
        whole = steps - (self.memory if self.lower_order_final else 0)
        for depth in range(min(self.memory, steps - 1) + 1):
            last = steps if depth == self.memory else depth + 1
            late = range(max(whole, depth), last)
            for first, after, most in (
                (depth, min(last, whole), None),
                *((k, k + 1, steps - k) for k in late),
            ):
                spans = [slice(first + k, after + k) for k in (0, 1, *range(-1, -depth - 1, -1))]
                if first < after:
                    rows = torch.stack([grid[k] for k in spans])
                    self._store(sde, [points[k] for k in spans], rows, most)
        for k in range(max(whole, 0), steps):  # for a run that begins within the grid
            points[k].store(self, (), steps - k)

    def _at(
        self, sde: ForwardSDE, x: Tensor, t: Tensor, s: Tensor, past: Past
    ) -> _MultistepCoefficients:
        """Return the coefficients of a state's step, given the remembered predictions."""
        times = (t, s, *(time for time, _ in past))
        points = grid_points(sde, times)
        if points is None:
            check_step_times(s, t, sde.T, x)
            if past and readable(t) and not bool((past[0][0] > t).all()):
                raise ValueError(
                    f"state: expected predictions at times above t = {t.tolist()[:4]}, "
                    f"got {past[0][0].tolist()[:4]}"
                )
            return self._coefficients(sde, *(exact(at) for at in times))
        here, *others = points
        if here.look_up(self, others) is None:  # a run that begins within the grid
            grid = exact_times(points).unsqueeze(1)
            most = here.look_up(self, ()) if self.lower_order_final else None
            self._store(sde, [[point] for point in points], grid, most)
        return cast(_MultistepCoefficients, here.look_up(self, others))

    @override
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
        past: Past = state or ()
        c = self._at(model.sde, x, t, s, past)
        prediction = model.predict(x, t, **cond)
        mean, std = prediction.combine(x=c.step.x, x0=c.step.x0), c.step.std
        for weight, (_, value) in zip(c.past, past, strict=True):
            mean = linear(1.0, mean, weight, value)
        memory = ((t, self.value(prediction)), *past)[: self.memory]
        if std is None:
            return Step(mean, mean, memory, prediction)
        noise = step_noise(mean, model.sde, t, s, generator=generator)
        return Step(add_noise(mean, std, noise), mean, memory, prediction)


class ExponentialAdams(MultistepPredictor):
    """A multistep predictor that integrates its polynomials exactly: the Adams-Bashforth rule.

    They are polynomials in l, or in a function of l that a subclass defines.
    """

    def positions(self, sde: ForwardSDE, l: Tensor) -> Tensor:
        """Return the variable of the polynomials at half log-SNRs l of any shape."""
        return l

    def weighted(self, l: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Return quadrature points tau over steps from l to the end (n,), and weights, (q, n)."""
        h, rate = end - l, self.rate(l)
        points, shares = gauss(h)
        back = points * h
        return back, rate * h * shares * torch.exp(-rate * back)

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        back, shares = self.weighted(nodes[0], end)
        basis = lagrange(self.positions(sde, nodes), self.positions(sde, end - back))
        return (shares * basis).sum(1)


class ExponentialMidpoint(ExponentialAdams):
    """The rule that takes a polynomial's value at the midpoint in l as its mean over the step.

    Order 2, whatever the polynomial.
    """

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        h = end - nodes[0]
        whole = -torch.expm1(-self.rate(nodes[0]) * h)
        return whole * lagrange(nodes, (end - 0.5 * h).unsqueeze(0))[:, 0]
