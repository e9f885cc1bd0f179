"""Reports of checks."""

from diffusionkit.testing import InconsistentError, Report


def test_a_report_lists_its_problems() -> None:
    report = Report("Part", ("a", "b"), ("first", "second"))
    assert not report.ok
    assert str(report) == "Part: 2 problems\n  - first\n  - second"
    assert str(Report("Part", ("a",), ("first",))) == "Part: 1 problem\n  - first"
    assert isinstance(InconsistentError(report), ValueError)
