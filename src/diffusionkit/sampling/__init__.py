"""Samplers: predictors and correctors on a grid of times, and the probability flow."""

from .correctors import AnnealedLangevin, Langevin
from .flow import ProbabilityFlow
from .grids import KarrasGrid, LogSNRGrid, QuadraticGrid, UniformGrid
from .pc import PCSampler, SamplerState
from .predictors import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LinearPredictor,
    Move,
    ReverseDiffusion,
)

__all__ = [
    "DDIM",
    "Ancestral",
    "AnnealedLangevin",
    "EulerMaruyama",
    "KarrasGrid",
    "Langevin",
    "LinearPredictor",
    "LogSNRGrid",
    "Move",
    "PCSampler",
    "ProbabilityFlow",
    "QuadraticGrid",
    "ReverseDiffusion",
    "SamplerState",
    "UniformGrid",
]
