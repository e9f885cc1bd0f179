"""Programs in docstrings and on pages run when they are pasted, and fit on a screen."""

import doctest
import re

import pytest
import torch
from support.snippets import ROOT, docstrings, lines_of_code, pages, program, undefined

DOCSTRINGS = dict(docstrings())
PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
PROGRAMS = {name: code for name, page in PAGES.items() if (code := program(page))}


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


@pytest.mark.parametrize("name", PROGRAMS)
def test_page_defines_and_imports_what_its_code_uses(name) -> None:
    assert undefined(PROGRAMS[name]) == []


@pytest.mark.parametrize("name", [name for name in PAGES if "/tables/" not in name])
def test_lines_of_code_fit_on_a_page(name) -> None:
    wide = [f"line {n}: {line}" for n, line in lines_of_code(PAGES[name]) if len(line) > 76]
    assert not wide, "\n".join(wide)


def test_undefined_names_are_found() -> None:
    assert undefined("x = y\ny = 1") == ["y"]
    assert undefined("def f(a): return a + b\nb = 1\nf(len([c for c in ()]))") == []
    assert undefined("def f(): return b") == ["b"]
    assert undefined("import a.b as c, d.e\nc, d, e") == ["e"]
    assert undefined("with open('x') as f: pass\nf\nclass C(B): k = lambda self: self.m") == ["B"]
