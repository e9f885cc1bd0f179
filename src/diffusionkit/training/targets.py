"""Regression targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from ..interfaces import Perturbed, Prediction, TargetEstimator


@dataclass(frozen=True)
class DenoisingTarget(TargetEstimator):
    """The data and noise of the noisy sample: denoising score matching.

    Source: Vincent, A Connection Between Score Matching and Denoising Autoencoders, 2011.
    """

    @override
    def __call__(
        self, sample: Perturbed, reference: Tensor | None = None, /, **cond: Any
    ) -> Prediction:
        return Prediction(sample.x, sample.x0, sample.eps, sample.alpha, sample.sigma)
