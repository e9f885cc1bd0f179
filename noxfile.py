"""Every job of the project: lint, types, tests, slow, docs, quickstart, bench.

Each session makes an environment of its own under .nox, from the pinned versions of
constraints.txt, and keeps it for the next time.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "docs"]

PINNED = ("-c", "constraints.txt")


def install(session: nox.Session, extra: str) -> None:
    """Install the library with one of its extras."""
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
    """Run the tests, without the slow ones."""
    install(session, "dev")
    # One thread for each of the processes: tensors are small, and threads would wait for others.
    parallel = ("-n", "auto", "-m", "not slow")
    session.run("pytest", *parallel, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def slow(session: nox.Session) -> None:
    """Run the slow tests."""
    install(session, "dev")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors, and execute every snippet in it."""
    install(session, "docs")
    for builder in ("html", "doctest"):
        target = f"docs/_build/{builder}"
        session.run("sphinx-build", "-W", "--keep-going", "-b", builder, "docs", target)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a score model on real digits, sample it and draw the result."""
    install(session, "examples")
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark by name, all of them by default."""
    install(session, "examples")
    every = ["sampler_overhead", "fir", "networks", "likelihood", "stf", "metrics"]
    for name in session.posargs or every:
        session.run("python", f"benchmarks/{name}.py")
