"""UniPC: a multistep predictor with a corrector that needs no further evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_count, check_flag
from .corrected import CorrectedAdams


@dataclass(frozen=True)
class UniPC(CorrectedAdams):
    r"""The unified predictor-corrector in data prediction: order p + 1 for one evaluation a step.

    The prediction at the end of a step is used twice: in the next step, and to correct the step
    that led there with the polynomial that also passes through it,

    .. math::
        x_t \leftarrow x_t + \sum_j (c_j - p_j)\, x_0^{(j)}, \qquad
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s \int_0^h e^{-\tau} \sum_j
        \ell_j(l_s - \tau)\, x_0^{(j)}\, d\tau,

    with the coefficients p_j of the previous step and c_j of the same step with the new prediction.
    Both are one linear step in the last predictions. The correction is added to the state that the
    step gets, so that changes by correctors or constraints are kept.

    The last step of a run is not corrected. A line, the predictor's polynomial at p = 2 or the
    corrector's in the second step, is evaluated at the midpoint and multiplied by B(h).

    Args:
        order: p, the number of predictions that the predictor uses, the current one included: 2 or
            3. The correction adds one to the order; where the flow is already curved at the first
            step, that step limits the order to 3.
        variant: "B1" is B(h) = h, "B2" is B(h) = 1 - exp(-h).
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if order is not 2 or 3, or variant is neither; in `prepare`, if the grid has
            one step.
        TypeError: if order is not an integer.

    Source: Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
    Diffusion Models, 2023, arXiv 2302.04867.
    """

    order: int = 2
    variant: str = "B2"
    lower_order_final: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_count(self.order, "order", least=2)
        if self.order > 3:
            raise ValueError(f"order: expected 2 or 3, got {self.order}")
        check_choice("variant", self.variant, ("B1", "B2"))
        check_flag(self.lower_order_final, "lower_order_final")

    @property
    @override
    def orders(self) -> tuple[int, int]:
        return self.order, self.order + 1

    @override
    def whole(self, h: Tensor) -> Tensor:
        return h if self.variant == "B1" else super().whole(h)
