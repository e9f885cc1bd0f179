"""Network pickles of EDM and EDM2, read without running the source code in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pickle import UnpicklingError
from reprlib import repr
from typing import Any

import numpy as np
from torch import Tensor

from .._files import PICKLE, CheckpointError, load_torch, opened
from .._pickles import Call, Global, Node, run
from .._tensors import GLOBALS

_VERSION = 6
_MODULES = "torch.nn.modules."


@dataclass(frozen=True)
class EDMObject:
    """An object in an EDM pickle, as data.

    Args:
        class_name: the name of its class, such as "EDMPrecond".
        init_args: the positional arguments of its constructor.
        init_kwargs: the keyword arguments; a preconditioned network's include its `model_type`.
        state_dict: the parameters and buffers by torch's names; empty unless it is a module.
    """

    class_name: str
    init_args: tuple[Any, ...]
    init_kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]


class _Persistent(Node):
    """An object whose class is defined by source code in the pickle, which is not read."""


def read_edm_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a network pickle written by the training of EDM or EDM2, without running code.

    Such a pickle carries the source code of its classes, which unpickling would run. Here the
    source is dropped and the objects are returned as data.

    Args:
        path: the file.

    Returns:
        The entries of the pickle: `ema` is an `EDMObject`, as are `loss_fn`, `augment_pipe` and
        `encoder` unless they are None; the others are plain values.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or of another kind, has another version
            or names a global that such pickles do not.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364; Karras et al., 2024, arXiv 2312.02696 (released code of both).
    """
    with opened(path, "a network pickle of EDM", PICKLE) as file:
        data = run(file, _GLOBALS, limit=os.stat(path).st_size)
        if file.read(1):
            raise UnpicklingError("expected the end of the file after the pickle, got more bytes")
        if type(data) is not dict or not isinstance(data.get("ema"), _Persistent):
            raise CheckpointError("a pickle with no network as its entry 'ema'")
        return {key: _public(value) for key, value in data.items()}


def _public(value: Any) -> Any:
    if isinstance(value, _Persistent):
        state = value.state
        args, kwargs = state.get("_init_args"), state.get("_init_kwargs")
        if not isinstance(args, tuple | None) or not isinstance(kwargs, dict | None):
            raise UnpicklingError(f"expected the arguments of {value.name}, got something else")
        tensors = dict(_tensors(value, "")) if "_modules" in state else {}
        return EDMObject(value.name, _public(args or ()), _public(kwargs or {}), tensors)
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_public, value))
    if isinstance(value, Node):
        raise UnpicklingError(f"expected plain values, got an object of {value.name}")
    return value.item() if isinstance(value, np.generic) else value


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module, Node) else None
    if not isinstance(state, dict):
        raise UnpicklingError(f"expected a module at {repr(prefix)}, got {type(module).__name__}")
    hidden = state.get("_non_persistent_buffers_set", ())
    buffers = {key: value for key, value in state["_buffers"].items() if key not in hidden}
    for key, value in (*state["_parameters"].items(), *buffers.items()):
        if value is not None:
            if not isinstance(value, Tensor):
                raise UnpicklingError(f"expected a tensor at {prefix}{key}, got something else")
            yield f"{prefix}{key}", value.detach()
    for key, child in state["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{key}.")


def _persistent(meta: Any) -> _Persistent:
    if type(meta) is not dict or meta.get("type") != "class":
        raise UnpicklingError("expected a persistent class instance, got another object")
    if meta.get("version") != _VERSION:
        raise UnpicklingError(
            f"expected persistence version {_VERSION}, got {repr(meta.get('version'))}"
        )
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or type(state) is not dict:
        raise UnpicklingError("expected the name and the state of an object, got something else")
    return _Persistent(name, state)


def _storage(data: Any) -> Any:
    if type(data) is not bytes:
        raise UnpicklingError(f"expected the bytes of a storage, got {type(data).__name__}")
    return load_torch(BytesIO(data))


def _array(kind: Any, shape: Any, code: Any) -> Node:
    # The encoder of latents in a pickle of EDM2 has arrays, which nobody reads.
    if kind is not _ARRAY or shape != (0,) or code != b"b":
        raise UnpicklingError("expected an array of numpy, got another object")
    return Node("numpy.ndarray")


class _Globals(dict[str, Any]):
    """The globals of such pickles; all classes of torch's modules are among them."""

    def __missing__(self, name: str) -> Any:
        if not name.startswith(_MODULES):
            raise KeyError(name)
        return Call(lambda: Node(name))


_ARRAY = Global()
_GLOBALS = _Globals(GLOBALS)
_GLOBALS |= {
    "dnnlib.util.EasyDict": Call(lambda: {}),
    "torch_utils.persistence._reconstruct_persistent_obj": Call(_persistent),
    "torch.storage._load_from_bytes": Call(_storage),
    "numpy.ndarray": _ARRAY,
    "numpy.core.multiarray._reconstruct": Call(_array),
    "numpy._core.multiarray._reconstruct": Call(_array),
}
