"""Samplers: predictors and correctors on a grid of times, and the probability flow."""

from .correctors import AnnealedLangevin, Langevin
from .encode import ddim_encode
from .flow import ProbabilityFlow
from .grids import ChainGrid, KarrasGrid, LogSNRGrid, QuadraticGrid, UniformGrid
from .heun import Euler, Heun
from .latent import slerp
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
    "ChainGrid",
    "Euler",
    "EulerMaruyama",
    "Heun",
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
    "ddim_encode",
    "slerp",
]
