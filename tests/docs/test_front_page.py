"""The program on the front page runs, and trains a model of the quality that the page documents."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
INCLUDED = '```{literalinclude} ../README.md\n:language: python\n:start-after: "```python"\n'


def program() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return text


def run(source: str, folder: Path, monkeypatch) -> dict[str, object]:
    """Execute a program in an empty namespace, in a folder."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "README.md", "exec"), names)
    return names


@pytest.fixture
def requirements() -> None:
    for requirement in ("PIL", "sklearn"):
        pytest.importorskip(requirement)


@pytest.mark.parametrize("page", ["index", "quickstart"])
def test_pages_show_the_program_of_the_readme(page) -> None:
    assert INCLUDED in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def test_the_picture_above_the_program_is_what_it_saves() -> None:
    (saved,) = re.findall(r'save_grid\(.*"(.*?)"', program())
    for page, folder in (("README.md", "docs/_static"), ("docs/index.md", "_static")):
        above = (ROOT / page).read_text(encoding="utf-8").partition("## A complete example")[2]
        assert f"{folder}/{saved}" in above.partition("```python")[0]


def test_the_program_is_short_and_runs(requirements, tmp_path, monkeypatch, capsys) -> None:
    lines = program().splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 76
    short, source = {"steps = 1200": "steps = 3", "steps=100": "steps=2"}, program()
    for long, few in short.items():
        assert source.count(long) == 1
        source = source.replace(long, few)
    names = run(source, tmp_path, monkeypatch)
    assert names["samples"].shape == (64, 1, 8, 8)
    assert names["samples"].isfinite().all()
    assert names["ema"].updates == 3
    assert "step 0, loss" in capsys.readouterr().out

    from PIL import Image

    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (960, 240)
        with Image.open(ROOT / "docs" / "_static" / "digits.png") as shown:
            assert shown.size == picture.size


@pytest.mark.slow
def test_the_program_reaches_the_documented_quality(requirements, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    before = set(sys.modules)
    import digits as measures

    for name in {"digits", "helpers"} - before:
        sys.modules.pop(name)  # other tests must not find them
    digits = measures.load()
    quality = measures.Quality(digits)
    train = measures.pixels(digits.train).reshape(-1, 8, 8)  # the test digits are held out
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: SimpleNamespace(images=train))
    names = run(program(), tmp_path, monkeypatch)
    images = measures.pixels(names["sampler"]((500, 1, 8, 8)))

    # Documented: 82% to 84%, at least 7.4%, 36% to 41%, .011 to .017. Worse than any of a few seeds
    # fails; a Gaussian has 33% and .050, the program of EpsModel with LikelihoodWeighting .137.
    assert quality.confident(images) > 0.76
    assert quality.shares(images).min() > 0.05
    assert 0.25 < quality.near_training(images) < 0.5
    assert quality.energy_distance(images) < 0.022
