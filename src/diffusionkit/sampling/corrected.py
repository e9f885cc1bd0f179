"""Multistep predictors that correct each step with the next evaluation, such as UniPC."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from ..interfaces import ForwardSDE
from .multistep import ExponentialAdams, lagrange, padded


class CorrectedAdams(ExponentialAdams):
    r"""An Adams-Bashforth step, corrected by Adams-Moulton's rule with the next prediction.

    The prediction at the end of a step is used twice: in the next step, and to correct the step
    that led there with the polynomial that also passes through it,

    .. math::
        x_t \leftarrow x_t + \sum_j (c_j - p_j)\, x_0^{(j)},

    with the coefficients p_j of the previous step and c_j of the same step with the new prediction.
    The noise of that step stays as it was. Both are one linear step in the last predictions, and
    changes of the state by correctors or constraints are kept.

    A line is evaluated at the midpoint and multiplied by `whole`.
    """

    @property
    @abc.abstractmethod
    def orders(self) -> tuple[int, int]:
        """The numbers of predictions that the step and its correction use; 0 for no correction."""

    def whole(self, h: Tensor) -> Tensor:
        """Return the integral of the constant 1 as lines use it, h being rate * length, (n,)."""
        return -torch.expm1(-h)

    @property
    @override
    def memory(self) -> int:
        ahead, corrected = self.orders
        return max(ahead, corrected - 1) if corrected else ahead - 1

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        if len(nodes) > 2:
            return super().integrals(sde, nodes, end)
        h = end - nodes[0]
        line = lagrange(nodes, (end - 0.5 * h).unsqueeze(0))[:, 0]
        return self.whole(self.rate(nodes[0]) * h) * line

    @override
    def weights(
        self, sde: ForwardSDE, t: Tensor, s: Tensor, past: Sequence[Tensor], most: int | None = None
    ) -> list[Tensor]:
        order, corrected = self.orders
        now = order
        if most is not None:  # the order of the step before, which is corrected, is larger by one
            now, order = min(order, most), min(order, most + 1)
            corrected = min(corrected, most + 2)
        ahead = padded(self.correction(sde, t, s, past[: now - 1]), len(past), t)
        if not past or not corrected:
            return ahead
        first, *rest = past
        new, *right = self.correction(sde, first, t, (t, *rest[: corrected - 2]))
        taken = self.correction(sde, first, t, rest[: order - 1])
        right, taken = (padded(part, len(rest), t) for part in (right, taken))
        # Of P_j - P_first; the coefficient of P_first itself makes the sum with `new` zero.
        change = [c - p for c, p in zip(right, taken, strict=True)]
        change.insert(0, -sum(change, new))
        lift = self.first_order(sde, t, s).x  # the predicted data stay where the state changes
        return [w + lift * c for w, c in zip(ahead, change, strict=True)]
