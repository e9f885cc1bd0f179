"""What a training loop is made of: weightings, times, targets, objectives, averages, files."""

from .._files import CheckpointError
from .checkpointing import Checkpoint, load_checkpoint, save_checkpoint
from .ema import EMA
from .objectives import ScoreMatching
from .optim import StepReport, clipped_step, linear_warmup
from .targets import DenoisingTarget
from .times import ImportanceTimes, LogNormalTimes, StratifiedTimes, UniformTimes
from .weighting import EDMWeighting, LikelihoodWeighting, MinSNRWeighting, SimpleWeighting

__all__ = [
    "EMA",
    "Checkpoint",
    "CheckpointError",
    "DenoisingTarget",
    "EDMWeighting",
    "ImportanceTimes",
    "LikelihoodWeighting",
    "LogNormalTimes",
    "MinSNRWeighting",
    "ScoreMatching",
    "SimpleWeighting",
    "StepReport",
    "StratifiedTimes",
    "UniformTimes",
    "clipped_step",
    "linear_warmup",
    "load_checkpoint",
    "save_checkpoint",
]
