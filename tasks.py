"""Run nox sessions on a machine with only Python 3.11 or newer and git.

    python3 tasks.py quickstart      train, sample, save a picture
    python3 tasks.py tests           run the tests
    python3 tasks.py lint types tests docs

Installs the pinned nox into .venv beside this file; nox creates the other environments.
Arguments after `--` are passed to the session: python3 tasks.py quickstart -- --sde ve.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")


def main(arguments: list[str]) -> int:
    """Install nox if it is missing and run the sessions."""
    if sys.version_info < (3, 11):
        sys.exit(f"expected Python 3.11 or newer, got {sys.version.split()[0]}")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    sessions, rest = arguments[:split], arguments[split:]
    if not sessions or any(name.startswith("-") for name in sessions):
        print(__doc__)
        return 2
    nox = BIN / ("nox.exe" if os.name == "nt" else "nox")
    if not nox.exists():
        venv.create(VENV, with_pip=True, clear=VENV.exists())
        pip = [str(BIN / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "nox"], check=True)
    command = [str(nox), "-f", str(ROOT / "noxfile.py"), "-s", *sessions, *rest]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
