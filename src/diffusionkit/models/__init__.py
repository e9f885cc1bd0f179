"""Score models: a network with its process, and exact oracles."""

from .edm import EDMModel
from .labels import IndexLabel, LogSigmaLabel, SigmaLabel, StepLabel, TimeLabel
from .network import (
    EpsModel,
    NetworkModel,
    RawScoreModel,
    ScaledScoreModel,
    VModel,
    X0Model,
)
from .oracles import EmpiricalModel, GaussianMixtureModel

__all__ = [
    "EDMModel",
    "EmpiricalModel",
    "EpsModel",
    "GaussianMixtureModel",
    "IndexLabel",
    "LogSigmaLabel",
    "NetworkModel",
    "RawScoreModel",
    "ScaledScoreModel",
    "SigmaLabel",
    "StepLabel",
    "TimeLabel",
    "VModel",
    "X0Model",
]
