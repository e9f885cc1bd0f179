"""Training: objectives, their weightings, times and targets, weight averages, checkpoints."""

from .._files import CheckpointError
from .checkpointing import Checkpoint, load_checkpoint, save_checkpoint
from .conditions import drop_conditions
from .crops import Crops, random_crops
from .discrete_times import DiscreteTimes, LossSecondMomentTimes
from .ema import EMA, HalfLife
from .held_out import HeldOutLoss, held_out_loss
from .objectives import ScoreMatching
from .optim import StepReport, clipped_step, linear_warmup
from .power_ema import PowerEMA, power_coefficients, power_exponent, reconstruct_ema
from .reading import read_checkpoint
from .references import ReferenceBatches
from .run_files import CheckpointFolder, StopSignals
from .stable_target import StableTarget
from .targets import DenoisingTarget
from .times import ImportanceTimes, LogNormalTimes, StratifiedTimes, UniformTimes
from .vlb import VLB, HybridLoss
from .weighting import EDMWeighting, LikelihoodWeighting, MinSNRWeighting, SimpleWeighting

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
    "LikelihoodWeighting",
    "LogNormalTimes",
    "LossSecondMomentTimes",
    "MinSNRWeighting",
    "PowerEMA",
    "ReferenceBatches",
    "ScoreMatching",
    "SimpleWeighting",
    "StableTarget",
    "StepReport",
    "StopSignals",
    "StratifiedTimes",
    "UniformTimes",
    "clipped_step",
    "drop_conditions",
    "held_out_loss",
    "linear_warmup",
    "load_checkpoint",
    "power_coefficients",
    "power_exponent",
    "random_crops",
    "read_checkpoint",
    "reconstruct_ema",
    "save_checkpoint",
]
