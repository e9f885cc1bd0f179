"""A mixture on the line and its probability flow, which preserves quantiles."""

from torch import Tensor

from diffusionkit import ForwardSDE, GaussianMixtureModel

from . import f64

# From 80 Z at sigma = 80 down to sigma = .002 and to 0, by inverting the CDF in 60 digits.
Z = f64(-2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0).unsqueeze(1)
AT_SIGMA_MIN = f64(
    -1.2875353048000238, -0.986817377558069, -0.12203711969627962, 0.5004622118484008,
    0.6358468040802714, 0.8579357142150439, 1.0984518868239346, 1.5366789879079523,
)  # fmt: skip
AT_ZERO = f64(
    -1.2875209290661334, -0.9868180353910213, -0.12202563868394595, 0.5004659560005499,
    0.6358488559567478, 0.8579349900321945, 1.0984481562452975, 1.536669779593259,
)  # fmt: skip


def line_mixture(sde: ForwardSDE) -> GaussianMixtureModel:
    return GaussianMixtureModel(sde, [[-1.0], [0.8]], [0.2, 0.4], [0.3, 0.7])


def rms(x: Tensor, exact: Tensor) -> float:
    """Return the root mean square error of states (8,) or (8, 1)."""
    return float((x.flatten() - exact).square().mean().sqrt())
