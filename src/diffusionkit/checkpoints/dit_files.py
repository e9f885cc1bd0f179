"""Checkpoints of DiT and SiT, the codes of Peebles and Xie, 2023, and of Ma et al., 2024."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_flag
from .._files import CheckpointError, read_torch
from .._pickles import Call, Node
from .._tensors import GLOBALS
from .._weights import laid_out, unwrapped, weight_problems
from ..models import EpsModel, ReverseTimeLabel, StepLabel, VelocityModel
from ..models.network import NetworkModel
from ..networks import DiT
from ..networks.dit import HEADS
from ..networks.positions import sincos_positions
from ..sde import DDPMChain, FlowMatchingSDE
from ._transfer import Source, rename, sines_first, transfer

_EXPECTED = "a state dict of DiT, or a checkpoint of its training, {model, ema, opt, args}"
_STEPS = 1000
_POSITIONS = "pos_embed"
_PATCHES = ("x_embedder.proj.weight", "x_embedder.proj.bias")
# Averaging rounds the table, and half precision does.
_TOLERANCE = 2e-3
_BLOCK = {
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "feed_forward.linear_1": "mlp.fc1",
    "feed_forward.linear_2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
_OTHERS = {
    "embedding.linear_1": "t_embedder.mlp.0",
    "embedding.linear_2": "t_embedder.mlp.2",
    "input": "x_embedder.proj",
    "head.modulation": "final_layer.adaLN_modulation.1",
    "head.linear": "final_layer.linear",
}
# The options of a training program stay a placeholder with their values.
_KNOWN = {**GLOBALS, "argparse.Namespace": Call(lambda: Node("argparse.Namespace"))}


def load_dit(
    path: str | os.PathLike[str], *, ema: bool = True, heads: int | None = None
) -> NetworkModel:
    """Load a checkpoint of DiT, ready to sample latents.

    The file is read without running its code, and strictly: missing, extra or misshapen tensors
    raise an error that lists them. It is a published one, which holds the averaged weights alone,
    or one of the training program.

    The model predicts the noise and the variance of the steps of the linear chain of 1000 steps.
    Its data are latents (B, 4, H/8, W/8) of Stable Diffusion's autoencoder, times .18215. Other
    sizes than the file's can be sampled, but the network has not been trained on their positions.

    Args:
        path: the file.
        ema: whether to load the averaged weights of a training checkpoint rather than the last
            ones; a state dict has one set.
        heads: number of attention heads, for a width that no published network has; the file
            does not contain it.

    Returns:
        The score model in evaluation mode. It takes ``class_labels=``, of which the last stands
        for no class: 1000 in the published networks, for
        ``ClassifierFreeGuidance(model, 4.0, null={"class_labels": 1000})``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, malicious or of another kind, has learned
            positions, or does not fit the network.
        ValueError: if the number of heads is needed, or does not divide the width.
        TypeError: if heads is not an integer or ema not True or False.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023, arXiv 2212.09748.
    """
    tensors, given = _read(path, ema)
    if "path_type" in given:
        raise CheckpointError(
            f"{path}: expected a checkpoint of DiT, got one of SiT, a flow; use load_sit"
        )
    network = _network(path, tensors, heads)
    return EpsModel(
        network,
        DDPMChain.linear(_STEPS),
        label=StepLabel(_STEPS),
        variance="learned_range" if network.config["learn_sigma"] else "fixed_large",
    ).eval()


def load_sit(
    path: str | os.PathLike[str], *, ema: bool = True, heads: int | None = None
) -> NetworkModel:
    """Load a checkpoint of SiT, the transformer of DiT trained as a flow, ready to sample latents.

    See `load_dit` for the file and the latents. The network was trained to predict the velocity x0
    - eps on a straight line, at a time that counts from the noise to the data. Here it is a
    `VelocityModel` on a `FlowMatchingSDE`, with a `ReverseTimeLabel`, and the sign of its last
    layer is reversed. SiT uses only the first half of the network's output; the other half is
    dropped. Files of DiT and SiT have the same tensors: a state dict does not tell them apart.

    Args:
        path: the file.
        ema: whether to load the averaged weights of a training checkpoint rather than the last
            ones; a state dict has one set.
        heads: number of attention heads, for a width that no published network has.

    Returns:
        The score model in evaluation mode. It takes ``class_labels=``, of which the last stands
        for no class.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, malicious or of another kind, has learned
            positions, does not fit the network, or was trained on another path or for another
            prediction.
        ValueError: if the number of heads is needed, or does not divide the width.
        TypeError: if heads is not an integer or ema not True or False.

    Source: Ma et al., SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
    Interpolant Transformers, 2024, arXiv 2401.08740.
    """
    tensors, given = _read(path, ema)
    if given and "path_type" not in given:
        raise CheckpointError(
            f"{path}: expected a checkpoint of SiT, got one of another program; use load_dit"
        )
    for name, wanted in (("path_type", "Linear"), ("prediction", "velocity")):
        value = given.get(name, wanted)
        if not isinstance(value, str) or value != wanted:
            raise CheckpointError(f"{path}: {name}: expected {wanted!r}, got {value!r:.80}")
    network = _network(path, tensors, heads, turned=True)
    return VelocityModel(network, FlowMatchingSDE(), label=ReverseTimeLabel()).eval()


def _network(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    heads: int | None,
    *,
    turned: bool = False,
) -> DiT:
    """Build the network in a file, with its first output alone and of the other sign if turned."""
    if heads is not None:
        check_count(heads, "heads")
    some = {name: tensors[name] for name in (_POSITIONS, *_PATCHES) if name in tensors}
    problem = weight_problems(some).get(_POSITIONS)
    if problem is not None:
        raise CheckpointError(f"{path}: {_POSITIONS}: {problem}")
    try:
        if any(tensor.numel() == 0 for tensor in tensors.values()):
            raise ValueError("expected tensors with elements, got an empty one")
        options = _options({name: tuple(t.shape) for name, t in tensors.items()})
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got other names or shapes") from error
    options["heads"] = _heads(options["width"], heads)
    _check_positions(path, tensors.pop(_POSITIONS, None), options["width"])
    sources = _sources(options["depth"])
    if turned:
        halves = 2 if options["learn_sigma"] else 1
        options["learn_sigma"] = False
        for part in ("weight", "bias"):
            name = f"final_layer.linear.{part}"
            turn = partial(_turned, channels=options["channels"], halves=halves)
            sources[f"head.linear.{part}"] = Source((name,), turn)
    try:
        network = laid_out(path, partial(DiT, **options), tensors)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got {error}") from error
    transfer(path, network, sources, tensors)
    return network


def _turned(x: Tensor, channels: int, halves: int) -> Tensor:
    """Return the rows of a last layer for the first half of the channels, negated."""
    rows = x.reshape(-1, halves * channels, *x.shape[1:])[:, :channels]
    return -rows.reshape(-1, *x.shape[1:])


def _read(path: str | os.PathLike[str], ema: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the tensors in a file, and the options of the training program, if there are any."""
    check_flag(ema, "ema")
    data = read_torch(path, expected=_EXPECTED, known=_KNOWN)
    given = getattr(data.get("args"), "state", None) if isinstance(data, Mapping) else None
    sets = [name for name in ("model", "ema") if _is_mapping(data, name)]
    if sets:
        entry = "ema" if ema else "model"
        if entry not in sets:
            raise CheckpointError(f"{path}: expected a state dict under {entry!r}, got none")
        data = data[entry]
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got {type(data).__name__}")
    others = [name for name, value in data.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: expected {_EXPECTED}, got a {type(data).__name__} with the entries "
            f"{', '.join(others[:6]):.200}, which are no tensors"
        )
    return unwrapped(path, data), given if isinstance(given, Mapping) else {}


