import logging
import os
import signal

import torch
from support.processes import run_in_two_processes
from torch import nn

from diffusionkit import load_checkpoint, save_checkpoint
from diffusionkit.training import CheckpointFolder, StopSignals


def saved(checkpoints, *steps):
    for step in steps:
        save_checkpoint(checkpoints.path(step), nn.Linear(2, 2), step=step)


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(tmp_path, caplog):
    checkpoints = CheckpointFolder(tmp_path / "run" / "checkpoints")
    assert checkpoints.newest() is None
    saved(checkpoints, 5, 100_000_000, 20, 30, 40)
    assert checkpoints.steps() == [5, 20, 30, 40, 100_000_000]
    content = bytearray(checkpoints.path(100_000_000).read_bytes())
    content[len(content) // 2] ^= 255
    checkpoints.path(100_000_000).write_bytes(content)
    checkpoints.path(40).write_bytes(b"")
    torch.save({"step": 30}, checkpoints.path(30))
    (checkpoints.folder / "step-00000050.pt.tmp").touch()
    with caplog.at_level(logging.WARNING):
        newest = checkpoints.newest()
    assert newest == checkpoints.path(20)
    assert load_checkpoint(newest, nn.Linear(2, 2)).step == 20
    assert [r.getMessage().split("step-")[1][:8] for r in caplog.records] == [
        "10000000",
        "00000040",
        "00000030",
    ]


def test_the_last_ones_are_kept_and_later_ones_do_not_count(tmp_path):
    """A run that skipped a damaged file of a later step does not lose what it has just saved."""
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    saved(checkpoints, 1, 2, 3, 4)
    checkpoints.path(9).write_bytes(b"damaged")
    checkpoints.keep_last(4)
    assert checkpoints.steps() == [3, 4, 9]


PROGRAM = """
from pathlib import Path
from torch import nn
from diffusionkit import save_checkpoint
from diffusionkit.training import CheckpointFolder

checkpoints = CheckpointFolder(Path(folder) / "run" if rank == 0 else Path(folder) / "other")
if rank == 0:
    save_checkpoint(checkpoints.path(3), nn.Linear(2, 2), step=3)
found = checkpoints.newest()
result = found.name, found.parent.name
"""


def test_processes_go_on_from_the_same_checkpoint(tmp_path):
    """The answer of the first, even where a slow file system shows another nothing yet."""
    assert run_in_two_processes(PROGRAM, tmp_path) == [("step-00000003.pt", "run")] * 2


def test_the_first_signal_is_remembered_and_the_next_acts(tmp_path):
    # A program started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as stop:
            assert stop.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == "SIGTERM"
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_act_as_before_after_the_block():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append("mine"))
    try:
        with StopSignals([signal.SIGUSR1]) as stop:
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (received, stop.received) == (["mine"], None)
    finally:
        signal.signal(signal.SIGUSR1, before)
