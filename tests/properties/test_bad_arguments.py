"""Every public callable refuses every bad value of every parameter, in words.

What is refused is refused by a ValueError or TypeError that names the parameter or says what was
expected. What is taken is taken on purpose: it is of the parameter's kind, or in a table.
"""

import zlib

import pytest
from support.bad_arguments import (
    ALLOWED,
    BAD,
    OWN,
    call,
    callables,
    names,
    parameters,
    problem,
)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a word is the name of a file


def _problems(name: str, chosen: list[str]) -> list[str]:
    call(name, {})  # the arguments to start from are valid
    found = []
    for parameter in parameters(name):
        for bad in chosen:
            wrong = problem(name, parameter, bad)
            if wrong is not None:
                found.append(f"{parameter} = {bad}: {wrong:.200}")
    return found


def _share(name: str) -> list[str]:
    """Return an eighth of the values, another for each callable, and those that hurt most."""
    return [
        bad
        for bad in BAD
        if bad in ("None", "a word", "10**30") or zlib.crc32(f"{name} {bad}".encode()) % 8 == 0
    ]


@pytest.mark.parametrize("name", names())
def test_bad_arguments_are_refused(name):
    assert _problems(name, _share(name)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_all_bad_arguments_are_refused(name):
    assert _problems(name, list(BAD)) == []


def test_every_recipe_is_of_a_callable():
    known = callables()
    for name, recipe in OWN.items():
        base, _, method = name.partition(".")
        assert base in known or "self" in recipe, name
        assert not method or "self" in recipe or name in known, name


def test_what_is_allowed_is_of_a_parameter():
    for name, parameter in ALLOWED:
        assert parameter in parameters(name)
