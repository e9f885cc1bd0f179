"""Runs of a program in two processes of torch.distributed."""

import subprocess
import sys

START = """
import sys
import torch
from datetime import timedelta
from torch import distributed as dist

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
"""


def run_in_two_processes(program: str, folder) -> None:
    """Run a program that may use `rank`, `folder`, `torch` and `dist`."""
    command = [sys.executable, "-c", START + program + "dist.destroy_process_group()"]
    running = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in (0, 1)]
    assert [process.wait(timeout=100) for process in running] == [0, 0]
