"""Running checks and reporting their problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class InconsistentError(ValueError):
    """A part is inconsistent with itself or with its interface; the message lists the problems."""

    def __init__(self, report: Report) -> None:
        """Keep the report."""
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Report:
    """The result of the checks.

    Args:
        subject: the name of the part.
        checks: the names of the checks.
        problems: the problems, a sentence each; empty if there are none.
    """

    subject: str
    checks: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @override
    def __str__(self) -> str:
        if self.ok:
            return f"{self.subject}: {len(self.checks)} checks, no problems"
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        return f"{self.subject}: {len(self.problems)} {noun}{lines}"


Check = Callable[..., Iterator[str]]


def run_checks(subject: str, checks: Sequence[Check], *arguments: Any) -> Report:
    """Return the report of checks of a part, or raise InconsistentError if there are problems."""
    problems: list[str] = []
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            problems += [f"{name}: {problem}" for problem in check(*arguments)]
        # A user's part may raise anything, which is reported as a problem.
        except Exception as error:
            problems.append(f"{name}: raised {type(error).__name__}: {error}")
    report = Report(subject, tuple(c.__name__.strip("_") for c in checks), tuple(problems))
    if not report.ok:
        raise InconsistentError(report)
    return report


def largest_difference(got: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """Return where two tensors (n,) differ most, or None if they agree."""
    known = expected.abs()
    scale = torch.where(torch.isfinite(known), known, 0.0).max().clamp_min(1e-300)
    error = (got - expected).abs() / (known + 1e-6 * scale)
    error = torch.where(torch.isfinite(got) & torch.isfinite(known), error, torch.inf)
    error = torch.where(got == expected, 0.0, error)  # the same infinity, too
    worst = int(error.argmax())
    if float(error[worst]) <= tolerance:
        return None
    return (
        f"got {float(got[worst]):.6g}, expected {float(expected[worst]):.6g}, "
        f"relative error {float(error[worst]):.1e}"
    )
