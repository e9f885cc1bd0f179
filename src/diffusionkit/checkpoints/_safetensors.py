"""Files of the safetensors package, which is optional."""

from __future__ import annotations

import os

from torch import Tensor

from .._files import SAFETENSORS, opened


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    The format holds no code and no checksums.

    Args:
        path: the file.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        ImportError: if the package safetensors is not installed.
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or foreign.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "reading safetensors files needs the package safetensors: "
            'pip install "diffusionkit-torch[safetensors]"'
        ) from error
    with (
        opened(path, "a safetensors file", SAFETENSORS),
        safe_open(path, framework="pt") as archive,
    ):
        # Copied: the tensors are mapped from the file, which may be overwritten.
        tensors = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118
        return tensors, archive.metadata() or {}
