"""Processes of one gloo group, forked from a server that imported torch once."""

import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "diffusionkit"])


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
    arguments = [(program, rank, count, str(folder)) for rank in range(count)]
    running = [CONTEXT.Process(target=run_program, args=values) for values in arguments]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=300)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()  # one that still waits for others
    assert codes == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def run_in_two_processes(program: str, folder: Path) -> list[Any]:
    """Return what a program assigns to `result` on each of two ranks."""
    return run_in_processes(2, program, folder)


def run_program(program: str, rank: int, count: int, folder: str) -> None:
    """Join the group, run a program, and save its `result`."""
    torch.set_num_threads(1)
    meet, timeout = f"file://{folder}/meet", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count, timeout=timeout)
    names = {"__name__": "program", "torch": torch, "dist": dist}
    names |= {"rank": rank, "world": count, "folder": folder}
    exec(compile(program, f"<rank {rank}>", "exec"), names)
    torch.save(names["result"], f"{folder}/{rank}.pt")
    sys.stdout.flush()
    # A DDP module that is freed after its group may wait for the threads of the group forever.
    os._exit(0)
