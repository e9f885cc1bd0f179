"""Files of our own networks, configuration included."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import networks
from .._files import CheckpointError, check_weights, read_torch
from .._weights import check_own_values, check_tensors, fill, laid_out, weight_problems
from .._writing import atomic_write, is_safetensors, save_torch
from ..distributed._sharded import write_whole
from ..distributed._wrappers import bare_class, bare_state, unwrapped
from ._safetensors import read_safetensors, safetensors_bytes

_FORMAT = "diffusionkit.network"
_VERSION = 1
# Of the wrapper FourierFeatures only the wrapped network is saved.
_CLASSES: dict[str, type[nn.Module]] = {
    name: getattr(networks, name) for name in networks.__all__ if name != "FourierFeatures"
}
_EXPECTED = "a network written by save_network"


def save_network(path: str | os.PathLike[str], network: nn.Module) -> None:
    """Write a network of `diffusionkit.networks` to a file, with its configuration.

    The file is complete before it replaces the previous one. With the ending ``.safetensors`` it
    is a safetensors file, which needs that package; otherwise a file of torch. Wrappers of torch
    (torch.compile, DistributedDataParallel) are not saved. Sharded weights are gathered in the
    process that writes: then all ranks must call this.

    Args:
        path: the file.
        network: the network.

    Raises:
        TypeError: if the network is of another class.
        ValueError: if it was built with anything but numbers, strings, lists and tuples, or its
            weights are not finite.
        OSError: if the file cannot be written; the previous one is left as it was.

    >>> import tempfile
    >>> from diffusionkit.checkpoints import load_network, save_network
    >>> from diffusionkit.networks import MLP
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_network(f"{folder}/mlp.pt", MLP(2, width=16))
    ...     load_network(f"{folder}/mlp.pt").config["width"]
    16
    """
    network = unwrapped(network) if isinstance(network, nn.Module) else network
    kind = bare_class(network)
    name = kind.__name__
    if kind is not _CLASSES.get(name):
        raise TypeError(
            f"network: expected one of {', '.join(_CLASSES)}, got {kind.__module__}.{name}"
        )
    try:
        config = json.dumps(network.config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"network: expected a configuration of plain values, got {network.config}"
        ) from error
    about = {"format": _FORMAT, "version": str(_VERSION), "network": name, "config": config}
    write_whole(path, dict(bare_state(network)), partial(_write, path, about))


def _write(path: str | os.PathLike[str], about: dict[str, str], weights: dict[str, Any]) -> None:
    state = {key: value.contiguous() for key, value in weights.items()}
    for key, problem in weight_problems(state).items():
        message = f"network: {key}: {problem}"
        raise ValueError(message)
    if is_safetensors(path):
        atomic_write(path, lambda file: file.write(safetensors_bytes(state, about)))
    else:
        save_torch(path, about | {"state": state})


def load_network(path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild a network from a file of `save_network`, weights and dtype included.

    Args:
        path: the file.

    Returns:
        The network, in training mode like any new one.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or of another kind, or its parts do not fit
            together.
    """
    about, state = _read(path)
    if about.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got another kind of file")
    if about.get("version") != str(_VERSION):
        raise CheckpointError(f"{path}: expected version {_VERSION}, got {about.get('version')!r}")
    kind = _CLASSES.get(str(about.get("network")))
    if kind is None:
        raise CheckpointError(
            f"{path}: expected one of {', '.join(_CLASSES)}, got {about.get('network')!r}"
        )
    try:
        config = json.loads(about["config"])
        network = laid_out(path, partial(kind, **config), state)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a configuration of {kind.__name__}, got {error}"
        ) from error
    check_weights(path, "network", network, state)
    check_tensors(path, "network", state)
    check_own_values(path, state)
    # A network in half precision keeps some of its tensors in float32.
    fill(network, {key: value.clone() for key, value in state.items()})
    return network


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if is_safetensors(path):
        tensors, about = read_safetensors(path)
        return about, tensors
    data = read_torch(path, expected=_EXPECTED)
    if not isinstance(data, dict) or not isinstance(data.get("state"), dict):
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got another kind of file")
    return data, data["state"]
