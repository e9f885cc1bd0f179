"""Samplers: predictors and correctors on a grid of times, and the probability flow."""

from .adams import DEIS, IPNDM, LMS, VelocityAdams
from .adaptive import AdaptiveSDE
from .brownian import BrownianPath
from .corrected import CorrectedAdams
from .correctors import AnnealedLangevin, Langevin
from .dpm_solver import (
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver2SAncestral,
    DPMSolver3M,
    DPMSolver3MSDE,
)
from .encode import ddim_encode
from .first_step import AnalyticFirstStep
from .fitted_grid import FittedGrid
from .grid_search import fit_grid
from .grids import (
    AYSGrid,
    ChainGrid,
    KarrasGrid,
    LogSNRGrid,
    QuadraticGrid,
    ShiftedGrid,
    UniformGrid,
)
from .heun import Euler, Heun
from .latent import slerp
from .multistep import ExponentialAdams, MultistepPredictor
from .pc import PCSampler, SamplerState
from .predictors import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LinearPredictor,
    ReverseDiffusion,
    StepCoefficients,
    TabulatedPredictor,
)
from .probability_flow import ProbabilityFlow
from .restart import Restart
from .sa_solver import SASolver
from .stochastic_heun import StochasticHeun
from .tangent_grid import TangentGrid
from .time_travel import TimeTravel
from .two_stage import StageCoefficients, TwoStagePredictor
from .unipc import UniPC
from .wrapped import WrappedPredictor

__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "LMS",
    "AYSGrid",
    "AdaptiveSDE",
    "AnalyticFirstStep",
    "Ancestral",
    "AnnealedLangevin",
    "BrownianPath",
    "ChainGrid",
    "CorrectedAdams",
    "DPMSolver2M",
    "DPMSolver2MSDE",
    "DPMSolver2S",
    "DPMSolver2SAncestral",
    "DPMSolver3M",
    "DPMSolver3MSDE",
    "Euler",
    "EulerMaruyama",
    "ExponentialAdams",
    "FittedGrid",
    "Heun",
    "KarrasGrid",
    "Langevin",
    "LinearPredictor",
    "LogSNRGrid",
    "MultistepPredictor",
    "PCSampler",
    "ProbabilityFlow",
    "QuadraticGrid",
    "Restart",
    "ReverseDiffusion",
    "SASolver",
    "SamplerState",
    "ShiftedGrid",
    "StageCoefficients",
    "StepCoefficients",
    "StochasticHeun",
    "TabulatedPredictor",
    "TangentGrid",
    "TimeTravel",
    "TwoStagePredictor",
    "UniPC",
    "UniformGrid",
    "VelocityAdams",
    "WrappedPredictor",
    "ddim_encode",
    "fit_grid",
    "slerp",
]
