"""Controlled generation: guidance wraps a model, constraints are passed to a sampler.

The linear measurements of a constraint are operators with a pseudo-inverse.
"""

from .autoguidance import Autoguidance
from .classifier import NoiseClassifier, classifier_loss, train_noise_classifier
from .classifier_free import ClassifierFreeGuidance
from .constraints import Colorization, Inpainting, LinearMeasurement
from .extrapolation import AdaptiveProjection
from .guidance import ClassifierGuidance, GradientGuidance
from .linear_gaussian import (
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    PseudoinverseGuidance,
)
from .momentum import GuidanceMomentum
from .operators import AveragePool, Blur, Gray, LinearOperator, Mask, Matrix, check_operator

__all__ = [
    "AdaptiveProjection",
    "Autoguidance",
    "AveragePool",
    "Blur",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Colorization",
    "GradientGuidance",
    "Gray",
    "GuidanceMomentum",
    "Inpainting",
    "LinearGaussianGuidance",
    "LinearMeasurement",
    "LinearOperator",
    "LinearizedGaussianGuidance",
    "Mask",
    "Matrix",
    "NoiseClassifier",
    "PseudoinverseGuidance",
    "check_operator",
    "classifier_loss",
    "train_noise_classifier",
]
