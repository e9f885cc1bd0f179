"""Thousands of damaged files: each is read or rejected, without side effects."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parent
KINDS = ["zip", "legacy", "edm", "safetensors"]


@pytest.fixture
def folder(tmp_path, saved, pickled, torch_content, edm_content) -> Path:
    """Whole files of every format, small and larger."""
    safetensors = pytest.importorskip("safetensors.torch")
    small = {"w": torch.ones(3), "lr": np.float64(0.1), "n": [1, (2.0, None), {"a": "b"}]}
    tensors = nn.Linear(3, 2).state_dict()
    files = {
        "zip-small": saved(small),
        "zip-large": saved(torch_content),
        "legacy-small": saved(small, legacy=True),
        "legacy-large": saved(torch_content, legacy=True),
        "edm-4": pickled(edm_content, 4),
        "edm-2": pickled(edm_content, 2),
        "safetensors-1": safetensors.save(tensors),
        "safetensors-2": safetensors.save(tensors, {"note": "x"}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def report_of(program: str, *arguments: object) -> dict[str, Any]:
    """Run a program of this folder in a process of its own."""
    command = [sys.executable, "-W", "error", FOLDER / program, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), *sys.path])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(folder: Path, seed: int, count: int) -> None:
    report = report_of("fuzzing.py", folder, seed, count)
    assert not report["failures"]
    assert not report["seen"]
    assert report["slowest"] < 1.0  # seconds of the processor
    assert report["grown"] < 100 * 2**20
    results = report["results"]
    assert sum(results.values()) == 8 * count
    # Most mutations damage the file.
    assert all(results[f"{kind} rejected"] > 0.8 * count for kind in KINDS)


def test_damaged_files_are_read_or_rejected(folder) -> None:
    check(folder, seed=0, count=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_files_are_read_or_rejected(folder, seed) -> None:
    check(folder, seed, count=1500)


# An empty set and a set of one number, and rows that overlap by less than a mebibyte.
HARMLESS = {"builtins.set of b')'1", "builtins.set of b']'4006", "overlapping rows"}


def test_hostile_files_are_refused_in_little_time_and_memory(tmp_path) -> None:
    report = report_of("hostile.py", tmp_path, "readers")
    assert report["count"] > 600
    assert not report["failures"]
    assert not report["slow"]
    # Some fields of a zip file mean nothing here; the program compares what it reads.
    read = {name for name in report["read"] if not name.startswith("archive")}
    assert {name.split(": ")[1] for name in read} <= HARMLESS


@pytest.mark.slow
def test_all_loaders_refuse_hostile_files(tmp_path) -> None:
    report = report_of("hostile.py", tmp_path, "loaders")
    assert not report["failures"]
    assert not report["slow"]
    assert not report["read"]
