"""Processes of one gloo group."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

START = """
import sys
from datetime import timedelta
import torch
from torch import distributed as dist

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world,
                        timeout=timedelta(seconds=60))
"""
END = """
torch.save(result, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def skip_without_sharding_on_cpu() -> None:
    """Skip a test whose network is sharded and called on the CPU, where torch cannot do that."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard of torch 2.6 runs on GPUs only")


def run_in_processes(count: int, program: str, folder: Path) -> list[Any]:
    """Return what a program, given `rank`, `world` and `folder`, assigns to `result` on each rank.

    Args:
        count: the number of processes.
        program: the program.
        folder: an existing folder, in which the processes meet.
    """
    (folder / "meet").unlink(missing_ok=True)
    command = [sys.executable, "-c", START + program + END]
    ranks = range(count)
    running = [subprocess.Popen([*command, str(r), str(count), str(folder)]) for r in ranks]
    assert [process.wait(timeout=300) for process in running] == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in ranks]


def run_in_two_processes(program: str, folder: Path) -> list[Any]:
    """Return what a program assigns to `result` on each of two ranks."""
    return run_in_processes(2, program, folder)
