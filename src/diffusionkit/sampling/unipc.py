"""UniPC: a multistep predictor, corrected without an evaluation more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_count
from ..interfaces import ForwardSDE
from .multistep import ExponentialAdams, lagrange


@dataclass(frozen=True)
class UniPC(ExponentialAdams):
    r"""The unified predictor-corrector in data prediction: order p + 1 for one evaluation a step.

    What the model says at the new time of a step serves twice: as the next step's prediction, and
    to correct the step that led there, by the polynomial that passes through it too,

    .. math::
        x_t \leftarrow x_t + \sum_j (c_j - p_j)\, x_0^{(j)}, \qquad
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s \int_0^h e^{-\tau} \sum_j
        \ell_j(l_s - \tau)\, x_0^{(j)}\, d\tau,

    with the coefficients c_j of the step that was, taken again with the new prediction, and p_j
    as it was taken. Both are one linear step in the last predictions. The correction is added to
    the state as it is handed in, so that what correctors or constraints made of it is kept.

    The last step of a run is not corrected. A line, where it is the predictor's polynomial at
    p = 2 or the corrector's at the second step, is not integrated but taken half way, times B(h).

    Args:
        order: p, how many predictions the predictor uses, the new one among them: 2 or 3. The
            correction adds one to the order, of which the first step leaves 3 at most where the
            flow is already curved there.
        variant: "B1" is B(h) = h, "B2" is B(h) = 1 - exp(-h).

    Raises:
        ValueError: if order is not 2 or 3, or variant is neither; in `prepare`, if the grid has
            one step.
        TypeError: if order is not an integer.

    Source: Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
    Diffusion Models, 2023, arXiv 2302.04867.
    """

    order: int = 2
    variant: str = "B2"

    def __post_init__(self) -> None:
        check_count(self.order, "order", least=2)
        if self.order > 3:
            raise ValueError(f"order: expected 2 or 3, got {self.order}")
        if self.variant not in ("B1", "B2"):
            raise ValueError(f'variant: expected "B1" or "B2", got {self.variant!r}')

    @property
    def memory(self) -> int:
        """How many earlier predictions are used: the corrector's polynomial needs one more."""
        return self.order

    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        """Return the integrals of Lagrange polynomials over n steps, (m, n)."""
        if len(nodes) > 2:
            return super().integrals(sde, nodes, end)
        h = end - nodes[0]
        unit = h if self.variant == "B1" else -torch.expm1(-h)
        return unit * lagrange(nodes, (end - 0.5 * h).unsqueeze(0))[:, 0]

    def weights(
        self, sde: ForwardSDE, t: Tensor, s: Tensor, past: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the coefficients w_j, each (n,), of steps from t to s that remember past times."""
        ahead = self.correction(sde, t, s, past[: self.order - 1])
        if not past:
            return ahead
        first, *rest = past
        new, *corrected = self.correction(sde, first, t, (t, *rest))
        taken = self.correction(sde, first, t, rest)
        # Of P_j - P_first; the coefficient of P_first itself makes the sum with `new` zero.
        change = [c - p for c, p in zip(corrected, taken, strict=True)]
        change.insert(0, -sum(change, new))
        lift = self.first_order(sde, t, s).x
        ahead += [torch.zeros_like(t)] * (len(past) - len(ahead))
        return [w + lift * c for w, c in zip(ahead, change, strict=True)]
