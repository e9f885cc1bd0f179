"""Calibration of posteriors and ensembles: coverage, ranks and proper scores."""

from .coverage import ExpectedCoverage, expected_coverage
from .ensembles import (
    EnsembleResult,
    EnsembleScores,
    RankHistogram,
    SpreadSkill,
    rank_histogram,
    spread_skill,
)
from .plots import plot_coverage, plot_rank_histogram
from .ranks import SBCResult, observation_ranks, simulation_based_calibration
from .scores import crps, energy_score

__all__ = [
    "EnsembleResult",
    "EnsembleScores",
    "ExpectedCoverage",
    "RankHistogram",
    "SBCResult",
    "SpreadSkill",
    "crps",
    "energy_score",
    "expected_coverage",
    "observation_ranks",
    "plot_coverage",
    "plot_rank_histogram",
    "rank_histogram",
    "simulation_based_calibration",
    "spread_skill",
]
