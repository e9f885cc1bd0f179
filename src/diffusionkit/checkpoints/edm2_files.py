"""Network pickles of EDM2, the code of Karras et al., 2024."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice
from .._files import CheckpointError
from .._weights import laid_out, weight_problems
from ..models import EDMModel
from ..networks import EDM2UNet
from ..sde import EDMSDE
from ._edm_arguments import PRECONDITIONINGS, check_argument
from ._edm_keys import EDMObject, read_edm_pickle
from ._transfer import Source, by_kind, matrix, transfer

_REQUIRED = {"img_resolution": 1, "img_channels": 1, "label_dim": 0}
_DEFAULTS: dict[str, Any] = {
    "use_fp16": True,
    "sigma_data": 0.5,
    "logvar_channels": 128,
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": (16, 8),
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "resample_filter": (1, 1),
    "channels_per_head": 64,
    "dropout": 0.0,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256.0,
}
_ONLY_DEFAULT = ("channel_mult_noise", "channel_mult_emb", "resample_filter")
# The range of the data by the encoder that makes them of images; latents have none.
_RANGES = {"StandardRGBEncoder": (-1.0, 1.0), "StabilityVAEEncoder": None}
_BLOCK = {
    "conv_1": "conv_res0",
    "embedding": "emb_linear",
    "conv_2": "conv_res1",
    "shortcut": "conv_skip",
}


def load_edm2(path: str | os.PathLike[str]) -> EDMModel:
    """Load a network pickle of EDM2, with its averaged weights, ready to sample.

    Such a pickle carries source code, which unpickling would run. It is never unpickled: a
    restricted reader extracts the tensors and arguments and raises an error that names anything
    else. Loading is strict: missing, extra or misshapen tensors raise an error that lists them.
    The weights, in float16 in the file, are loaded in float32. The network for the uncertainty,
    which is only used in training, is checked and dropped.

    Args:
        path: the file, a published network or a snapshot of training.

    Returns:
        The `EDMModel` of an `EDM2UNet` on `EDMSDE`, in evaluation mode. Images are in [-1, 1]. For
        a model of latents `data_range` is None; it takes those of Stable Diffusion's autoencoder,
        standardized per channel and halved.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, malicious or of another kind, or holds another
            network.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024,
    arXiv 2312.02696.
    """
    content = read_edm_pickle(path)
    ema: EDMObject = content["ema"]
    try:
        if ema.class_name != "Precond":
            hint = "; use load_edm" if ema.class_name in PRECONDITIONINGS else ""
            raise ValueError(f"class_name: expected 'Precond', got {ema.class_name!r:.50}{hint}")
        encoder = content.get("encoder")
        kind = encoder.class_name if isinstance(encoder, EDMObject) else None
        check_choice("encoder", kind, tuple(_RANGES))
        options = _arguments(ema)
        network = laid_out(path, partial(_network, options), ema.state_dict)
        sources = dict(_sources(network, options["img_resolution"]))
        tensors = {n.removeprefix("unet."): x for n, x in ema.state_dict.items()}
        _drop_uncertainty(tensors, options["logvar_channels"])
        transfer(path, network, sources, tensors)
        return EDMModel(
            network, EDMSDE(), options["sigma_data"], data_range=_RANGES[str(kind)]
        ).eval()
    except CheckpointError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: expected a known network of EDM2, got {error}") from error


def _arguments(ema: EDMObject) -> dict[str, Any]:
    """Return the validated arguments of the network, defaults included."""
    if ema.init_args:
        raise ValueError(f"init_args: expected keyword arguments, got {len(ema.init_args)} others")
    given, known = ema.init_kwargs, _REQUIRED | _DEFAULTS
    for name in (*_REQUIRED, *given):
        if name not in given:
            raise ValueError(f"{name}: expected a number, got none")
        if name not in known:
            raise ValueError(f"init_kwargs: expected arguments of EDM2, got {name!r:.50}")
        value, default = given[name], known[name]
        if name in _ONLY_DEFAULT:
            if (tuple(value) if isinstance(value, list) else value) != default:
                raise ValueError(f"{name}: expected {default}, got {value!r:.50}")
        elif not (name == "clip_act" and value is None):
            check_argument(name, value, default)
    found = known | given
    levels, size = len(found["channel_mult"]), found["img_resolution"]
    if levels and size >> (levels - 1) < 1:
        raise ValueError(f"img_resolution: expected {levels} different halvings, got {size}")
    return found


def _drop_uncertainty(tensors: dict[str, Tensor], channels: int) -> None:
    """Remove the tensors of the network for the uncertainty, or raise unless they are valid."""
    names = ("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight")
    faults = weight_problems(tensors)
    for name, shape in zip(names, ((channels,), (channels,), (1, channels)), strict=True):
        tensor = tensors.pop(name, None)
        got = "none" if tensor is None else tuple(tensor.shape)
        if got != shape:
            raise ValueError(f"{name}: expected a tensor of shape {shape}, got {got}")
        if name in faults:
            message = f"{name}: {faults[name]}"
            raise ValueError(message)


def _network(given: Mapping[str, Any]) -> EDM2UNet:
    """Build the network inside a preconditioning."""
    size, multipliers = given["img_resolution"], tuple(given["channel_mult"])
    attended = given["attn_resolutions"]
    return EDM2UNet(
        given["img_channels"],
        width=given["model_channels"],
        multipliers=multipliers,
        blocks=given["num_blocks"],
        attention_levels=tuple(i for i in range(len(multipliers)) if size >> i in attended),
        head_channels=given["channels_per_head"],
        num_classes=given["label_dim"] or None,
        **{name: given[name] for name in ("dropout", "clip_act")},
        **{f"{n}_balance": given[f"{n}_balance"] for n in ("label", "concat", "res", "attn")},
    )


def _sources(network: EDM2UNet, size: int) -> Iterator[tuple[str, Source]]:
    """Yield the source of each tensor of a network for images of a resolution."""
    net: Any = network
    fourier = ("emb_fourier.freqs", "emb_fourier.phases")
    yield "embedding.noise_features.frequencies", Source(fourier, _rows)
    yield "embedding.linear.weight", Source(("emb_noise.weight",))
    yield "embedding.classes.weight", Source(("emb_label.weight",))
    yield "input.weight", Source((f"enc.{size}x{size}_conv.weight",))
    yield "head.conv.weight", Source(("out_conv.weight",))
    yield "head.gain", Source(("out_gain",), _one)
    for ours, theirs in _stages(net, size):
        for mine, other in _BLOCK.items():
            yield f"{ours}.block.{mine}.weight", Source((f"{theirs}.{other}.weight",))
        yield f"{ours}.block.gain", Source((f"{theirs}.emb_gain",), _one)
        attention = net.get_submodule(ours).attention
        if attention is not None:
            make = partial(by_kind, heads=attention.heads, order="head channel kind")
            yield f"{ours}.attention.qkv.weight", Source((f"{theirs}.attn_qkv.weight",), make)
            yield f"{ours}.attention.out.weight", Source((f"{theirs}.attn_proj.weight",), matrix)


def _stages(net: Any, size: int) -> Iterator[tuple[str, str]]:
    """Yield our name and the foreign name of each stage."""
    last = len(net.encoder) - 1
    for level, encoder in enumerate(net.encoder):
        theirs = f"enc.{size >> level}x{size >> level}"
        if level > 0:
            yield f"downs.{level - 1}", f"{theirs}_down"
        for b in range(len(encoder.stages)):
            yield f"encoder.{level}.stages.{b}", f"{theirs}_block{b}"
    for i in range(2):
        yield f"middle.{i}", f"dec.{size >> last}x{size >> last}_in{i}"
    for i, decoder in enumerate(net.decoder):
        theirs = f"dec.{size >> (last - i)}x{size >> (last - i)}"
        if i > 0:
            yield f"ups.{i - 1}", f"{theirs}_up"
        for b in range(len(decoder.stages)):
            yield f"decoder.{i}.stages.{b}", f"{theirs}_block{b}"


def _rows(frequencies: Tensor, phases: Tensor) -> Tensor:
    return torch.stack([frequencies, phases])


def _one(gain: Tensor) -> Tensor:
    if gain.ndim:
        raise ValueError("expected a number")
    return gain.reshape(1)
