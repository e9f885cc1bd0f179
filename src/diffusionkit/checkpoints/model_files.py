"""Whole score models in one file or folder: description and weights, no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_flag
from .._files import CheckpointError, opened, parsed_json, read_json
from .._model_checks import check_is_model
from .._parts import Description, describe, name_of, place
from .._writing import atomic_write, checked_path, is_safetensors
from ..distributed._sharded import write_whole
from ..distributed._wrappers import bare_modules, bare_state, unwrapped
from ..interfaces import ScoreModel
from ..training.checkpointing import FORMAT as TRAINING
from ..training.checkpointing import _read as read_training
from ._model_builder import built_model, part_named, unknown, value_problem
from ._safetensors import read_safetensors, safetensors_bytes

_FORMAT = "diffusionkit.model"
_VERSION = 1
_JSON = "JSON of a model"
_EXPECTED = "a model written by save_model"
DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"
_OTHER_FORMATS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".json", ".zip", ".npz", ".onnx")
# Before the names of tensors that are arguments and not weights.
_ARGUMENT = "argument:"


def save_model(path: str | os.PathLike[str], model: ScoreModel) -> None:
    """Write a score model with everything that it is made of, for `load_model`.

    The process, the parameterization and its constants, the noise label, the data range, the
    variance, the network's arguments and the weights are written, of guidance and other wrappers
    too. With the ending ``.safetensors`` it is one file, with the description in its metadata.
    Otherwise it is a folder with that file,
    ``model.safetensors``, and a readable copy of the description in ``model.json``. Dtypes are
    kept. Wrappers of torch (torch.compile, DistributedDataParallel) are not saved. Sharded weights
    are gathered in the process that writes: then all ranks must call this.

    Every file is complete before it replaces the previous one. Classes and functions of your own
    must be registered, see `register_part`. For averaged weights pass ``ema.model``.

    Args:
        path: the file or folder.
        model: the score model.

    Raises:
        ImportError: if the package safetensors is not installed.
        TypeError: if model is not a ScoreModel, or one of its parts is not registered or was built
            with other values than numbers, strings, tensors, lists, dictionaries and parts.
        ValueError: if path has the ending of another format, weights are not finite, or the model
            cannot be built again from its arguments.
        OSError: if a file cannot be written; the previous one is left as it was.

    >>> import tempfile
    >>> from diffusionkit import EDMSDE, EDMModel
    >>> from diffusionkit.checkpoints import load_model, save_model
    >>> from diffusionkit.networks import MLP
    >>> model = EDMModel(MLP(2, width=16), EDMSDE(), sigma_data=0.7)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(f"{folder}/moons", model)
    ...     model = load_model(f"{folder}/moons")
    >>> model.sde, model.sigma_data
    (EDMSDE(sigma_min=0.002, sigma_max=80.0), 0.7)
    """
    file = checked_path(path)
    if file.lower().endswith(_OTHER_FORMATS):
        raise ValueError(
            "path: expected a name that ends in .safetensors, or that of a folder, "
            f"got {os.path.basename(file)}"
        )
    model = unwrapped(model) if isinstance(model, nn.Module) else model  # type: ignore[assignment]
    check_is_model(model)
    description = describe(model)
    _check_described(description, model)
    content = {"description": description.tree, "state": dict(bare_state(model))}
    parameters = {name for name, x in bare_state(model, keep_vars=True).items()
                  if isinstance(x, nn.Parameter)}  # fmt: skip
    write_whole(file, content, partial(_write, file, parameters))


def load_model(path: str | os.PathLike[str], *, ema: bool = True) -> ScoreModel:
    """Build the score model of a file or folder of `save_model`, with its weights and dtypes.

    Training checkpoints of `save_checkpoint` are read as well, if the model was made of classes
    with a name. Nothing in a file is executed: it names classes of this library and registered ones
    (see `register_part`), whose modules must have been imported.

    Args:
        path: the file or folder.
        ema: whether to take the averaged weights of a training checkpoint, if it has any.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        ImportError: if the package safetensors is not installed.
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged, of another kind or of a newer version,
            names an unknown class, or has missing, extra, misshapen or invalid entries.
    """
    file = checked_path(path)
    check_flag(ema, "ema")
    if os.path.isdir(file):
        content = _read_folder(file)
    elif _is_zip(file):
        content = _read_training(file, ema)
    else:
        content = _read_file(file)
    return built_model(file, *content).eval()


def _check_described(description: Description, model: ScoreModel) -> None:
    """Raise unless every part has a name that leads back to it, and a file has its weights."""
    if description.problems:
        message = unknown(f"model.{description.problems[0]}").replace("model.model:", "model:")
        raise TypeError(message)
    for at, part in description.found.items():
        if part_named(name := name_of(part)) is not part:
            got = f"{part.__module__}.{part.__qualname__}"
            raise TypeError(
                f"model.{at}: expected a class of diffusionkit or a registered one with a name of "
                f"its own, got {unknown(f'{got}, named {name!r}')}"
            )
    places = dict(bare_modules(model))
    for at, module in description.modules.items():
        if places.get(f"{at}." if at else "") is not module:
            raise TypeError(
                f"model.{at}: expected a module that is a submodule of that name, so that its "
                f"weights are in the state dict, got {type(module).__name__}"
            )


def _write(file: str, parameters: set[str], content: dict[str, Any]) -> None:
    state = content["state"]
    for name, value in state.items():
        if (problem := value_problem(value, name in parameters)) is not None:
            message = f"model: {name}: {problem}"
            raise ValueError(message)
    arguments: dict[str, Tensor] = {}
    tree = _named(content["description"], "", state, arguments)
    tensors = {**state, **arguments}
    try:
        again = describe(built_model(file, tree, tensors, state)).tree
    except CheckpointError as error:
        raise ValueError(
            f"model: expected parts that can be built again from their arguments, got {error}"
        ) from error
    if (where := _first_difference(tree, _named(again, "", state, {}), "model")) is not None:
        raise ValueError(
            f"{where}: expected an attribute with the argument of the constructor, got another "
            "value when the model was built again"
        )
    about = {"format": _FORMAT, "version": str(_VERSION), "model": json.dumps(tree)}
    weights = safetensors_bytes(tensors, about)
    if is_safetensors(file):
        atomic_write(file, lambda out: out.write(weights))
        return
    os.makedirs(file, exist_ok=True)
    text = json.dumps(about | {"version": _VERSION, "model": tree}, indent=2, ensure_ascii=False)
    atomic_write(os.path.join(file, WEIGHTS), lambda out: out.write(weights))
    atomic_write(os.path.join(file, DESCRIPTION), lambda out: out.write(text.encode() + b"\n"))


def _named(node: Any, at: str, state: Mapping[str, Any], arguments: dict[str, Tensor]) -> Any:
    """Return a description with names for its tensors, which are collected in `arguments`."""
    if isinstance(node, Tensor):
        known = state.get(at)
        if isinstance(known, Tensor) and known.dtype == node.dtype and torch.equal(known, node):
            return {"tensor": at}
        arguments[_ARGUMENT + at] = node
        return {"tensor": _ARGUMENT + at}
    if isinstance(node, list):
        return [_named(x, place(at, str(i)), state, arguments) for i, x in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"class", "arguments"}:
        parts = node["arguments"].items()
        named = {key: _named(x, place(at, key), state, arguments) for key, x in parts}
        return {"class": node["class"], "arguments": named}
    if node.keys() == {"dict"}:
        parts = node["dict"].items()
        return {"dict": {k: _named(x, place(at, k), state, arguments) for k, x in parts}}
    return {key: _named(x, at, state, arguments) for key, x in node.items()}


def _first_difference(a: Any, b: Any, at: str) -> str | None:
    """Return the place where two descriptions differ first, None if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        inner = [(x, b[key], at if key == "arguments" else f"{at}.{key}") for key, x in a.items()]
        return next(filter(None, (_first_difference(*pair) for pair in inner)), None)
    return None if a == b else at


