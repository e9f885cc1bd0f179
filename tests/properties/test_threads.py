"""Threads that share a model or the process: none changes what another sees."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

from diffusionkit import load_checkpoint, save_checkpoint


def test_loading_in_threads_keeps_the_warning_filters(tmp_path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, torch.nn.Linear(2, 2))
    before, shown = list(warnings.filters), warnings.showwarning

    def load(_: int) -> None:
        for _ in range(5):
            load_checkpoint(path, torch.nn.Linear(2, 2), restore_random=False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(8)))
    assert warnings.filters == before
    assert warnings.showwarning is shown
