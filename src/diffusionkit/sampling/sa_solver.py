"""SA-Solver: the stochastic Adams method, a corrected multistep predictor with any noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_count, check_flag, check_number, readable
from .._coefficients import Coefficient
from .._log_snr import with_signal
from .._repr import Described
from ..interfaces import ForwardSDE
from .corrected import CorrectedAdams
from .heun import check_levels
from .multistep import ExponentialAdams


@dataclass(frozen=True, repr=False)
class SASolver(Described, CorrectedAdams):
    r"""The stochastic Adams solver: any amount of noise, a multistep predictor and a corrector.

    With l = log(alpha / sigma) and tau constant in a step,

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\tau^2 h} x_t + (1 + \tau^2)\, \sigma_s
              e^{-\tau^2 l_s} \int_{l_t}^{l_s} e^{(1 + \tau^2) l} \sum_j \ell_j(l)\, x_0^{(j)}\, dl
              + \sigma_s \sqrt{1 - e^{-2 \tau^2 h}}\, z, \quad h = l_s - l_t,

    with the polynomial through the last predictions of the data. In the next step the same formula,
    with the prediction at s among them and the same noise z, corrects x_s: one evaluation a step.
    The distribution of the samples is the same for every tau, in the limit of small steps; 0 is the
    probability flow, 1 the reverse SDE, and more noise forgets more of earlier errors.

    With noise the weak order is 2 and the strong order 1. The last step of a run is not corrected.

    Args:
        tau: the amount of noise, a number or a function of the log-SNR (n,) at the beginning of
            steps, log(alpha^2 / sigma^2), which returns values (n,).
        predictor_order: the number of predictions that a step uses: 1, 2 or 3.
        corrector_order: the number that the correction uses, the one at the end of the step
            included: 2, 3 or 4; 0 for no correction.
        s_min: the smallest sigma / alpha at the beginning of a step with noise.
        s_max: the largest sigma / alpha at the beginning of a step with noise.
        lines: how lines, polynomials of two predictions, are integrated: "midpoint" as in
            `DPMSolver2MSDE` and `UniPC`, most robust in few steps; "exact"; or "published", with
            (1 + tau^2) h / 2 times the change, as in the released code.
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if a number is out of range, s_max < s_min or lines is none of them; in a run,
            if the function returns values that are negative, not finite (read on the CPU only) or
            of another shape; in `prepare`, if the grid has one step and earlier predictions are
            used.
        TypeError: if tau is neither a number nor callable, or another argument is not a number.

    Source: Xue et al., SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models,
    2023, arXiv 2309.05019.

    >>> import torch
    >>> from diffusionkit import (
    ...     EDMSDE, GaussianMixtureModel, KarrasGrid, PCSampler, SASolver
    ... )
    >>> model = GaussianMixtureModel(EDMSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> predictor = SASolver(tau=1.0, s_min=0.05, s_max=1.0)
    >>> sampler = PCSampler(model, predictor, grid=KarrasGrid(), steps=20)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    21
    """

    tau: float | Callable[[Tensor], Tensor] = 1.0
    predictor_order: int = 2
    corrector_order: int = 2
    s_min: float = 0.0
    s_max: float = math.inf
    lines: str = "midpoint"
    lower_order_final: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.tau):
            check_number(self.tau, "tau")
            if not 0.0 <= self.tau < math.inf:
                raise ValueError(f"tau: expected a finite number >= 0, got {self.tau}")
        check_count(self.predictor_order, "predictor_order")
        if self.predictor_order > 3:
            raise ValueError(f"predictor_order: expected 1, 2 or 3, got {self.predictor_order}")
        check_count(self.corrector_order, "corrector_order", least=0)
        if self.corrector_order not in (0, 2, 3, 4):
            raise ValueError(f"corrector_order: expected 0, 2, 3 or 4, got {self.corrector_order}")
        check_levels(self.s_min, self.s_max)
        check_choice("lines", self.lines, ("midpoint", "exact", "published"))
        check_flag(self.lower_order_final, "lower_order_final")

    @property
    @override
    def orders(self) -> tuple[int, int]:
        return self.predictor_order, self.corrector_order

    @override
    def eta_at(self, l: Tensor) -> Coefficient:
        if not callable(self.tau) and self.s_min == 0 and self.s_max == math.inf:
            return float(self.tau) ** 2
        ratio = torch.exp(-l)
        some = (self.s_min <= ratio) & (ratio <= self.s_max)
        return some.to(l.dtype) * self._tau(l) ** 2

    def _tau(self, l: Tensor) -> Coefficient:
        """Return tau for steps from half log-SNRs l (n,), or raise."""
        if not callable(self.tau):
            return float(self.tau)
        tau = self.tau(with_signal(2 * l))
        if not isinstance(tau, Tensor) or tau.shape != l.shape:
            got = f"shape {tuple(tau.shape)}" if isinstance(tau, Tensor) else type(tau).__name__
            raise ValueError(f"tau: expected a tensor of shape {tuple(l.shape)}, got {got}")
        if readable(tau) and not bool(((tau >= 0) & torch.isfinite(tau)).all()):
            raise ValueError(f"tau: expected finite values >= 0, got {tau.tolist()[:4]}")
        return tau

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        rule = ExponentialAdams if self.lines == "exact" else CorrectedAdams
        return rule.integrals(self, sde, nodes, end)

    @override
    def whole(self, h: Tensor) -> Tensor:
        return h if self.lines == "published" else super().whole(h)
