"""A first step without an evaluation, for any predictor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_finite, check_finite_number, check_known
from .._grid_times import grid_point, kernel
from .._kept import Kept
from ..interfaces import ForwardSDE, ScoreModel, Step
from ..random import Generators
from ..values import Prediction
from .wrapped import WrappedPredictor


class _KnownAtPrior(ScoreModel):
    """A model whose prediction at time T is given; it is not counted as an evaluation."""

    def __init__(self, model: ScoreModel, known: AnalyticFirstStep) -> None:
        super().__init__()
        self.sde = model.sde
        self.model = model
        self.known = known

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        if not _at_prior(self.sde, t):
            return self.model.predict(x, t, **cond)
        x0 = self.known._like(x).expand_as(x).contiguous()
        return Prediction.from_x0(x, x0, *kernel(self.sde, x, t))

    predict._counted = True  # type: ignore[attr-defined]


def _at_prior(sde: ForwardSDE, t: Tensor) -> bool:
    """Return whether all times t (B,) are T."""
    point, least = grid_point(t, sde), sde.T * (1 - 1e-6)
    return bool((t >= least).all()) if point is None else point.time >= least


@dataclass(frozen=True, repr=False, eq=False)
class AnalyticFirstStep(WrappedPredictor):
    r"""Takes the first step with a known prediction of the data, without an evaluation.

    At time T the noise hides the data, and a model predicts little more than their mean. With a
    constant c instead of the prediction,

    .. math::
        \hat x_0(x_T, T) = c, \qquad \hat\epsilon(x_T, T) = (x_T - \alpha_T c) / \sigma_T,

    the first of N + 1 steps is free, and N evaluations are left for lower noise. Multistep
    predictors remember it like any other prediction. All other steps are those of the predictor, as
    are all steps of runs that begin below T.

    The error of the step is the error of c times alpha_s - alpha_T sigma_s / sigma_T, so the first
    step must end where the noise is still much larger than the data. Common grids end it too early
    or too late, so fit one: `fit_grid(model, AnalyticFirstStep(IPNDM(3)), ..., steps=9)` for 8
    evaluations.

    Args:
        predictor: the predictor of all steps.
        x0: the constant c, a number or a tensor that broadcasts to the shape of the data: the mean
            of the data, or better that of the model's predictions in pure noise.

    Raises:
        ValueError: if x0 is not finite.
        TypeError: if a part has the wrong type.

    Source: Dockhorn et al., GENIE: Higher-Order Denoising Diffusion Solvers, 2022, arXiv 2210.05475
    (the analytical first step, with c = 0).

    >>> import torch
    >>> from diffusionkit import (
    ...     DEIS, AnalyticFirstStep, EDMSDE, GaussianMixtureModel, PCSampler
    ... )
    >>> model = GaussianMixtureModel(EDMSDE(), [[-1.0], [0.8]], [0.2, 0.4])
    >>> predictor = AnalyticFirstStep(DEIS())
    >>> grid = torch.tensor([80.0, 9.0, 3.0, 1.5, 0.7, 0.2, 0.0])
    >>> sampler = PCSampler(model, predictor, grid=grid, denoise=False)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    5
    """

    x0: float | Tensor = 0.0
    _copies: Kept[Tensor] = field(default_factory=Kept, init=False)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.x0, Tensor):
            check_known(self.x0, "x0")
            check_finite(self.x0, "x0")
            if not self.x0.numel():
                raise ValueError(f"x0: expected numbers, got a tensor of {tuple(self.x0.shape)}")
        else:
            check_finite_number(self.x0, "x0")

    def _like(self, x: Tensor) -> Tensor:
        """Return x0 in the dtype and on the device of a state x (B, *D), (*D)."""
        shape = tuple(x.shape[1:])

        def made() -> Tensor:
            c = self.x0
            if not isinstance(c, Tensor):
                c = torch.tensor(c, dtype=torch.float64)
            try:
                return c.to(x).expand(shape).contiguous()
            except RuntimeError as error:
                own = tuple(c.shape)
                raise ValueError(
                    f"x0: expected a shape that expands to {shape}, got {own}"
                ) from error

        return self._copies.get((shape, x.dtype, x.device), made)

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
        known = _KnownAtPrior(model, self) if _at_prior(model.sde, t) else model
        return self.predictor.step(known, x, t, s, state, generator=generator, **cond)
