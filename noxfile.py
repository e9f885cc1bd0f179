"""Every job of the project: lint, types, tests, slow, docs, quickstart, bench.

The sessions that import the library share one environment, made from the pinned versions of
constraints.txt.
"""

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "docs"]

SHARED = ".nox/diffusionkit"
PINNED = ("-c", "constraints.txt")


def install(session: nox.Session) -> None:
    """Install the library and everything its jobs use."""
    session.install(*PINNED, "-e", ".[dev,docs]")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(venv_location=SHARED)
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session)
    session.run("mypy")


@nox.session(venv_location=SHARED)
def tests(session: nox.Session) -> None:
    """Run the tests, without the slow ones."""
    install(session)
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session(venv_location=SHARED)
def slow(session: nox.Session) -> None:
    """Run the slow tests."""
    install(session)
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session(venv_location=SHARED)
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors, and execute every snippet in it."""
    install(session)
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "doctest", "docs", "docs/_build/doctest")


@nox.session(venv_location=SHARED)
def quickstart(session: nox.Session) -> None:
    """Train a score model on real digits, sample it and draw the result."""
    install(session)
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session(venv_location=SHARED)
def bench(session: nox.Session) -> None:
    """Run a benchmark by name, all of them by default."""
    install(session)
    for name in session.posargs or ["sampler_overhead"]:
        session.run("python", f"benchmarks/{name}.py")
