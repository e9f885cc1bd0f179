"""Network pickles of EDM, the code of Karras et al., 2022."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._files import CheckpointError
from ..models import EDMModel, EpsModel, IndexLabel, ScaledScoreModel, TimeLabel
from ..models.network import NetworkModel
from ..networks import ADMUNet, NCSNpp
from ..sde import EDMSDE, VESDE, VPSDE, DDPMChain
from ._edm_keys import EDMObject, read_edm_pickle
from ._transfer import Source, attention, rename, sines_first, transfer

_BLOCK = {
    "norm_1": "norm0",
    "conv_1": "conv0",
    "embedding": "affine",
    "norm_2": "norm1",
    "conv_2": "conv1",
    "shortcut": "skip",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "out": "proj"}
_ORDER = "head channel kind"
_RANGE = (-1.0, 1.0)


def load_edm(path: str | os.PathLike[str]) -> NetworkModel:
    """Load a network pickle of EDM, with its averaged weights, ready to sample.

    Such a pickle carries source code, which unpickling would run. It is never unpickled: a
    restricted reader extracts the tensors and arguments and raises an error that names anything
    else. Loading is strict: missing, extra or misshapen tensors raise an error that lists them.

    Args:
        path: the file.

    Returns:
        The score model in evaluation mode: `EDMModel` on `EDMSDE` for EDM's own preconditioning,
        `EpsModel` on `VPSDE` for VP, `ScaledScoreModel` on `VESDE` for VE and `EpsModel` on
        `DDPMChain` for iDDPM. A class-conditional model takes ``class_labels=``, a model trained
        with augmentation ``condition=``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, foreign or hostile, or holds another network.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364.
    """
    ema: EDMObject = read_edm_pickle(path)["ema"]
    try:
        network, rules = _network(path, ema)
        model = _MODELS[ema.class_name](network, ema.init_kwargs)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: expected a known network of EDM, got {error}") from error
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in ema.state_dict.items()
        if not name.endswith("resample_filter") and name != "u"
    }
    transfer(path, network, rules, tensors)
    return model.eval()


def _edm(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    return EDMModel(network, EDMSDE(), options.get("sigma_data", 0.5), data_range=_RANGE)


def _vp(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    beta_min = options.get("beta_min", 0.1)
    sde = VPSDE(beta_min, beta_min + options.get("beta_d", 19.9))
    return EpsModel(network, sde, label=TimeLabel(options.get("M", 1000) - 1), data_range=_RANGE)


def _ve(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    sde = VESDE(options.get("sigma_min", 0.02), options.get("sigma_max", 100.0))
    return ScaledScoreModel(network, sde, data_range=_RANGE)


def _iddpm(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    steps = options.get("M", 1000)
    chain = DDPMChain.cosine(
        steps, s=options.get("C_2", 0.008), max_beta=1 - options.get("C_1", 0.001)
    )
    ratios = torch.exp(-0.5 * chain.log_snr(torch.arange(1, steps + 1).double() / steps))
    label = IndexLabel(ratios)
    return EpsModel(network, chain, label=label, data_range=_RANGE, variance="learned_range")


_MODELS: dict[str, Callable[[torch.nn.Module, Mapping[str, Any]], NetworkModel]] = {
    "EDMPrecond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
}


def _network(
    path: str | os.PathLike[str], ema: EDMObject
) -> tuple[NCSNpp | ADMUNet, dict[str, Source]]:
    """Build the network inside a preconditioning, and return the sources of its tensors."""
    given = dict(ema.init_kwargs)
    iddpm = ema.class_name == "iDDPMPrecond"
    dhariwal = {"EDMPrecond": "DhariwalUNet", "iDDPMPrecond": "DhariwalUNet"}
    kind = given.get("model_type", dhariwal.get(ema.class_name, "SongUNet"))
    size = given["img_resolution"]
    song = kind == "SongUNet"
    if kind not in ("SongUNet", "DhariwalUNet"):
        raise KeyError(kind)
    multipliers = tuple(given.get("channel_mult", (1, 2, 2, 2) if song else (1, 2, 3, 4)))
    attended = given.get("attn_resolutions", (16,) if song else (32, 16, 8))
    options: dict[str, Any] = {
        "channels": given["img_channels"],
        "width": given.get("model_channels", 128 if song else 192),
        "multipliers": multipliers,
        "blocks": given.get("num_blocks", 4 if song else 3),
        "attention_levels": tuple(i for i in range(len(multipliers)) if size >> i in attended),
        "dropout": given.get("dropout", 0.1),
        "num_classes": given.get("label_dim", 0) or None,
        "condition_features": given.get("augment_dim", 0) or None,
    }
    if given.get("channel_mult_emb", 4) != 4:
        raise KeyError(f"channel_mult_emb {given['channel_mult_emb']}")
    if song:
        network: NCSNpp | ADMUNet = _song(given, options)
    else:
        options |= {"head_channels": 64, "resblock_updown": True}
        network = ADMUNet(**options, learn_sigma=iddpm)
    return network, _sources(network, size, song)


def _song(given: Mapping[str, Any], options: dict[str, Any]) -> NCSNpp:
    """Build the network that EDM calls SongUNet."""
    embedding = given.get("embedding_type", "positional")
    noise = given.get("channel_mult_noise", 1)
    if noise != {"positional": 1, "fourier": 2}[embedding]:
        raise KeyError(f"channel_mult_noise {noise} with a {embedding} embedding")
    kernel = tuple(given.get("resample_filter", (1, 1)))
    branches: Any = {"standard": "none", "skip": "input_skip", "residual": "residual"}
    outputs: Any = {"standard": "none", "skip": "output_skip"}
    return NCSNpp(
        **options,
        embedding="positional" if embedding == "positional" else "fourier_linear",
        fir_kernel=None if kernel == (1, 1) else kernel,
        progressive_input=branches[given.get("encoder_type", "standard")],
        progressive=outputs[given.get("decoder_type", "standard")],
        scale_by_sigma=False,
    )


def _sources(network: NCSNpp | ADMUNet, size: int, song: bool) -> dict[str, Source]:
    """Return the source of each tensor of a network for images of a resolution."""
    sources = {
        **rename("", "", {"embedding.linear_1": "map_layer0", "embedding.linear_2": "map_layer1"}),
        **rename("", "", {"input": f"enc.{size}x{size}_conv"}),
        "embedding.noise_features.frequencies": Source(("map_noise.freqs",)),
        "embedding.condition.weight": Source(("map_augment.weight",)),
        "embedding.classes.weight": Source(("map_label.weight", "map_label.bias"), _scaled_classes),
    }
    if not song:
        sources |= {
            "embedding.linear_1.weight": Source(("map_layer0.weight",), sines_first),
            "embedding.condition.weight": Source(("map_augment.weight",), _sines_first_rows),
            "embedding.classes.weight": Source(("map_label.weight",), Tensor.t),
            **rename("", "", {"head.norm": "out_norm", "head.conv": "out_conv"}),
        }

    net: Any = network

    def stage(ours: str, theirs: str) -> None:
        sources.update(rename(f"{ours}.block.", f"{theirs}.", _BLOCK))
        module = net.get_submodule(ours).attention
        if module is not None:
            sources.update(
                attention(f"{ours}.attention", theirs, module.heads, _ORDER, **_ATTENTION)
            )

    last = len(net.encoder) - 1
    for level, encoder in enumerate(net.encoder):
        res = f"{size >> level}x{size >> level}"
        if level > 0:
            stage(f"downs.{level - 1}", f"enc.{res}_down")
            branch = f"input_branch.{level - 1}"
            sources |= rename("", "", {f"{branch}.down.conv": f"enc.{res}_aux_residual"})
            sources |= rename("", "", {f"{branch}.conv": f"enc.{res}_aux_skip"})
        for b in range(len(encoder.stages)):
            stage(f"encoder.{level}.stages.{b}", f"enc.{res}_block{b}")
    for i in range(2):
        stage(f"middle.{i}", f"dec.{size >> last}x{size >> last}_in{i}")
    for i, decoder in enumerate(net.decoder):
        res = f"{size >> (last - i)}x{size >> (last - i)}"
        if i > 0:
            stage(f"ups.{i - 1}", f"dec.{res}_up")
        for b in range(len(decoder.stages)):
            stage(f"decoder.{i}.stages.{b}", f"dec.{res}_block{b}")
        head = {"norm": f"dec.{res}_aux_norm", "conv": f"dec.{res}_aux_conv"}
        sources |= rename(f"output_branch.{i}.head.", "", head)
        if song and i == last:
            sources |= rename("head.", "", head)
    return sources


def _scaled_classes(weight: Tensor, bias: Tensor) -> Tensor:
    # EDM encodes a class as a one-hot vector times sqrt(number of classes).
    return weight.t() * math.sqrt(weight.shape[1]) + bias


def _sines_first_rows(weight: Tensor) -> Tensor:
    return sines_first(weight.t()).t()
