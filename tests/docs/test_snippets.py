"""Programs in docstrings and on pages run when they are pasted, and fit on a screen."""

import doctest
import re

import pytest
import torch
from support.snippets import docstrings

DOCSTRINGS = dict(docstrings())


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_docstring_example_runs_alone(name) -> None:
    example = doctest.DocTestParser().get_doctest(
        DOCSTRINGS[name], {"__name__": "__main__"}, name, None, None
    )
    report: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(1)  # not the seed of the documentation
        doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not report, "".join(report)


def test_lines_of_docstring_examples_fit_on_an_api_page() -> None:
    wide = [
        f"{name}: {line.strip()}"
        for name, text in DOCSTRINGS.items()
        for line in text.splitlines()
        if re.match(r"\s*(>>>|\.\.\.) ", line) and len(line.strip()) > 74
    ]
    assert not wide, "\n".join(wide)
