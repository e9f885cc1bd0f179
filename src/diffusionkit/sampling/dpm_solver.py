"""DPM-Solver++: solvers in data prediction, multistep and single-step, with and without noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_flag, check_number
from ..interfaces import ForwardSDE
from .multistep import ExponentialAdams, ExponentialMidpoint
from .predictors import DDIM, StepCoefficients
from .tangent_grid import TangentGrid
from .two_stage import StageCoefficients, TwoStagePredictor

# The released codes' names of a second-order step.
_RULES = {"midpoint": ExponentialMidpoint, "heun": ExponentialAdams}


@dataclass(frozen=True)
class DPMSolver2M(ExponentialMidpoint):
    r"""DPM-Solver++(2M): second order for one evaluation a step.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h}) \left(x_0
              + \frac{h}{2 h_1} (x_0 - x_0^{(1)})\right), \quad h = l_s - l_t

    with l = log(alpha / sigma), and the last step's predicted data and length h_1.

    Args:
        solver: "midpoint" is the formula above; "heun" integrates the line through both
            predictions exactly.
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if solver is neither; in `prepare`, if the grid has one step.

    Source: Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
    Models, 2022, arXiv 2211.01095 (algorithm 2).

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, DPMSolver2M, GaussianMixtureModel, LogSNRGrid, PCSampler
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.1, 0.1])
    >>> grid = LogSNRGrid()
    >>> sampler = PCSampler(model, DPMSolver2M(), grid=grid, steps=20)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    21
    """

    solver: str = "midpoint"
    lower_order_final: bool = field(default=False, kw_only=True)
    memory = 1

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, tuple(_RULES))
        check_flag(self.lower_order_final, "lower_order_final")

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        return _RULES[self.solver].integrals(self, sde, nodes, end)


class _ThreePredictions(ExponentialAdams):
    """The parabola through the last three predictions of the data, exact or as published."""

    form: str
    memory = 2

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("exact", "published"))
        _check_eta(self.eta)

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        found = super().integrals(sde, nodes, end)
        if self.form == "exact" or len(nodes) < 3:
            return found
        back, shares = self.weighted(nodes[0], end)
        square = (shares * (end - nodes[0] - back).square()).sum(0)
        a, b, c = nodes
        leading = torch.stack([(a - b) * (a - c), (b - a) * (b - c), (c - a) * (c - b)])
        return found - 0.5 * square / leading


@dataclass(frozen=True)
class DPMSolver3M(_ThreePredictions):
    r"""DPM-Solver++(3M): the parabola through the last three predictions of the data.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \sigma_s \int_{l_t}^{l_s} e^l
              \left(x_0 + \delta_1 (l - l_t) + \delta_2 (l - l_t)^2\right) dl

    The released solvers lose a factor of 2 in the quadratic term and are of second order; below
    about 30 steps their error may be smaller. The first two steps, of lower order, cost little in
    a run from T, where the flow is nearly straight.

    Args:
        form: "exact" is of third order, "published" has half of delta_2 in the quadratic term.
        solver: the second step, which has two predictions: "heun" integrates their line exactly,
            "midpoint" is a step of `DPMSolver2M()`.
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if form or solver is none of these; in `prepare`, if the grid has one step.

    Source: Lu et al., DPM-Solver++, 2022, arXiv 2211.01095, and its released code (3M).
    """

    form: str = "exact"
    solver: str = "heun"
    lower_order_final: bool = field(default=False, kw_only=True)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("solver", self.solver, tuple(_RULES))
        check_flag(self.lower_order_final, "lower_order_final")

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        if len(nodes) == 2:
            return _RULES[self.solver].integrals(self, sde, nodes, end)
        return super().integrals(sde, nodes, end)


@dataclass(frozen=True)
class DPMSolver2MSDE(ExponentialMidpoint):
    r"""DPM-Solver++(2M) for the reverse SDE: one evaluation and new noise in every step.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s (1 - e^{-(1 + \eta) h})
              \left(x_0 + \frac{h}{2 h_1} (x_0 - x_0^{(1)})\right)
              + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z

    At eta = 1 the first-order steps, the first one and any to a time without noise, are those of
    `Ancestral`.

    Args:
        eta: the amount of noise: 1 is the reverse SDE, 0 the probability flow (`DPMSolver2M`).
        solver: "midpoint" is the formula above; "heun" integrates the line through both
            predictions exactly.

    Raises:
        ValueError: if eta is negative or not finite, or solver is neither; in `prepare`, if the
            grid has one step.
        TypeError: if eta is not a number.

    Source: Lu et al., DPM-Solver++, 2022, arXiv 2211.01095 (SDE solvers); Crowson, k-diffusion,
    2022 ("heun").
    """

    eta: float = 1.0
    solver: str = "midpoint"
    memory = 1

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        check_choice("solver", self.solver, tuple(_RULES))

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        return _RULES[self.solver].integrals(self, sde, nodes, end)


@dataclass(frozen=True)
class DPMSolver3MSDE(_ThreePredictions):
    r"""DPM-Solver++(3M) for the reverse SDE: one evaluation and new noise in every step.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + (1 + \eta)\, \sigma_s e^{-\eta l_s}
              \int_{l_t}^{l_s} e^{(1 + \eta) l}
              \left(x_0 + \delta_1 (l - l_t) + \delta_2 (l - l_t)^2\right) dl
              + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z, \quad h = l_s - l_t

    with the parabola through the last three predictions of the data. Weak order 2, strong order 1.
    The second step has two predictions and integrates their line exactly; without noise the method
    is `DPMSolver3M`.

    Args:
        eta: the amount of noise: 1 is the reverse SDE, 0 the probability flow.
        form: "exact" is the formula above, "published" has half of delta_2 in the quadratic term,
            as in the released code.

    Raises:
        ValueError: if eta is negative or not finite, or form is neither; in `prepare`, if the
            grid has one step.
        TypeError: if eta is not a number.

    Source: Crowson, k-diffusion, 2023 (dpmpp_3m_sde); Lu et al., DPM-Solver++, 2022, arXiv
    2211.01095.
    """

    eta: float = 1.0
    form: str = "exact"


@dataclass(frozen=True)
class DPMSolver2S(TwoStagePredictor):
    r"""DPM-Solver++(2S): second order from two evaluations a step, without memory.

    .. math::
        x' = \frac{\sigma_m}{\sigma_t} x_t + \alpha_m (1 - e^{-r h}) x_0, \qquad
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h})
              \left(x_0 + \tfrac{1}{2r} (x_0' - x_0)\right)

    with the time m at l_m = l_t + r h, l = log(alpha / sigma), h = l_s - l_t. A step to a time
    without noise takes one evaluation and is of first order. It needs twice the evaluations of a
    multistep solver, but without memory it keeps its order when correctors, constraints or time
    travel change the state between steps.

    Args:
        r: the position of the second stage within the step in l, in (0, 1].
        solver: "midpoint" is the formula above; "heun" integrates the line through both
            predictions exactly.

    Raises:
        ValueError: if r is outside (0, 1], or solver is neither.
        TypeError: if r is not a number.

    Source: Lu et al., DPM-Solver++, 2022, arXiv 2211.01095 (algorithm 1).
    """

    r: float = 0.5
    solver: str = "midpoint"

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, tuple(_RULES))
        check_number(self.r, "r")
        if not 0.0 < self.r <= 1.0:
            raise ValueError(f"r: expected a number in (0, 1], got {self.r}")

    @override
    def default_grid(self, sde: ForwardSDE, steps: int) -> Tensor | None:
        return TangentGrid()(sde, steps)

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StageCoefficients:
        return _two_stages(sde, t, s, self.r, self.solver)


@dataclass(frozen=True)
class DPMSolver2SAncestral(TwoStagePredictor):
    r"""DPM-Solver++(2S) below the end of the step, and back to it by noise.

    .. math::
        \rho_d = \rho_s \sqrt{1 - \eta^2 (1 - \rho_s^2 / \rho_t^2)}, \qquad
        \frac{x_s}{\alpha_s} = \frac{x_d}{\alpha_d} + \sqrt{\rho_s^2 - \rho_d^2}\, z,
        \qquad \rho = \sigma / \alpha,

    with x_d the result of `DPMSolver2S` from t to the smaller noise ratio rho_d; `DDIM(eta)` is the
    same with one stage. The noise makes the distribution of x_s exact if the flow is, on any grid:
    weak order 2. A step takes two evaluations, never at noise levels below s; a step to a time
    without noise is an ancestral step with one evaluation.

    Args:
        eta: the fraction of the ancestral sampler's noise that is added, in [0, 1].

    Raises:
        ValueError: if eta is outside [0, 1].
        TypeError: if eta is not a number.

    Source: Crowson, k-diffusion, 2022 (dpmpp_2s_ancestral).

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, DPMSolver2SAncestral, GaussianMixtureModel, LogSNRGrid
    ... )
    >>> from diffusionkit import PCSampler
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> solver, grid = DPMSolver2SAncestral(), LogSNRGrid()
    >>> sampler = PCSampler(model, solver, steps=20, grid=grid)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    41
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        DDIM(self.eta)  # raises if eta is invalid

    @override
    def default_grid(self, sde: ForwardSDE, steps: int) -> Tensor | None:
        return TangentGrid()(sde, steps)

    @override
    def coefficients(self, sde: ForwardSDE, t: Tensor, s: Tensor) -> StageCoefficients:
        return _two_stages(sde, t, s, 0.5, "midpoint", self.eta)


def _check_eta(eta: float) -> None:
    check_number(eta, "eta")
    if not 0.0 <= eta < math.inf:
        raise ValueError(f"eta: expected a finite number >= 0, got {eta}")


def _two_stages(
    sde: ForwardSDE, t: Tensor, s: Tensor, r: float, solver: str, eta: float = 0.0
) -> StageCoefficients:
    """Return the coefficients of steps from t to s (n,), with DDIM(eta) as the first order."""
    here, there = sde.log_snr(t), sde.log_snr(s)
    used = torch.isfinite(here) & torch.isfinite(there)
    gain = there - here
    gain = gain - torch.log1p(eta**2 * torch.expm1(-gain))  # to where the flow is followed
    middle = sde.time_at_log_snr(torch.where(used, here + r * gain, 0.0))
    middle = torch.where(used, middle, t)
    inner, whole = DDIM().coefficients(sde, t, middle), DDIM(eta).coefficients(sde, t, s)
    share = cast(Tensor, whole.x0)
    if solver == "midpoint":
        share = 0.5 * share
    else:
        share = sde.marginal(s)[0] - share / torch.where(used, 0.5 * gain, 1.0)
    second = torch.where(used, share / r, 0.0)
    first = StepCoefficients(whole.x, whole.x0 - second)
    return StageCoefficients(
        middle, inner, first, StepCoefficients(0.0, second), used.to(second.dtype), whole.std
    )
