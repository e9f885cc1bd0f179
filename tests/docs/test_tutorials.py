"""The tutorials: text notebooks whose pages show all that a reader has to type."""

import ast
import builtins
import os
import re
import subprocess
import symtable
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.md"), key=lambda path: path.name)
NOTEBOOKS = [path for path in NOTEBOOKS if path.name != "index.md"]
HEADER = re.compile(
    r"---\nfile_format: mystnb\n"
    r"kernelspec:(\n  name: python3\n  display_name: python3"
    r"| {name: python3, display_name: python3})\n"
    r"---\n+# [^\n]+\n+"
)
MOST_COLUMNS = 76

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class Cell(NamedTuple):
    """A code cell: its first line in the file, its options, and its code without magic lines."""

    line: int
    options: str
    code: str

    @property
    def hidden(self) -> bool:
        return "remove-cell" in self.options


def cells(text: str) -> list[Cell]:
    found = []
    for match in re.finditer(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", text, re.M | re.S):
        body = match[1]
        options = re.match(r"(---\n.*?^---\n|(:[^\n]*\n)*)", body, re.M | re.S)[0]
        code = re.sub(r"^%.*$", "", body.removeprefix(options), flags=re.M)
        line = text[: match.start(1)].count("\n") + options.count("\n") + 1
        found.append(Cell(line, options, code))
    return found


def undefined(code: str) -> set[str]:
    """Names that a program reads and nowhere defines, in whatever scope."""
    table = symtable.symtable(code, "notebook", "exec")
    scopes = [table]
    for scope in scopes:
        scopes += scope.get_children()
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    read = {
        s.get_name()
        for scope in scopes
        for s in scope.get_symbols()
        if s.is_referenced() and (scope is table or s.is_global())
    }
    return read - defined - set(dir(builtins)) - {"__name__"}


def without_hidden(path: Path) -> list[Cell]:
    return [cell for cell in cells(path.read_text()) if not cell.hidden]


def test_there_are_notebooks_and_the_index_names_each():
    index = (TUTORIALS / "index.md").read_text()
    assert len(NOTEBOOKS) >= 5
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in index] == []


@each_notebook
def test_header_makes_the_file_a_notebook(path):
    text = path.read_text()
    header = HEADER.match(text)
    assert header is not None
    first = text[header.end() :].split("\n\n")[0]
    assert first[0].isupper(), "a tutorial begins with a paragraph"


@each_notebook
def test_every_fence_with_code_is_a_cell_that_parses(path):
    text = path.read_text()
    assert text.count("\n```{code-cell} ipython3\n") == len(cells(text)) > 5
    for cell in cells(text):
        try:
            ast.parse(cell.code)
        except SyntaxError as error:
            pytest.fail(f"line {cell.line + error.lineno - 1}: {error.msg}")


@each_notebook
def test_no_line_of_code_is_cut(path):
    long = [
        f"line {cell.line + i}: {len(line)} columns"
        for cell in without_hidden(path)
        for i, line in enumerate(cell.code.splitlines())
        if len(line) > MOST_COLUMNS
    ]
    assert long == []


@each_notebook
def test_visible_cells_define_all_names_they_use(path):
    assert undefined("\n".join(cell.code for cell in without_hidden(path))) == set()


@each_notebook
def test_names_are_imported_before_use_and_explicitly(path):
    code = ""
    for cell in without_hidden(path):
        code += cell.code + "\n"
        assert undefined(code) == set(), f"the cell at line {cell.line} uses a name too early"
    stars = [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    assert stars == []


@each_notebook
def test_figures_are_shown(path):
    """Without the call, a page shows the value of a cell's last line beside the figure."""
    drawing = [cell for cell in without_hidden(path) if "plt.subplots(" in cell.code]
    assert drawing
    wrong = [cell.line for cell in drawing if not cell.code.endswith("plt.show()\n")]
    assert wrong == [], "lines of cells that do not end with plt.show()"


@each_notebook
def test_seeds_are_fixed(path):
    code = "\n".join(cell.code for cell in without_hidden(path))
    assert "manual_seed(" in code


@each_notebook
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.slow
@each_notebook
def test_runs_from_top_to_bottom_without_a_warning(path, tmp_path):
    script = tmp_path / "notebook.py"
    code = "\n".join(cell.code for cell in cells(path.read_text()))
    script.write_text(code)
    environment = {**os.environ, "MPLBACKEND": "agg"}
    environment.pop("DISPLAY", None)  # with one, agg warns that it cannot show a figure
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_name_defined_nowhere_is_found():
    assert undefined("def f(x):\n    return x + y\n") == {"y"}
    assert undefined("import a\nfor b in a: print([c for c in b])") == set()
