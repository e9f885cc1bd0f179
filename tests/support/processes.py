"""Two processes of one gloo group."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

START = """
import sys
from datetime import timedelta
import torch
from torch import distributed as dist

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
"""
END = """
torch.save(result, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def run_in_two_processes(program: str, folder: Path) -> list[Any]:
    """Return what a program, given `rank` and `folder`, assigns to `result` on each rank."""
    command = [sys.executable, "-c", START + program + END]
    running = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in (0, 1)]
    assert [process.wait(timeout=100) for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
