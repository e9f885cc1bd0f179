"""Fixtures of the examples, which are scripts that import each other from their folder."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = EXAMPLES / "images"
CLAIMS = EXAMPLES / "claims"


@pytest.fixture
def example(monkeypatch, request):
    """The example that the test file is named after, less `_example`."""
    for requirement in ("matplotlib", "sklearn", "sleepecg", "tqdm"):
        pytest.importorskip(requirement)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module(request.path.stem.removeprefix("test_").removesuffix("_example"))
    for name in set(sys.modules) - before:  # other tests must not find them
        if (EXAMPLES / f"{name}.py").exists():
            sys.modules.pop(name)


@pytest.fixture
def picture(tmp_path):
    return tmp_path / "folder" / "picture.png"


@pytest.fixture
def claims(monkeypatch):
    """Import a module of examples/claims by name; forget it afterwards."""
    for requirement in ("matplotlib", "tqdm", "PIL"):
        pytest.importorskip(requirement)
    monkeypatch.syspath_prepend(str(CLAIMS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:  # other tests must not find them
        if any((folder / f"{name}.py").exists() for folder in (CLAIMS, IMAGES, EXAMPLES)):
            sys.modules.pop(name)


@pytest.fixture
def program(monkeypatch):
    """Import a program of examples/images by name; forget it afterwards."""
    monkeypatch.syspath_prepend(str(IMAGES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:  # other tests must not find them
        if (IMAGES / f"{name}.py").exists():
            sys.modules.pop(name)
