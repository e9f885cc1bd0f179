"""The files for GitHub and pre-commit agree with pyproject.toml, constraints.txt and noxfile.py."""

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / ".github").is_dir():
    pytest.skip("a source distribution has no workflows", allow_module_level=True)

CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
RELEASE = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def only(pattern: str, text: str) -> str:
    """The one match of a pattern: an edit that the pattern no longer fits is a failure."""
    (match,) = re.findall(pattern, text, re.MULTILINE)
    return match


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_ruff_of_pre_commit_is_the_pinned_one() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert only(r"/ruff-pre-commit\n +rev: v(\S+)", hooks) == only(r"^ruff==(\S+)$", pins)


def test_lowest_python_is_the_one_that_users_may_have() -> None:
    lowest = PROJECT["requires-python"].removeprefix(">=")
    matrix = re.findall(r'"([\d.]+)"', only(r"^ +python: \[(.+)\]$", CI))
    # The oldest torch has no wheels for new Pythons.
    oldest = only(r'- python: "([\d.]+)"\n +torch: oldest$', CI)
    assert min(matrix, key=minor) == oldest == lowest


def test_classified_pythons_are_those_of_the_matrix() -> None:
    classifiers = "\n".join(PROJECT["classifiers"])
    classified = re.findall(r"^Programming Language :: Python :: (\d+\.\d+)$", classifiers, re.M)
    assert classified == re.findall(r'"([\d.]+)"', only(r"^ +python: \[(.+)\]$", CI))


def test_oldest_torch_is_the_lower_bound() -> None:
    (requirement,) = (r for r in PROJECT["dependencies"] if re.match(r"torch\b", r))
    lower = only(r">=\s*([\d.]+)", requirement)
    command = shlex.split(only(r"\$\((sed .+pyproject\.toml)\)$", CI))
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == f"torch=={lower}\n"


def test_version_that_a_release_compares_with_its_tag() -> None:
    command = shlex.split(only(r"\$\((sed .+pyproject\.toml)\)$", RELEASE))
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == f"{PROJECT['version']}\n"


def test_sessions_exist() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    exist = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("nox.session" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    named = set(only(r"^ +session: \[(.+)\]$", CI).split(", "))
    for line in re.findall(r"run: python3 tasks\.py (.+)", CI):
        if line != "${{ matrix.session }}":
            named |= set(line.split(" -- ")[0].split())
    assert named <= exist
    assert {"lint", "types", "docs", "slow"} <= named
