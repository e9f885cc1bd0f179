"""Consistency checks for your own processes and score models."""

from .processes import check_sde
from .report import InconsistentError, Report
from .score_models import check_score_model

__all__ = ["InconsistentError", "Report", "check_score_model", "check_sde"]
