"""Likelihoods: exact ones by the probability flow, bounds, dequantization, bits per dimension."""

from .bits import bits_per_dim
from .bound import NELBO, Bound
from .chain import ChainBound, ChainNELBO, StepBits, bits_per_step
from .decoder import LevelDecoder
from .dequantization import Dequantized, Dequantizer, UniformDequantizer
from .divergence import Divergence, ExactDivergence, Hutchinson
from .evaluate import BitsPerDim, evaluate_bits_per_dim
from .ode import ODELikelihood, ODELogLikelihood
from .variational import VariationalDequantizer
from .vdm import DiscreteBound, DiscreteNELBO, backward_with_schedule

__all__ = [
    "NELBO",
    "BitsPerDim",
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
    "StepBits",
    "UniformDequantizer",
    "VariationalDequantizer",
    "backward_with_schedule",
    "bits_per_dim",
    "bits_per_step",
    "evaluate_bits_per_dim",
]
