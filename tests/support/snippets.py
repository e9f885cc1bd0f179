"""The programs in docstrings and on pages, and the names that they use without defining them."""

import ast
import builtins
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<kind>.*)\n(?P<body>(?:.*\n)*?)(?P=ticks)$", re.MULTILINE)
OPTIONS = re.compile(r"---\n(?:.*\n)*?---\n|(?::.*\n)*")
EXECUTED = ("{testsetup}", "{testcode}", "{doctest}", "{code-cell} ipython3")
SNIPPETS = ("{testsetup}", "{testcode}", "{testoutput}", "{doctest}", "{code-cell}")
_EXAMPLES = doctest.DocTestParser()
_DEFERRED = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield every docstring of the package that has an example, with its file and its object."""
    package = ROOT / "src" / "diffusionkit"
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if ">>>" in source else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                text = ast.get_docstring(node)
                if text and ">>>" in text:
                    name = getattr(node, "name", "module")
                    yield f"{path.relative_to(package).as_posix()}:{name}", text


def pages() -> list[Path]:
    """Return the pages that people read, the README among them."""
    found = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
    return sorted([*found, ROOT / "README.md"])


def lines_of_code(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line in a block of code, output, shell or text."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        kind = match["kind"].strip()
        if not kind.startswith("{") or kind.split()[0] in ("{code-block}", *SNIPPETS):
            options = OPTIONS.match(match["body"])[0]
            first = text.count("\n", 0, match.start("body") + len(options)) + 1
            yield from enumerate(match["body"][len(options) :].splitlines(), first)


def program(page: Path) -> str:
    """Return the visible Python code of a page that is executed, from top to bottom."""
    code = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        kind, body = match["kind"].strip(), match["body"]
        options = OPTIONS.match(body)[0]
        hidden = kind == "{testsetup}" or re.search(":hide:|remove-cell|remove-input", options)
        if kind in EXECUTED or (page.name, kind) == ("README.md", "python"):
            body = body[len(options) :]
            if ">>> " in body:
                body = "".join(part.source for part in _EXAMPLES.get_examples(body))
            # Commands of notebooks are no Python.
            code += [] if hidden else [re.sub(r"^[%!].*$", "pass", body, flags=re.MULTILINE)]
    return "\n".join(code)


def undefined(source: str) -> list[str]:
    """Return the names that a program uses before it defines or imports them.

    What a function or a lambda uses may be defined later in the program.
    """
    known, missing, later = set(dir(builtins)) | {"__name__"}, [], []
    for statement in ast.parse(source).body:
        now, inside = _loads(statement)
        known |= _bound(statement)
        missing += [name for name in now if name not in known]
        later += inside
    return sorted({*missing, *(name for name in later if name not in known)})


def _bound(statement: ast.stmt) -> set[str]:
    """Return all names that a statement binds, in whatever scope."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


def _loads(node: ast.AST, deferred: bool = False) -> tuple[list[str], list[str]]:
    """Return the names that are read when a statement runs, and those read by calls later."""
    now: list[str] = []
    later: list[str] = []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        (later if deferred else now).append(node.id)
    for child in ast.iter_child_nodes(node):
        body = isinstance(node, _DEFERRED) and not isinstance(child, ast.arguments)
        a, b = _loads(child, deferred or body)
        now += a
        later += b
    return now, later
