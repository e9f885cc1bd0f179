"""The tasks of the project: lint, types, tests, oldest, slow, docs, quickstart, bench.

Each session installs the versions pinned in constraints.txt into a separate environment under .nox
and reuses it.
"""

import json
import re
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "docs"]

PINNED = ("-c", "constraints.txt")
OLD_TORCH = ("2.6.0", "2.8.0")  # the first is the lower bound of pyproject.toml
# This project, torch, and what its wheels with CUDA bring.
WITH_TORCH = re.compile(r"(diffusionkit-torch|torch|triton)$|nvidia-|cuda-")


def install(session: nox.Session, extra: str) -> None:
    """Install the library with an extra."""
    session.install(*PINNED, "-e", f".[{extra}]")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "dev")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests except the slow ones."""
    install(session, "dev")
    # One thread per process: tensors are small, and more threads would compete for cores.
    parallel = ("-n", "auto", "--dist", "worksteal", "-m", "not slow")
    session.run("pytest", *parallel, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize("torch", OLD_TORCH, ids=OLD_TORCH)
def oldest(session: nox.Session, torch: str) -> None:
    """Run the tests with an old torch, on Linux.

    Its wheels require gigabytes of CUDA libraries, which are neither installed nor needed here.
    """
    if sys.platform != "linux":
        session.skip("the stand-ins for the CUDA libraries are made on Linux only")
    temporary = Path(session.create_tmp())
    report, stubs = temporary / "report.json", temporary / "stubs"
    session.install("--no-deps", f"torch=={torch}")
    resolve = ("python", "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report))
    session.run(*resolve, *PINNED, ".[dev]")
    found = [part["metadata"] for part in json.loads(report.read_text())["install"]]
    others = [part for part in found if not WITH_TORCH.match(part["name"])]
    session.install("--no-deps", "-e", ".", *(f"{p['name']}=={p['version']}" for p in others))
    session.run("python", "tests/scripts/cuda_stubs.py", str(stubs))
    env = {"OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": str(stubs)}
    parallel = ("-n", "auto", "--dist", "worksteal", "-m", "not slow")
    session.run("pytest", *parallel, *session.posargs, env=env)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the slow tests."""
    install(session, "dev")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation with warnings as errors and execute its notebooks and snippets."""
    install(session, "docs")
    build = ("sphinx-build", "-W", "--keep-going", "-d", "docs/_build/doctrees")
    session.run(*build, "-E", "-b", "html", "docs", "docs/_build/html")
    # The pages are read, and notebooks executed, once.
    session.run(*build, "-b", "doctest", "docs", "docs/_build/doctest")


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a score model on real digits, sample it, and save a picture."""
    install(session, "examples")
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run benchmarks by name, or all of them."""
    install(session, "examples")
    names = sorted(path.stem for path in Path("benchmarks").glob("*.py"))
    for name in session.posargs or names:
        session.run("python", f"benchmarks/{name}.py")
