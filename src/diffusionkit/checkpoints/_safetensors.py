"""Files of the safetensors package, which is optional."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
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
        CheckpointError: if the file is truncated, damaged or of another kind.
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


def safetensors_bytes(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file.

    Args:
        tensors: the tensors by name. Tensors that share memory are written once each.
        about: the metadata.

    Raises:
        ImportError: if the package safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            "writing safetensors files needs the package safetensors: "
            'pip install "diffusionkit-torch[safetensors]"'
        ) from error
    written: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        dense = value.detach().contiguous()
        storage = dense.untyped_storage()
        # The package rejects tensors that share memory.
        if storage.data_ptr() in written or storage.nbytes() > dense.nbytes:
            dense = dense.clone(memory_format=torch.contiguous_format)
        written.add(storage.data_ptr())
        own[name] = dense
    content: bytes = save(own, metadata=dict(about))
    return content
