"""Checkpoints of improved-diffusion and guided-diffusion, by Nichol and Dhariwal, 2021."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from .._checks import check_count, check_number
from .._files import CheckpointError, read_torch
from .._weights import laid_out, unwrapped
from ..models import EpsModel, StepLabel, X0Model
from ..models.network import NetworkModel
from ..networks import ADMUNet
from ..networks.blocks import ResidualBlock
from ..networks.resampling import ConvDownsample
from ..sde import DDPMChain
from ._transfer import Source, attention, rename, sines_first, transfer

_EXPECTED = "a state dict of improved-diffusion or guided-diffusion"
_BLOCK = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "shortcut": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_NEW_ORDER, _LEGACY_ORDER = "kind head channel", "head kind channel"
# The released defaults of the flags that leave no trace in the tensors.
_DEFAULTS: dict[str, Any] = {
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "use_new_attention_order": False,
    "dropout": 0.0,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": True,
    "predict_xstart": False,
    "sigma_small": False,
}
_MOST_STEPS = 100_000
# Flags of training and sampling, and flags that the tensors determine.
_WITHOUT_EFFECT = {
    "attention_resolutions",
    "channel_mult",
    "image_size",
    "large_size",
    "rescale_learned_sigmas",
    "small_size",
    "timestep_respacing",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
}


def load_improved_diffusion(path: str | os.PathLike[str], **flags: Any) -> NetworkModel:
    """Load a checkpoint of improved-diffusion or guided-diffusion, ready to sample.

    The file is read without running its code, and strictly: missing, extra or misshapen tensors
    raise an error that lists them. The released code saves averaged weights in separate files.

    Widths, levels, blocks and classes are inferred from the tensors. Options that the tensors do
    not determine are taken from the flags that the network was trained with, under their released
    names:
    ``num_heads``, ``num_heads_upsample``, ``num_head_channels``, ``use_new_attention_order``,
    ``dropout``, ``diffusion_steps``, ``noise_schedule`` ("linear" or "cosine"),
    ``rescale_timesteps``, ``predict_xstart`` and ``sigma_small``,
    with their released defaults. Other flags are optional and must agree with the file.

    Args:
        path: the file.
        **flags: the flags of the network and its diffusion.

    Returns:
        The score model in evaluation mode, on the `DDPMChain` that it was trained for. A
        class-conditional model takes ``class_labels=``, a super-resolution model ``low_res=``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, malicious or of another kind, or does not fit the
            flags.
        TypeError: if a flag is unknown.
        ValueError: if a flag has an unknown value or contradicts the file.

    Source: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, arXiv
    2102.09672; Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv
    2105.05233.
    """
    tensors = _read(path)
    options = _infer(path, tensors, flags.get("learn_sigma"))
    given = _DEFAULTS | _checked(flags, _flags_of(options))
    make = partial(
        ADMUNet,
        **options,
        group_channels=1,  # always 32 groups
        heads=given["num_heads"],
        decoder_heads=None if given["num_heads_upsample"] == -1 else given["num_heads_upsample"],
        head_channels=None if given["num_head_channels"] == -1 else given["num_head_channels"],
        dropout=given["dropout"],
    )
    network = laid_out(path, make, tensors)
    order = _NEW_ORDER if given["use_new_attention_order"] else _LEGACY_ORDER
    transfer(path, network, _sources(network, order), tensors)
    steps = given["diffusion_steps"]
    fixed = "fixed_small" if given["sigma_small"] else "fixed_large"
    return (X0Model if given["predict_xstart"] else EpsModel)(
        network,
        _chain(given["noise_schedule"], steps),
        label=StepLabel(steps, scale=1000 / steps if given["rescale_timesteps"] else 1.0),
        data_range=(-1.0, 1.0),
        variance="learned_range" if options["learn_sigma"] else fixed,
    ).eval()


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    data = read_torch(path, expected=_EXPECTED)
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got {type(data).__name__}")
    others = [name for name, value in data.items() if not isinstance(value, Tensor)]
    if others:
        names = ", ".join(others[:6])
        raise CheckpointError(
            f"{path}: expected {_EXPECTED}, got a {type(data).__name__} with the entries "
            f"{names:.200}, which are no tensors"
        )
    return unwrapped(path, data)


def _chain(schedule: str, steps: int) -> DDPMChain:
    if schedule == "linear":
        return DDPMChain.linear(steps)
    if schedule == "cosine":
        return DDPMChain.cosine(steps)
    raise ValueError(f"noise_schedule: expected linear or cosine, got {schedule!r}")


def _checked(flags: dict[str, Any], inferred: dict[str, Any]) -> dict[str, Any]:
    for name, value in flags.items():
        if name in inferred and value != inferred[name]:
            raise ValueError(f"{name}: expected {inferred[name]!r} as in the file, got {value!r}")
        if name not in inferred and name not in _DEFAULTS and name not in _WITHOUT_EFFECT:
            known = ", ".join(sorted(_DEFAULTS.keys() | inferred | _WITHOUT_EFFECT))
            raise TypeError(f"flags: expected released ones, {known}, got {name!r}")
        if name in inferred or name in _DEFAULTS:
            _check_type(name, value, (inferred | _DEFAULTS)[name])
    return {name: value for name, value in flags.items() if name in _DEFAULTS}


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise unless a flag has the type of its default, and a count is possible."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    elif isinstance(default, int):
        if value != default:
            check_count(value, name, most=_MOST_STEPS)
    elif isinstance(default, float):
        check_number(value, name)


def _infer(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], learn_sigma: bool | None
) -> dict[str, Any]:
    try:
        if any(tensor.numel() == 0 for tensor in tensors.values()):
            raise ValueError("expected tensors with elements, got an empty one")
        return _options({key: tuple(t.shape) for key, t in tensors.items()}, learn_sigma)
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got other names or shapes") from error


def _options(shapes: Mapping[str, tuple[int, ...]], learn_sigma: bool | None) -> dict[str, Any]:
    width = shapes["time_embed.0.weight"][1]
    seen, *kernel = shapes["input_blocks.0.0.weight"][1:]
    out = shapes["out.2.weight"][0]
    # Learned variances double the output channels, a low-resolution image the input channels.
    # Equal numbers are both or neither: without the flag, 6 channels are taken for both.
    both = seen == out and (learn_sigma if learn_sigma is not None else seen == 6)
    channels = seen // 2 if both or seen == 2 * out else seen

    encoder, decoder = _numbers("input_blocks", shapes), _numbers("output_blocks", shapes)
    ups = [
        i
        for i in range(max(decoder) + 1)
        if any(_up(f"output_blocks.{i}.{j}", shapes) for j in (1, 2))
    ]
    downs_without_weights = set(range(max(encoder) + 1)) - encoder
    levels = 1 + (len(ups) or len(downs_without_weights))
    blocks = len(decoder) // levels - 1
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    outs = [shapes[f"{name}.0.out_layers.3.weight"][0] for name in first]
    downs = [f"input_blocks.{level * (blocks + 1)}.0" for level in range(1, levels)]
    scale_shift = shapes[f"{first[0]}.0.emb_layers.1.weight"][0] == 2 * outs[0]
    return {
        "channels": channels,
        "dims": len(kernel),
        "width": width,
        "multipliers": tuple(c // width if c % width == 0 else c / width for c in outs),
        "blocks": blocks,
        "attention_levels": tuple(
            i for i, name in enumerate(first) if f"{name}.1.qkv.weight" in shapes
        ),
        "num_classes": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        "low_res_channels": channels if seen == 2 * channels else None,
        "learn_sigma": out == 2 * channels,
        "scale_shift": scale_shift,
        "resblock_updown": any(f"{name}.in_layers.0.weight" in shapes for name in downs),
        "resample_with_conv": not downs_without_weights,
    }


def _numbers(prefix: str, shapes: Mapping[str, Any]) -> set[int]:
    found = (re.match(rf"{prefix}\.(\d{{1,4}})\.", key) for key in shapes)
    return {int(match[1]) for match in found if match}


def _up(layer: str, shapes: Mapping[str, Any]) -> bool:
    return f"{layer}.conv.weight" in shapes or f"{layer}.in_layers.0.weight" in shapes


def _flags_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inferred options under the names of the flags."""
    return {
        "num_channels": options["width"],
        "num_res_blocks": options["blocks"],
        "learn_sigma": options["learn_sigma"],
        "class_cond": options["num_classes"] is not None,
        "use_scale_shift_norm": options["scale_shift"],
        "resblock_updown": options["resblock_updown"],
    }


