"""The direction of the dependencies, and a few rules for every file."""

import ast
import functools
from collections import Counter
from pathlib import Path

import pytest

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


def imports(tree: ast.AST, path: Path) -> set[str]:
    """The full names of all modules that a file imports, wherever in it."""
    package = ["diffusionkit", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import part` names the part after `import`.
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT)))
def source(request) -> tuple[Path, ast.AST]:
    return request.param, parsed(request.param)


def test_dependencies_point_one_way(source) -> None:
    path, tree = source
    part = part_of(path)
    own = {name.split(".")[1] for name in imports(tree, path) if name.startswith("diffusionkit.")}
    top = {*MAY_IMPORT, *(part_of(other) for other in FILES)}
    assert part in MAY_IMPORT, f"{part}: say in MAY_IMPORT where it belongs"
    assert own & top <= MAY_IMPORT[part] | {part}


def test_the_table_has_no_cycle() -> None:
    """Every part can be put after all that it imports."""
    placed: set[str] = set()
    while ready := {p for p, needs in MAY_IMPORT.items() if needs <= placed} - placed:
        placed |= ready
    assert placed == set(MAY_IMPORT)


def test_rules_for_every_file(source) -> None:
    path, tree = source
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert"
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), f"line {node.lineno}"
    assert not any(name.split(".")[0] == "torchvision" for name in imports(tree, path))


def test_nothing_changes_the_warning_filters_of_the_process(source) -> None:
    """`warnings.catch_warnings` in two threads leaves one thread's filters behind for good."""
    _, tree = source
    changing = {"catch_warnings", "simplefilter", "filterwarnings", "resetwarnings"}
    used = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}
    assert not used & changing


def test_imports_inside_the_package_are_relative(source) -> None:
    _, tree = source
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level or (node.module or "").split(".")[0] != "diffusionkit", node.lineno


def test_module_names_are_unique() -> None:
    """One subject, one name: no two modules differ only in their folder or an underscore."""
    names = Counter(path.stem.lstrip("_") for path in FILES if path.name != "__init__.py")
    assert [name for name, times in names.items() if times > 1] == []


def test_docstrings_do_not_open_with_a_question(source) -> None:
    _, tree = source
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            assert text.split()[0] not in {"What", "Who", "Which", "How", "Where"}, text


def test_loggers_have_one_name(source) -> None:
    _, tree = source
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and "getLogger" in ast.unparse(node.value):
            assert ast.unparse(node) == "logger = logging.getLogger(__name__)"


def test_errors_name_what_was_expected(source) -> None:
    """`name: expected ..., got ...` in the first words of every ValueError and TypeError."""
    _, tree = source
    for node in ast.walk(tree):
        error = getattr(node, "exc", None) if isinstance(node, ast.Raise) else None
        if getattr(getattr(error, "func", None), "id", "") in {"ValueError", "TypeError"}:
            text = ast.unparse(error)
            assert "expected" in text or text.endswith("(message)"), f"line {node.lineno}: {text}"


def test_networks_know_no_sde(source) -> None:
    path, tree = source
    if part_of(path) in ("ops", "networks", "metrics"):
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"ForwardSDE", "ScoreModel", "Prediction", "Perturbed"}


def test_the_process_is_never_asked_for_its_class(source) -> None:
    """No isinstance on an SDE's class outside its own file: only on the interface."""
    path, tree = source
    if part_of(path) == "sde":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not any(name.endswith("SDE") for name in names - {"ForwardSDE"})
