"""The direction of the dependencies, and a few rules for every file."""

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import diffusionkit

ROOT = Path(diffusionkit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each part may import, beside itself.
PRIVATE = {
    "_batch_conditions", "_batch_times", "_checks", "_coefficients", "_data_range", "_gaussian",
    "_grid_times", "_hints", "_kept", "_keywords", "_log_snr", "_loops", "_nfe", "_precision",
    "_ones", "_repr", "_returned", "_schedules", "_sigma_data", "_tracing", "_units",
    "distributed", "random",
}  # fmt: skip
BASE = {*PRIVATE, "values", "interfaces", "_masks", "_model_checks"}
CORE = {*BASE, "_chain_terms", "_flow_solver", "decoders", "sde", "models"}
MAY_IMPORT = {
    "_requirements": set(),
    "_batch_conditions": set(),
    "_batch_times": {"_schedules", "_tracing"},
    "_hints": set(),
    "_keywords": set(),
    "_checks": {"_hints", "_tracing"},
    "_data_range": {"_checks", "distributed"},
    "distributed": {"_checks", "_requirements"},
    "_schedules": {"_tracing"},
    "_sigma_data": {"_checks", "_kept", "_schedules"},
    "_gaussian": {"_precision", "_schedules"},
    "_coefficients": {"_ones", "_tracing"},
    "_ones": {"_tracing"},
    "_tracing": set(),
    "_units": set(),
    "_grid_times": {"_batch_times", "_checks", "_coefficients", "_kept", "_schedules"},
    "_kept": {"_requirements", "_tracing"},
    "_log_snr": {"_coefficients"},
    "_loops": {"distributed"},
    "_nfe": {"_batch_conditions"},
    "_masks": {"_checks", "_precision", "_schedules"},
    "_precision": {"_checks"},
    "_returned": set(),
    "random": {"_checks"},
    "_repr": {"distributed"},
    "values": {"_checks", "_coefficients", "_precision", "_repr"},
    "interfaces": {*PRIVATE, "values"},
    "_model_checks": {"_checks", "interfaces"},
    "decoders": BASE,
    "_chain_terms": {*BASE, "decoders"},
    "_flow_solver": BASE,
    "_pickles": set(),
    "_plain_globals": {"_pickles"},
    "_tensors": {"_pickles", "_plain_globals"},
    "_archives": set(),
    "_files": {"_archives", "_pickles", "_tensors"},
    "_writing": set(),
    "_parts": {"distributed"},
    "_weights": {"_files"},
    "sde": BASE,
    "models": {*BASE, "sde"},
    "_magnitude": {"_checks", "_coefficients", "distributed"},
    "training": {*CORE, "_files", "_magnitude", "_parts", "_weights", "_writing"},
    "sampling": {*CORE, "_files", "_writing"},
    "likelihood": {*CORE, "_files", "_writing"},
    "control": {*CORE, "training", "sampling", "likelihood"},
    "testing": CORE,
    "diagnostics": {*CORE, "training"},
    "calibration": {"_checks", "_masks", "_precision", "_repr", "random"},
    "ops": {"_checks", "_kept", "_tracing"},
    "networks": {
        "_checks",
        "_coefficients",
        "_hints",
        "_kept",
        "_keywords",
        "_magnitude",
        "_repr",
        "_tracing",
        "ops",
    },
    "checkpoints": {
        *CORE,
        "control",
        "networks",
        "ops",
        "training",
        "_files",
        "_parts",
        "_pickles",
        "_tensors",
        "_weights",
        "_writing",
    },
    "interop": {*CORE, "sampling", "_files"},
    "data": {"_checks", "_repr", "distributed", "_writing", "random"},
    "metrics": {
        *("_checks", "_files", "_hints", "_loops", "_repr", "_writing"),
        *("data", "distributed", "random"),
    },
    "__init__": {*CORE, "_requirements", "training", "sampling", "likelihood", "control"},
}


def part_of(path: Path) -> str:
    """The folder or file directly in the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


# The names of all parts, those of files without an entry in the table included.
PARTS = {*MAY_IMPORT, *(part_of(path) for path in FILES)}


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> set[str]:
    """The full names of all modules that a file imports, wherever in it."""
    package = ["diffusionkit", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import part` names the part after `import`.
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def for_every_file(rule: Callable[[Path], Iterable[str]]) -> Callable[[], None]:
    """Make a test of a rule that yields the breaches in a file: it lists those in all files."""

    def test() -> None:
        found = [f"{path.relative_to(ROOT)}: {breach}" for path in FILES for breach in rule(path)]
        assert not found, "\n".join(found)

    test.__doc__ = rule.__doc__
    return test


@for_every_file
def test_dependencies_point_one_way(path: Path) -> Iterator[str]:
    part = part_of(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("diffusionkit.")}
    if part not in MAY_IMPORT:
        yield "say in MAY_IMPORT where it belongs"
    yield from (own & PARTS) - MAY_IMPORT.get(part, set()) - {part}


def test_the_table_has_no_cycle() -> None:
    """Every part can be put after all that it imports."""
    placed: set[str] = set()
    while ready := {p for p, needs in MAY_IMPORT.items() if needs <= placed} - placed:
        placed |= ready
    assert placed == set(MAY_IMPORT)


@for_every_file
def test_rules_for_every_file(path: Path) -> Iterator[str]:
    if len(path.read_text().splitlines()) > 400:
        yield "more than 400 lines"
    for node in nodes(path):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            yield f"line {node.lineno}: print"
    if any(name.split(".")[0] == "torchvision" for name in imports(path)):
        yield "imports torchvision"


@for_every_file
def test_nothing_changes_the_warning_filters_of_the_process(path: Path) -> Iterable[str]:
    """`warnings.catch_warnings` in two threads leaves one thread's filters behind for good."""
    changing = {"catch_warnings", "simplefilter", "filterwarnings", "resetwarnings"}
    return changing & {getattr(node, "attr", getattr(node, "id", None)) for node in nodes(path)}


@for_every_file
def test_imports_inside_the_package_are_relative(path: Path) -> Iterator[str]:
    for node in nodes(path):
        absolute = isinstance(node, ast.ImportFrom) and not node.level
        if absolute and node.module.split(".")[0] == "diffusionkit":
            yield f"line {node.lineno}: {node.module}"


def test_module_names_are_unique() -> None:
    """One subject, one name: no two modules differ only in their folder or an underscore."""
    names = Counter(path.stem.lstrip("_") for path in FILES if path.name != "__init__.py")
    assert [name for name, times in names.items() if times > 1] == []


@for_every_file
def test_docstrings_do_not_open_with_a_question(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in nodes(path):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and text.split()[0] in {"What", "Who", "Which", "How", "Where"}:
            yield text


@for_every_file
def test_loggers_have_one_name(path: Path) -> Iterator[str]:
    for node in nodes(path):
        text = ast.unparse(node) if isinstance(node, ast.Assign) else ""
        if "getLogger" in text and text != "logger = logging.getLogger(__name__)":
            yield text


@for_every_file
def test_errors_name_what_was_expected(path: Path) -> Iterator[str]:
    """`name: expected ..., got ...` in the first words of every ValueError and TypeError."""
    for node in nodes(path):
        error = getattr(node, "exc", None) if isinstance(node, ast.Raise) else None
        if getattr(getattr(error, "func", None), "id", "") in {"ValueError", "TypeError"}:
            text = ast.unparse(error)
            if "expected" not in text and not text.endswith("(message)"):
                yield f"line {node.lineno}: {text}"


@for_every_file
def test_networks_know_no_sde(path: Path) -> Iterable[str]:
    if part_of(path) not in ("ops", "networks", "metrics"):
        return ()
    names = {node.id for node in nodes(path) if isinstance(node, ast.Name)}
    return names & {"ForwardSDE", "ScoreModel", "Prediction", "Perturbed"}


@for_every_file
def test_the_process_is_never_asked_for_its_class(path: Path) -> Iterator[str]:
    """No isinstance on an SDE's class outside its own file: only on the interface."""
    for node in nodes(path) if part_of(path) != "sde" else ():
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            yield from (name for name in names - {"ForwardSDE"} if name.endswith("SDE"))