def _sources(network: ADMUNet, order: str) -> dict[str, Source]:
    """Return the source of each tensor of a network, given the order of q, k and v."""
    sources = {
        "embedding.linear_1.weight": Source(("time_embed.0.weight",), sines_first),
        "embedding.linear_1.bias": Source(("time_embed.0.bias",)),
        "embedding.classes.weight": Source(("label_emb.weight",)),
        **rename("", "", {"embedding.linear_2": "time_embed.2", "input": "input_blocks.0.0"}),
        **rename("", "", {"head.norm": "out.0", "head.conv": "out.2"}),
    }

    net: Any = network

    def layer(ours: str, theirs: str) -> None:
        module = net.get_submodule(ours)
        if isinstance(module, ResidualBlock):
            names = _BLOCK
        else:
            names = {"conv": "op" if isinstance(module, ConvDownsample) else "conv"}
        sources.update(rename(f"{ours}.", f"{theirs}.", names))

    def stage(ours: str, theirs: str) -> bool:
        layer(f"{ours}.block", f"{theirs}.0")
        module = net.get_submodule(ours).attention
        if module is not None:
            attend(f"{ours}.attention", f"{theirs}.1")
        return module is not None

    def attend(ours: str, theirs: str) -> None:
        heads = net.get_submodule(ours).heads
        sources.update(attention(ours, theirs, heads, order, **_ATTENTION))

    i = 1
    for level, encoder in enumerate(net.encoder):
        if level > 0:
            layer(f"downs.{level - 1}.block", f"input_blocks.{i}.0")
            i += 1
        for b in range(len(encoder.stages)):
            stage(f"encoder.{level}.stages.{b}", f"input_blocks.{i}")
            i += 1
    layer("middle.0.block", "middle_block.0")
    attend("middle.0.attention", "middle_block.1")
    layer("middle.1.block", "middle_block.2")
    j = 0
    for level, decoder in enumerate(net.decoder):
        for b in range(len(decoder.stages)):
            attends = stage(f"decoder.{level}.stages.{b}", f"output_blocks.{j}")
            if b == len(decoder.stages) - 1 and level < len(net.ups):
                layer(f"ups.{level}.block", f"output_blocks.{j}.{1 + attends}")
            j += 1
    return sources
