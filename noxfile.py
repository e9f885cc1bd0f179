"""The tasks of the project: lint, types, tests, slow, docs, quickstart, bench.

Each session installs the versions pinned in constraints.txt into a separate environment under .nox
and reuses it.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "docs"]

PINNED = ("-c", "constraints.txt")


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
    parallel = ("-n", "auto", "-m", "not slow")
    session.run("pytest", *parallel, *session.posargs, env={"OMP_NUM_THREADS": "1"})


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
