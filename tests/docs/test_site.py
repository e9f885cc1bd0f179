"""The site leads to every page and every example, and its links to code find their objects."""

import re
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = (DOCS / "index.md").read_text(encoding="utf-8")
GALLERY = (DOCS / "gallery.md").read_text(encoding="utf-8")
FOLDERS = ("api", "coming_from", "engines", "tutorials")  # their index pages list what is in them
PAGES = sorted({path.stem for path in DOCS.glob("*.md")} - {"index"})
EXAMPLES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "examples").glob("**/*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("page", [*PAGES, *(f"{folder}/index" for folder in FOLDERS)])
def test_readme_and_first_page_lead_to_every_page(page) -> None:
    assert f"](docs/{page}.md)" in README
    assert re.search(rf"{{doc}}`(?:[^`<]*<)?{page}>?`", INDEX)


@pytest.mark.parametrize("folder", ["coming_from", "tutorials"])
def test_readme_leads_to_every_page_of_a_folder(folder) -> None:
    for path in (DOCS / folder).glob("*.md"):
        assert f"](docs/{folder}/{path.name})" in README


def test_every_folder_of_pages_has_an_index() -> None:
    folders = {path.parent.name for path in DOCS.glob("*/*.md")} - {"tables", "_build"}
    assert folders == set(FOLDERS)
    assert all((DOCS / folder / "index.md").exists() for folder in FOLDERS)


def test_links_of_the_readme_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(targets) > 30
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_gallery_has_every_example(example) -> None:
    assert example in GALLERY


def test_the_gallery_has_every_picture_with_a_description() -> None:
    shown = re.findall(r"```\{image\} _static/(\S+)\n:alt: \S", GALLERY)
    elsewhere = {"glyphs.png", "digits.png"}  # the data set, and what the first page draws
    assert sorted(shown) == sorted(
        {path.name for path in (DOCS / "_static").glob("*.png")} - elsewhere
    )


def test_inline_code_that_names_one_object_is_found(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    from code_names import finder

    sys.modules.pop("code_names")
    entry = namedtuple("Entry", "page aliased objtype", defaults=[False, "class"])
    find = finder(
        {
            "kit.Model": entry("models"),
            "kit.models.network.Model": entry("models", aliased=True),
            "kit.Model.predict": entry("models"),
            "kit.nets": entry("networks", objtype="module"),
            "kit.nets.MLP": entry("networks"),
            "kit.a.load": entry("a"),
            "kit.b.load": entry("b"),
            "kit.features": entry("features"),
        }
    )
    pages = {
        "models": ("Model", "kit.Model", "Model(net, sde)", "Model.predict", "Model.predict()"),
        "networks": ("MLP", "nets.MLP", "kit.nets.MLP(2)"),
        "a": ("a.load", "kit.a.load(path)"),
        "features": ("features()", "kit.features"),
    }
    for page, names in pages.items():
        assert [find(name).page for name in names] == [page] * len(names)
    for code in ("load", "load()", "predict", "features", "Model + 1", "x.Model", "", "3"):
        assert find(code) is None


def test_the_reference_by_task_names_documented_objects() -> None:
    documented = set()
    for page in (DOCS / "api").glob("*.md"):
        directives = r"^\.\. auto(?:class|function|exception):: (\S+)"
        documented |= set(re.findall(directives, page.read_text(encoding="utf-8"), re.MULTILINE))
    table = (DOCS / "api" / "index.md").read_text(encoding="utf-8").partition("## By task")[2]
    names = re.findall(r"`([A-Za-z]\w+)(?:\.\w+|\(\))?`", table)
    assert len(names) > 80
    assert sorted(set(names) - documented) == []
