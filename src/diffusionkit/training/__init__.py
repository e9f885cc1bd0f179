"""Training: objectives, their weightings, times and targets, weight averages, checkpoints."""

from .._files import CheckpointError
from .._magnitude import normalize_weights
from .checkpointing import Checkpoint, load_checkpoint, save_checkpoint
from .conditions import drop_conditions
from .couplings import optimal_coupling
from .crops import Crops, random_crops
from .discrete_times import DiscreteTimes, LossSecondMomentTimes
from .ema import EMA, HalfLife
from .flow_times import LogitNormalTimes, ModeTimes, ShiftedTimes
from .held_out import HeldOutLoss, held_out_loss
from .objectives import ScoreMatching
from .optim import StepReport, clipped_step, inverse_sqrt_decay, linear_warmup
from .power_ema import PowerEMA, power_coefficients, power_exponent, reconstruct_ema
from .reading import read_checkpoint
from .references import ReferenceBatches
from .run_files import CheckpointFolder, StopSignals
from .stable_target import StableTarget
from .targets import DenoisingTarget
from .times import ImportanceTimes, LogNormalTimes, StratifiedTimes, UniformTimes
from .uncertainty import LearnedUncertainty
from .vlb import VLB, HybridLoss
from .weighting import (
    EDMWeighting,
    LikelihoodWeighting,
    MinSNRWeighting,
    SimpleWeighting,
    VelocityWeighting,
)

__all__ = [
    "EMA",
    "VLB",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "Crops",
    "DenoisingTarget",
    "DiscreteTimes",
    "EDMWeighting",
    "HalfLife",
    "HeldOutLoss",
    "HybridLoss",
    "ImportanceTimes",
    "LearnedUncertainty",
    "LikelihoodWeighting",
    "LogNormalTimes",
    "LogitNormalTimes",
    "LossSecondMomentTimes",
    "MinSNRWeighting",
    "ModeTimes",
    "PowerEMA",
    "ReferenceBatches",
    "ScoreMatching",
    "ShiftedTimes",
    "SimpleWeighting",
    "StableTarget",
    "StepReport",
    "StopSignals",
    "StratifiedTimes",
    "UniformTimes",
    "VelocityWeighting",
    "clipped_step",
    "drop_conditions",
    "held_out_loss",
    "inverse_sqrt_decay",
    "linear_warmup",
    "load_checkpoint",
    "normalize_weights",
    "optimal_coupling",
    "power_coefficients",
    "power_exponent",
    "random_crops",
    "read_checkpoint",
    "reconstruct_ema",
    "save_checkpoint",
]
