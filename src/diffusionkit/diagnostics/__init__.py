"""The variance of targets and gradients at each noise level, with standard errors."""

from .estimates import Estimate, plot_variances
from .gradient_variances import gradient_variance
from .target_variances import dsm_variance, posterior_divergence, stf_variance

__all__ = [
    "Estimate",
    "dsm_variance",
    "gradient_variance",
    "plot_variances",
    "posterior_divergence",
    "stf_variance",
]
