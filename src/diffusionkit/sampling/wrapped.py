"""Predictors that change the steps of another predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from .._checks import check_part
from .._repr import Described
from ..interfaces import ForwardSDE, Predictor


@dataclass(frozen=True, repr=False, eq=False)
class WrappedPredictor(Described, Predictor):
    """A predictor that takes the steps of another one, with a change.

    It has the grid and the tables of the other one, which a sampler keeps between its runs. A
    subclass is a frozen dataclass with a method `step`, and keeps its memory in the state of its
    steps, together with that of the other one.

    Args:
        predictor: the predictor of the steps.

    Raises:
        TypeError: if predictor is not a Predictor.
    """

    predictor: Predictor

    def __post_init__(self) -> None:
        check_part(self.predictor, Predictor, "predictor")

    @override
    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:
        self.predictor.prepare(sde, times)

    @override
    def default_grid(self, sde: ForwardSDE, steps: int) -> Tensor | None:
        return self.predictor.default_grid(sde, steps)


def innermost(predictor: Predictor | None) -> Predictor | None:
    """Return the predictor that tables are of: the one that others are wrapped around."""
    while isinstance(predictor, WrappedPredictor):
        predictor = predictor.predictor
    return predictor
