"""Controlled generation: guidance wraps a model, constraints are passed to a sampler.

The linear measurements of a constraint are operators with a pseudo-inverse.
"""

from .classifier import NoiseClassifier, classifier_loss, train_noise_classifier
from .constraints import Colorization, Inpainting, LinearMeasurement
from .guidance import ClassifierFreeGuidance, ClassifierGuidance, GradientGuidance
from .linear_gaussian import LinearGaussianGuidance
from .operators import AveragePool, Blur, Gray, LinearOperator, Mask, Matrix, check_operator

__all__ = [
    "AveragePool",
    "Blur",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Colorization",
    "GradientGuidance",
    "Gray",
    "Inpainting",
    "LinearGaussianGuidance",
    "LinearMeasurement",
    "LinearOperator",
    "Mask",
    "Matrix",
    "NoiseClassifier",
    "check_operator",
    "classifier_loss",
    "train_noise_classifier",
]
