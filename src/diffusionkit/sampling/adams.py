"""Adams-Bashforth rules in predictions of the noise (DEIS, LMS, IPNDM) and of the velocity."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_count, check_flag
from .._coefficients import Coefficient
from ..interfaces import ForwardSDE
from ..values import Prediction
from .corrected import CorrectedAdams
from .multistep import ExponentialAdams, gauss, lagrange


@dataclass(frozen=True)
class _Adams(ExponentialAdams):
    """The polynomial through the last `order` predictions, integrated exactly."""

    order: int = 4
    lower_order_final: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_count(self.order, "order", least=2)
        check_flag(self.lower_order_final, "lower_order_final")
        if self.order > 4:
            raise ValueError(f"order: expected 2, 3 or 4, got {self.order}")

    @property
    @override
    def memory(self) -> int:
        return self.order - 1


class _NoiseAdams(_Adams):
    """A polynomial through predictions of the noise."""

    of_data = False


class _RatioAdams(_NoiseAdams):
    """Integrals over rho = sigma / alpha, of polynomials that have a limit where rho is 0."""

    @override
    def integrable(self, nodes: Tensor, end: Tensor) -> Tensor:
        return torch.isfinite(nodes).all(0)

    @override
    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha


def _between(nodes: Tensor, end: Tensor) -> Tensor:
    """Return the integrals of Lagrange polynomials of nodes (m, n) from the first to ends (n,)."""
    points, shares = gauss(end)
    length = end - nodes[0]
    return (length * shares * lagrange(nodes, nodes[0] + points * length)).sum(1)


@dataclass(frozen=True)
class DEIS(_NoiseAdams):
    r"""Diffusion exponential integrator: the polynomial through the last predictions of the noise.

    .. math::
        \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t} + \sum_j \epsilon^{(j)}
        \int_{\rho_t}^{\rho_s} \ell_j\, d\rho, \qquad \rho = \sigma / \alpha,

    with the Lagrange polynomials of the last `order` times: of l = log(alpha / sigma), or of the
    process's own time, the paper's tAB. With polynomials of rho itself it is `LMS`, and so is
    tAB where time is rho, as in an `EDMSDE`. One evaluation a step.

    Args:
        order: the number of predictions used, the current one included: 2, 3 or 4. The paper
            counts from 0: its tAB3 is order 4.
        variable: "log_snr", best on grids uniform in log-SNR or denser near the data; or "time",
            best on grids uniform in time.
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if order is not 2, 3 or 4, or variable is neither; in `prepare`, if the grid
            has one step.
        TypeError: if order is not an integer.

    Source: Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator, 2023,
    arXiv 2204.13902.
    """

    order: int = 3
    variable: str = "log_snr"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variable", self.variable, ("log_snr", "time"))

    @override
    def positions(self, sde: ForwardSDE, l: Tensor) -> Tensor:
        if self.variable == "log_snr":
            return l
        return sde.time_at_log_snr(2 * l.flatten()).view_as(l)

    @override
    def integrable(self, nodes: Tensor, end: Tensor) -> Tensor:
        if self.variable == "log_snr":
            return super().integrable(nodes, end)
        return torch.isfinite(nodes[0]) & torch.isfinite(end)  # earlier times are finite anyway

    @override
    def default_grid(self, sde: ForwardSDE, steps: int) -> Tensor | None:
        return None if self.variable == "time" else super().default_grid(sde, steps)


@dataclass(frozen=True)
class LMS(_RatioAdams):
    r"""The linear multistep method in rho = sigma / alpha, on grids of any spacing.

    .. math::
        \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t} + \sum_j \epsilon^{(j)}
        \int_{\rho_t}^{\rho_s} \ell_j(\rho)\, d\rho

    The Adams-Bashforth formula for dx/drho = eps with the Lagrange polynomials of the last
    `order` values of rho; the rhoAB of DEIS. One evaluation a step. A step to a time without
    noise, rho = 0, is of the same order as others.

    Args:
        order: the number of predictions used, the current one included: 2, 3 or 4.
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if order is not 2, 3 or 4; in `prepare`, if the grid has one step.
        TypeError: if order is not an integer.

    Source: Crowson, k-diffusion, 2022 (in data of unit scale); Zhang and Chen, 2023,
    arXiv 2204.13902 (rhoAB).
    """

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        return _between(torch.exp(-nodes), torch.exp(-end))


# The Adams-Bashforth weights of equal steps, newest prediction first, by the number of predictions.
_EQUAL_STEPS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class IPNDM(_RatioAdams):
    r"""The improved pseudo-linear multistep method: Adams-Bashforth weights of equal steps.

    .. math::
        \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t}
        + (\rho_s - \rho_t) \sum_j w_j\, \epsilon^{(j)}, \qquad \rho = \sigma / \alpha,

    with w = (3, -1) / 2, (23, -16, 5) / 12 or (55, -59, 37, -9) / 24 whatever the grid. Where the
    steps in rho are equal it is `LMS`, of order `order`; on other smooth grids it is of order 2.
    In few steps the constant weights extrapolate less than exact ones, which may be better or
    worse: compare it with `DEIS` on your model.

    Args:
        order: the number of predictions used, the current one included: 2, 3 or 4.
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if order is not 2, 3 or 4; in `prepare`, if the grid has one step.
        TypeError: if order is not an integer.

    Source: Liu et al., Pseudo Numerical Methods for Diffusion Models on Manifolds, 2022,
    arXiv 2202.09778; Zhang and Chen, 2023, arXiv 2204.13902 (iPNDM).
    """

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        weights = nodes.new_tensor(_EQUAL_STEPS[len(nodes)]).unsqueeze(1)
        return (torch.exp(-end) - torch.exp(-nodes[0])) * weights


@dataclass(frozen=True)
class VelocityAdams(_Adams, CorrectedAdams):
    r"""The Adams-Bashforth rule for the velocity of the straight path, on any process.

    .. math::
        \frac{x_s}{\alpha_s + \sigma_s} = \frac{x_t}{\alpha_t + \sigma_t}
        + \sum_j v^{(j)} \int_{u_t}^{u_s} \ell_j(u)\, du, \qquad v = \hat\epsilon - \hat x_0,
        \quad u = \frac{\sigma}{\alpha + \sigma},

    with the Lagrange polynomials of the last `order` values of u. In x / (alpha + sigma) and u
    every process is the straight path of flow matching, whose flow is regular at both ends; there
    it is the multistep rule in time itself. One evaluation a step. Steps to a time without noise
    and after one without signal are of the same order as others.

    With `corrected=True` each step is then taken again with the polynomial through the prediction
    at its end as well, as in `UniPC`: the Adams-Moulton rule of the same order, with the evaluation
    that the next step needs anyway. The data predicted there are kept for the corrected state.

    Args:
        order: the number of predictions used, the current one included: 2, 3 or 4.
        corrected: whether each step is corrected by the prediction at its end.
        lower_order_final: whether the last step of a sampler's run is of first order and the one
            before it of second order, as in diffusers.

    Raises:
        ValueError: if order is not 2, 3 or 4; in `prepare`, if the grid has one step.
        TypeError: if order is not an integer, or corrected neither True nor False.

    Source: the vAB sampler of Rozet, azula, 2024; the correction is that of Zhao et al., UniPC,
    2023, arXiv 2302.04867, for another variable.
    """

    order: int = 3
    corrected: bool = field(default=False, kw_only=True)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self.corrected, "corrected")

    @property
    @override
    def orders(self) -> tuple[int, int]:
        return self.order, self.order if self.corrected else 0

    @property
    @override
    def memory(self) -> int:
        return self.order if self.corrected else self.order - 1

    @override
    def value(self, prediction: Prediction) -> Tensor:
        return prediction.eps - prediction.x0

    @override
    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha + sigma

    @override
    def parts(self, weight: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Tensor]:
        return weight / sigma, -(weight * (alpha + sigma) / sigma)

    @override
    def integrable(self, nodes: Tensor, end: Tensor) -> Tensor:
        return torch.ones_like(end, dtype=torch.bool)

    @override
    def integrals(self, sde: ForwardSDE, nodes: Tensor, end: Tensor) -> Tensor:
        return _between(torch.sigmoid(-nodes), torch.sigmoid(-end))
