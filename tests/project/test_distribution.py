"""The distributions: the README on the page of an index, and what the README runs."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HATCH = SETTINGS["tool"]["hatch"]
TARGET = re.compile(r"\]\(([^)\s]*)[^)]*\)|\b(?:src|href)=[\"']([^\"']*)")


def relative(text: str) -> list[str]:
    """The targets of links and pictures that need a file beside the page."""
    targets = ["".join(found) for found in TARGET.findall(re.sub(r"(?s)```.*?```", "", text))]
    return [target for target in targets if not target.startswith(("https://", "#"))]


def long_description() -> str:
    """What hatch-fancy-pypi-readme makes of the README."""
    text = README
    for rule in HATCH["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_long_description_has_no_relative_target() -> None:
    text = long_description()
    assert relative("![a](b.png) [c](d/e.md) <img src='f.png'>") == ["b.png", "d/e.md", "f.png"]
    assert relative(README)
    assert relative(text) == []
    assert "![" not in text
    # Nothing but targets, pictures and their captions is lost.
    for line in README.splitlines():
        if not re.search(r"[\[*]", line):
            assert line in text.splitlines()
    for title in re.findall(r"(?<!!)\[([^\]]+)\]\([^)]*\)", README):
        assert title in text


def test_installation_page_has_every_extra_and_the_lowest_versions() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    project = SETTINGS["project"]
    assert set(project["optional-dependencies"]) <= set(re.findall(r"(?m)^\| `(\w+)` \|", page))
    (torch,) = (r for r in project["dependencies"] if re.match(r"torch\b", r))
    assert f"| PyTorch | {torch.partition('>=')[2]} or newer |" in page
    assert f"| Python | {project['requires-python'].removeprefix('>=')} to " in page


def test_relative_targets_of_the_readme_exist() -> None:
    for target in relative(README):
        assert (ROOT / target.partition("#")[0]).exists(), target


def commands(text: str) -> list[list[str]]:
    """The lines of the shell blocks of a page, in words, without comments."""
    blocks = re.findall(r"(?s)```sh\n(.*?)```", text)
    lines = [line.partition(" #")[0].split() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def included(path: str) -> bool:
    """Whether a file of the repository is in the source distribution."""
    folders = [name.lstrip("/") for name in HATCH["build"]["targets"]["sdist"]["include"]]
    return any(path == f or path.startswith(f"{f}/") for f in folders)


def test_source_distribution_has_what_the_readme_runs() -> None:
    sessions = set(re.findall(r"(?m)^def (\w+)\(session", (ROOT / "noxfile.py").read_text()))
    programs = [words for words in commands(README) if words[0].startswith("python")]
    assert programs
    for _, program, *rest in programs:
        if program == "-m":
            continue
        assert (ROOT / program).is_file()
        assert included(program)
        if program == "tasks.py":
            assert set(rest[: rest.index("--") if "--" in rest else None]) <= sessions
    # tasks.py installs the pinned nox and runs noxfile.py, which installs pinned versions and runs
    # these scripts.
    named = re.findall(r'"([\w/]+\.(?:py|txt))"', (ROOT / "noxfile.py").read_text())
    for path in ("README.md", "LICENSE", "constraints.txt", "noxfile.py", *named):
        assert (ROOT / path).is_file()
        assert included(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel, built as a release is."""
    folder = tmp_path_factory.mktemp("distributions")
    tools = folder / "tools"
    requires = SETTINGS["build-system"]["requires"]
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", tools, *requires)
    build = (sys.executable, "-m", "hatchling", "build", "-d", folder)
    run(*build, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tools)})
    return folder


def run(*command, status: int = 0, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_metadata_of_the_wheel(built) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert "diffusionkit/py.typed" in archive.namelist()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == long_description().strip()


@pytest.mark.slow
def test_commands_of_the_readme_start_in_the_source_distribution(built, tmp_path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    assert (root / "README.md").read_text(encoding="utf-8") == README
    env = {**os.environ, "PYTHONPATH": str(root / "src")}
    assert "quickstart" in run(sys.executable, "tasks.py", cwd=root, env=env, status=2)
    for words in commands(README):
        if words[0] == "python" and words[1].startswith("examples/"):
            run(sys.executable, words[1], "--help", cwd=root, env=env)
