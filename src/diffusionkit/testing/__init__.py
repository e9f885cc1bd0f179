"""Consistency checks for your own processes and score models, and checks of values on devices."""

from .._checks import value_checks
from .processes import check_sde
from .report import InconsistentError, Report
from .score_models import check_score_model

__all__ = ["InconsistentError", "Report", "check_score_model", "check_sde", "value_checks"]
