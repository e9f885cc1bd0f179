"""Likelihoods: the probability-flow ODE, bounds, dequantization and bits per dimension."""

from ..decoders import LevelDecoder
from .bits import bits_per_dim
from .chain_nelbo import BitsPerStep, ChainBound, ChainNELBO, bits_per_step
from .dequantization import Dequantized, Dequantizer, UniformDequantizer
from .discrete_nelbo import DiscreteBound, DiscreteNELBO, variance_minimizing_backward
from .divergence import Divergence, ExactDivergence, Hutchinson
from .evaluate import BitsPerDim, evaluate_bits_per_dim
from .nelbo import NELBO, Bound
from .ode import ODELikelihood, ODELogLikelihood
from .variational_dequantizer import VariationalDequantizer

__all__ = [
    "NELBO",
    "BitsPerDim",
    "BitsPerStep",
    "Bound",
    "ChainBound",
    "ChainNELBO",
    "Dequantized",
    "Dequantizer",
    "DiscreteBound",
    "DiscreteNELBO",
    "Divergence",
    "ExactDivergence",
    "Hutchinson",
    "LevelDecoder",
    "ODELikelihood",
    "ODELogLikelihood",
    "UniformDequantizer",
    "VariationalDequantizer",
    "bits_per_dim",
    "bits_per_step",
    "evaluate_bits_per_dim",
    "variance_minimizing_backward",
]
