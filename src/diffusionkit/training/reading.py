"""The step and the extra values of a checkpoint, read before there is a model to load it into."""

from __future__ import annotations

import os

from .._writing import checked_path
from .checkpointing import Checkpoint, _read


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the step and the ``extra`` of a file of `save_checkpoint`, without running code.

    A program that keeps its settings there can rebuild the model from them and then call
    `load_checkpoint`.

    Args:
        path: the file.

    Returns:
        The step and the stored ``extra``, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or not a checkpoint.

    >>> import tempfile
    >>> from torch import nn
    >>> from diffusionkit import read_checkpoint, save_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path, network = f"{folder}/step.pt", nn.Linear(2, 8)
    ...     save_checkpoint(path, network, step=3, extra={"width": 8})
    ...     read_checkpoint(path).extra["width"]
    8
    """
    state = _read(checked_path(path), "cpu")
    return Checkpoint(step=state["step"], extra=state["extra"])
