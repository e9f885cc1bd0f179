"""The benchmark of a GPU, in tiny sizes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffusionkit

ROOT = Path(__file__).parents[2]
PARTS = ("resampling", "divisions", "training", "overheads", "graphs", "samplers", "stable_target")


@pytest.mark.parametrize(
    "parts", [("stable_target", "graphs"), pytest.param(PARTS, marks=pytest.mark.slow)]
)
def test_it_runs_without_a_gpu(parts) -> None:
    source = str(Path(diffusionkit.__file__).parents[1])
    command = (sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--only", *parts)
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": source},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert "nan" not in done.stdout
    tables = done.stdout.count("|---")
    assert done.stdout.count("\n## ") == len(parts)
    assert tables >= len(parts) - 2  # nothing is timed of graphs and divisions
