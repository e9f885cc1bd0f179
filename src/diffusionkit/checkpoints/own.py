"""Our own networks in one file that builds them again."""

import json
import os
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .. import networks
from .._files import CheckpointError, assign, atomic_write, check_weights, read_torch
from ._safetensors import read_safetensors

_FORMAT = "diffusionkit.network"
_VERSION = 1
# A wrapper is not a network of its own: what it wraps is saved.
_CLASSES: dict[str, type[nn.Module]] = {
    name: getattr(networks, name) for name in networks.__all__ if name != "FourierFeatures"
}
_EXPECTED = "a network written by save_network"


def save_network(path: str | os.PathLike[str], network: nn.Module) -> None:
    """Write a network of `diffusionkit.networks` to a file, with all that it takes to rebuild it.

    The file is written under a temporary name and renamed. With the ending ``.safetensors`` it is
    a safetensors file, which needs that package; else a file of torch.

    Args:
        path: The file.
        network: The network itself, out of any wrapper.

    Raises:
        TypeError: If it is of another class.
        ValueError: If an argument that it was built with is more than numbers, strings, lists
            and tuples.

    Example:
        >>> import tempfile, torch
        >>> from diffusionkit.checkpoints import load_network, save_network
        >>> from diffusionkit.networks import MLP
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_network(f"{folder}/mlp.pt", MLP(2, width=16))
        ...     load_network(f"{folder}/mlp.pt").config["width"]
        16
    """
    name = type(network).__name__
    if type(network) is not _CLASSES.get(name):
        raise TypeError(
            f"network: expected one of {', '.join(_CLASSES)}, out of any wrapper, "
            f"got {type(network).__module__}.{name}"
        )
    try:
        config = json.dumps(network.config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"network: expected a configuration of plain values, got {network.config}"
        ) from error
    about = {"format": _FORMAT, "version": str(_VERSION), "network": name, "config": config}
    state = {key: value.contiguous() for key, value in network.state_dict().items()}

    def write(file: BinaryIO) -> None:
        if str(path).endswith(".safetensors"):
            file.write(_safetensors(state, about))
        else:
            torch.save(about | {"state": state}, file)

    atomic_write(path, write)


def _safetensors(state: dict[str, Tensor], about: dict[str, str]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            "writing safetensors files needs the package safetensors: "
            'pip install "diffusionkit-torch[safetensors]"'
        ) from error
    content: bytes = save(state, metadata=about)
    return content


def load_network(path: str | os.PathLike[str]) -> nn.Module:
    """Build a network again from a file of `save_network`, weights and data type included.

    Args:
        path: The file.

    Returns:
        The network, in training mode as any new one.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged or foreign, or its parts do not fit together.
    """
    about, state = _read(path)
    if about.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got a foreign file")
    if about.get("version") != str(_VERSION):
        raise CheckpointError(f"{path}: expected version {_VERSION}, got {about.get('version')!r}")
    kind = _CLASSES.get(str(about.get("network")))
    if kind is None:
        raise CheckpointError(
            f"{path}: expected one of {', '.join(_CLASSES)}, got {about.get('network')!r}"
        )
    try:
        config = json.loads(about["config"])
        with torch.device("meta"):  # so that a damaged width asks for no memory
            check_weights(path, "network", kind(**config), state)
        network = kind(**config)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a configuration of {kind.__name__}, got {error}"
        ) from error
    dtypes = {value.dtype for value in state.values()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise CheckpointError(f"{path}: expected floating-point weights, got {dtypes}")
    # Of a network in half precision some tensors stay in float32, by themselves.
    network.to(min(dtypes, key=lambda dtype: dtype.itemsize))
    assign(path, "network", network, state)
    return network


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if str(path).endswith(".safetensors"):
        tensors, about = read_safetensors(path)
        return about, tensors
    data = read_torch(path, expected=_EXPECTED)
    if not isinstance(data, dict) or not isinstance(data.get("state"), dict):
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got a foreign file")
    return data, data["state"]
