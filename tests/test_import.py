"""The side effects of `import diffusionkit`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffusionkit

SOURCE = Path(diffusionkit.__file__).parents[1]
ALLOWED = {"diffusionkit", "einops", "numpy", "torch", "torchdiffeq", "typing_extensions"}

REPORT = """
import json, os, random, sys, threading, time
import torch, torch.utils.checkpoint  # which imports sympy in older versions
start, before, files = time.perf_counter(), set(sys.modules), set(os.listdir())
states = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
settings = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device()
import diffusionkit
seconds = time.perf_counter() - start
assert torch.equal(states[0], torch.get_rng_state())
assert states[1:] == (random.getstate(), torch.get_default_dtype())
assert settings == (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device())
print(json.dumps({
    "seconds": seconds,
    "new": sorted(set(sys.modules) - before),
    "threads": threading.active_count(),
    "files": sorted(set(os.listdir()) - files),
}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """Import the package in a fresh interpreter and an empty folder, and report the effects."""
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPORT],
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path_factory.mktemp("empty"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_loads_core_requirements_only(report) -> None:
    print(f"import diffusionkit, after torch: {report['seconds']:.3f} s")  # noqa: T201
    new = {name.split(".")[0] for name in report["new"]} - sys.stdlib_module_names
    assert "diffusionkit" in new
    assert new <= ALLOWED


@pytest.mark.parametrize(
    "name", ["scipy", "sklearn", "matplotlib", "tqdm", "torchvision", "PIL", "diffusers"]
)
def test_extras_are_not_imported(report, name) -> None:
    """Modules that torch imports are not counted."""
    assert name not in report["new"]


def test_import_leaves_no_threads_or_files(report) -> None:
    assert report["threads"] == 1
    assert report["files"] == []


def test_networks_are_not_imported(report) -> None:
    assert "diffusionkit.sampling" in report["new"]
    assert "diffusionkit.networks" not in report["new"]


def test_public_names_are_sorted_and_complete() -> None:
    names = diffusionkit.__all__
    assert len(names) == len(set(names))
    # The order of ruff: CONSTANTS, Classes, functions.
    assert names == sorted(
        names, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    folders = {path.stem for path in Path(diffusionkit.__file__).parent.iterdir()}
    public = {name for name in dir(diffusionkit) if not name.startswith("_")}
    assert public - folders - {"PackageNotFoundError", "TYPE_CHECKING", "version"} == set(names)


@pytest.mark.parametrize("name", diffusionkit.__all__)
def test_public_name_exists_and_is_documented(name) -> None:
    part = getattr(diffusionkit, name)
    assert part.__doc__
    assert part.__module__.startswith("diffusionkit.")


def test_version_is_a_number() -> None:
    assert diffusionkit.__version__[0].isdigit()