def _is_mapping(data: Any, name: str) -> bool:
    return isinstance(data, Mapping) and isinstance(data.get(name), Mapping)


def _options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the arguments of the network, from the shapes of its tensors."""
    width, channels, *patch = shapes["x_embedder.proj.weight"]
    height, across = patch
    out = shapes["final_layer.linear.weight"][0]
    learned, fixed = 2 * channels * height * across, channels * height * across
    if out not in (learned, fixed):
        raise ValueError(f"expected {fixed} or {learned} outputs, got {out}")
    found = (re.match(r"blocks\.(\d{1,4})\.", name) for name in shapes)
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    return {
        "channels": channels,
        "patch_size": height if height == across else (height, across),
        "width": width,
        "depth": len({match[1] for match in found if match}),
        "mlp_ratio": hidden / width,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0],
        "learn_sigma": out == learned,
    }


def _heads(width: int, heads: int | None) -> int:
    found = HEADS.get(width) if heads is None else heads
    if found is None:
        raise ValueError(
            f"heads: expected the number of heads of a network of width {width}, which is none of "
            "the published ones, got None; pass heads=..."
        )
    if width % found:
        raise ValueError(f"heads: expected a divisor of the width, {width}, got {found}")
    return found


def _check_positions(path: str | os.PathLike[str], table: Tensor | None, width: int) -> None:
    """Raise unless the table of positions in a file is the one that the network computes."""
    if table is None:
        raise CheckpointError(f"{path}: the file does not fit the network, missing {_POSITIONS}")
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if table.shape != (1, side * side, width):
        raise CheckpointError(
            f"{path}: {_POSITIONS}: expected shape (1, n^2, {width}), got {tuple(table.shape)}"
        )
    expected = sincos_positions((side, side), width, torch.empty(0))
    error = float((table[0].float() - expected).abs().max())
    if not error < _TOLERANCE:
        raise CheckpointError(
            f"{path}: {_POSITIONS}: expected the sines and cosines of the positions, got a table "
            f"that differs by {error:.3g}"
        )


def _sources(depth: int) -> dict[str, Source]:
    """Return the source of each tensor of a network."""
    sources = rename("", "", _OTHERS)
    sources["embedding.linear_1.weight"] = Source(("t_embedder.mlp.0.weight",), sines_first)
    sources["embedding.classes.weight"] = Source(("y_embedder.embedding_table.weight",))
    sources["input.weight"] = Source(
        ("x_embedder.proj.weight",), partial(torch.flatten, start_dim=1)
    )
    for i in range(depth):
        sources |= rename(f"blocks.{i}.", f"blocks.{i}.", _BLOCK)
    return sources
