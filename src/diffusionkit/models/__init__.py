"""Score models: networks combined with their processes, and exact oracles."""

from .denoised import Clip, DenoisedModel, DynamicThreshold
from .labels import (
    IndexLabel,
    LogSigmaLabel,
    ReverseTimeLabel,
    SigmaLabel,
    StepLabel,
    TimeLabel,
)
from .network import (
    EpsModel,
    NetworkModel,
    RawScoreModel,
    ScaledScoreModel,
    VelocityModel,
    VModel,
    X0Model,
)
from .oracles import EmpiricalModel, GaussianMixtureModel
from .patched import PatchedModel
from .preconditioned import EDMModel
from .schedule_transform import ScheduleTransformedModel

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
    "PatchedModel",
    "RawScoreModel",
    "ReverseTimeLabel",
    "ScaledScoreModel",
    "ScheduleTransformedModel",
    "SigmaLabel",
    "StepLabel",
    "TimeLabel",
    "VModel",
    "VelocityModel",
    "X0Model",
]
