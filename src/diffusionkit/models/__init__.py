"""Score models: a network with its process, and exact oracles."""

from .denoised import Clip, DenoisedModel, DynamicThreshold
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
from .process import OnProcess

__all__ = [
    "Clip",
    "DenoisedModel",
    "DynamicThreshold",
    "EDMModel",
    "EmpiricalModel",
    "EpsModel",
    "GaussianMixtureModel",
    "IndexLabel",
    "LogSigmaLabel",
    "NetworkModel",
    "OnProcess",
    "RawScoreModel",
    "ScaledScoreModel",
    "SigmaLabel",
    "StepLabel",
    "TimeLabel",
    "VModel",
    "X0Model",
]
