"""The checks of torch and of the other project named diffusionkit, made at import."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import diffusionkit
from diffusionkit._requirements import TORCH, check_project, check_torch

PACKAGE = Path(diffusionkit.__file__).parent
ROOT = Path(__file__).resolve().parents[1]


def test_lowest_torch_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (r for r in project["dependencies"] if re.match(r"torch\b", r))
    assert requirement == f"torch>={TORCH[0]}.{TORCH[1]}"


@pytest.mark.parametrize(
    "found", ["2.6.0", "2.6.0a0+df5bbc09d1.nv24.12", "2.13.0+cpu", "3.0.1", "built here"]
)
def test_torch_that_is_new_enough(found) -> None:
    check_torch(found)


@pytest.mark.parametrize("found", ["1.13.1", "2.4.1+cu121", "2.5.0", "0.4"])
def test_torch_that_is_too_old(found) -> None:
    expected = f"torch: diffusionkit expected version 2.6 or newer, got {found}; "
    with pytest.raises(ImportError, match=re.escape(expected) + ".*pip install"):
        check_torch(found)


@pytest.fixture
def other_project(tmp_path, monkeypatch) -> Path:
    """A folder of packages in which the other project is installed, by its metadata."""
    metadata = tmp_path / "diffusionkit-0.5.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: diffusionkit\nVersion: 0.5.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_this_project_alone(recwarn) -> None:
    check_project(diffusionkit)
    assert not recwarn.list


def test_both_projects(other_project) -> None:
    with pytest.warns(RuntimeWarning, match=r"got diffusionkit 0\.5\.2 in the same environment"):
        check_project(diffusionkit)


def test_package_of_the_other_project(other_project) -> None:
    package = ModuleType("diffusionkit")
    package.__file__ = "site/diffusionkit/__init__.py"
    expected = r"got site/diffusionkit/__init__\.py, of diffusionkit 0\.5\.2, a project of another"
    with pytest.raises(ImportError, match=expected):
        check_project(package)


def test_other_project_was_uninstalled() -> None:
    package = ModuleType("diffusionkit")
    package.__file__ = None
    with pytest.raises(ImportError, match=r"got a folder without __init__\.py, of .* uninstalled"):
        check_project(package)


EACH = """
import importlib
for name in "checkpoints", "data", "metrics", "networks", "ops", "sampling", "sde", "training":
    try:
        importlib.import_module(f"diffusionkit.{name}")
    except ImportError as error:
        print(error)
"""


def test_modules_beside_the_package_of_the_other_project(other_project) -> None:
    """Whatever is imported, the message comes before anything else."""
    copy = other_project / "diffusionkit"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__init__.py").write_text("import os\n")
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        env={**os.environ, "PYTHONPATH": str(other_project), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = "diffusionkit: expected the package of diffusionkit-torch, got "
    lines = done.stdout.splitlines()
    assert [line[: len(expected)] for line in lines] == [expected] * 8, done.stdout
