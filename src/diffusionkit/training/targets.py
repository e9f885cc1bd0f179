"""What a model is regressed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..interfaces import Perturbed, Prediction, TargetEstimator


@dataclass(frozen=True)
class DenoisingTarget(TargetEstimator):
    """The data and noise that made the noisy state: denoising score matching.

    Source: Vincent, A Connection Between Score Matching and Denoising Autoencoders, 2011.
    """

    def __call__(
        self, sample: Perturbed, reference: Tensor | None = None, **cond: Any
    ) -> Prediction:
        """Return the sample's own x0 and eps; the reference is not used."""
        return Prediction(sample.x, sample.x0, sample.eps, sample.alpha, sample.sigma)