def _read_file(file: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    with opened(file, _EXPECTED, "a safetensors file"):
        pass
    tensors, about = read_safetensors(file)
    version = about.get("version", "")
    number = int(version) if version.isascii() and version.isdigit() else None
    _check_format(file, about.get("format"), number)
    tree = parsed_json(file, about.get("model", ""), _JSON)
    state = {name: x for name, x in tensors.items() if not name.startswith(_ARGUMENT)}
    return tree, tensors, state


def _read_folder(folder: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    file = os.path.join(folder, DESCRIPTION)
    for name in (DESCRIPTION, WEIGHTS):
        if not os.path.isfile(os.path.join(folder, name)):
            raise FileNotFoundError(f"no {name} in {folder}")
    about = read_json(file, _JSON)
    if not isinstance(about, dict):
        raise CheckpointError(f"{file}: expected {_EXPECTED}, got {type(about).__name__}")
    _check_format(file, about.get("format"), about.get("version"))
    content = _read_file(os.path.join(folder, WEIGHTS))
    if about.get("model") != content[0]:
        raise CheckpointError(
            f"{file}: expected the description of the model in {WEIGHTS}, got another: one of them "
            f"was changed, or a write was interrupted; {WEIGHTS} alone is a whole model"
        )
    return content


def _check_format(file: str, name: object, version: object) -> None:
    if name != _FORMAT:
        raise CheckpointError(f"{file}: expected {_EXPECTED}, got another kind of file")
    if type(version) is int and version > _VERSION:
        raise CheckpointError(
            f"{file}: expected version {_VERSION} or earlier, got {version}: the file was written "
            "by a newer diffusionkit, which can read it"
        )
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: expected version {_VERSION}, got {version!r:.40}")


def _is_zip(file: str) -> bool:
    if not os.path.isfile(file):
        return False
    with open(file, "rb") as content:
        return content.read(4) == b"PK\x03\x04"


def _read_training(file: str, ema: bool) -> tuple[Any, dict[str, Tensor], Any]:
    content = read_training(file, "cpu")
    if content["description"] is None:
        raise CheckpointError(
            f"{file}: expected a {TRAINING} of version 4, which describes its model, got one of "
            f"version {content['version']}; use load_checkpoint"
        )
    averages = content["ema"] if ema else None
    if averages is not None and "model" not in averages:
        raise CheckpointError(
            f"{file}: expected one average of the weights, got the lengths {list(averages)}; use "
            "load_checkpoint, or ema=False for the last weights"
        )
    return content["description"], {}, content["model"] if averages is None else averages["model"]
