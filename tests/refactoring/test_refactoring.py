"""The same numbers before and after a refactoring; `runs.py` says what that means."""

import pytest
import runs

MACHINE, EXPECTED = runs.recorded()
SAME_MACHINE = runs.fingerprint() == MACHINE


@pytest.mark.parametrize("name", runs.RUNS)
def test_a_refactoring_changes_no_number(name) -> None:
    """Bit for bit on a machine of the recorded kind, closely on any other."""
    verdict, where = runs.compare(EXPECTED[name], runs.run(name))
    accepted = ("identical",) if SAME_MACHINE else ("identical", "close")
    assert verdict in accepted, "\n".join([verdict, *where])


def test_every_recorded_run_is_still_run() -> None:
    assert set(EXPECTED) == set(runs.RUNS)
