"""Network pickles of EDM, the code of Karras et al., 2022."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._files import CheckpointError
from .._weights import laid_out
from ..models import EDMModel, EpsModel, IndexLabel, ScaledScoreModel, TimeLabel
from ..models.network import NetworkModel
from ..networks import ADMUNet, NCSNpp
from ..sde import EDMSDE, VESDE, VPSDE, DDPMChain
from ._edm_arguments import edm_arguments
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
_INPUTS: dict[str, Any] = {"standard": "none", "skip": "input_skip", "residual": "residual"}
_OUTPUTS: dict[str, Any] = {"standard": "none", "skip": "output_skip"}
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
        CheckpointError: if the file is damaged, malicious or of another kind, or holds another
            network.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364.
    """
    ema: EDMObject = read_edm_pickle(path)["ema"]
    try:
        options = edm_arguments(ema, ema.state_dict)
        network = laid_out(path, partial(_network, ema.class_name, options), ema.state_dict)
        tensors = {
            name.removeprefix("model."): tensor
            for name, tensor in ema.state_dict.items()
            if not name.endswith("resample_filter") and name != "u"
        }
        sources = _sources(network, options["img_resolution"])
        transfer(path, network, sources, tensors)
        return _MODELS[ema.class_name](network, options).eval()
    except CheckpointError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: expected a known network of EDM, got {error}") from error


def _edm(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    return EDMModel(network, EDMSDE(), options["sigma_data"], data_range=_RANGE)


def _vp(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    beta_min = options["beta_min"]
    sde = VPSDE(beta_min, beta_min + options["beta_d"])
    return EpsModel(network, sde, label=TimeLabel(options["M"] - 1), data_range=_RANGE)


def _ve(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    sde = VESDE(options["sigma_min"], options["sigma_max"])
    return ScaledScoreModel(network, sde, data_range=_RANGE)


def _iddpm(network: torch.nn.Module, options: Mapping[str, Any]) -> NetworkModel:
    steps = options["M"]
    chain = DDPMChain.cosine(steps, s=options["C_2"], max_beta=1 - options["C_1"])
    ratios = torch.exp(-0.5 * chain.log_snr(torch.arange(1, steps + 1).double() / steps))
    label = IndexLabel(ratios)
    return EpsModel(network, chain, label=label, data_range=_RANGE, variance="learned_range")


_MODELS: dict[str, Callable[[torch.nn.Module, Mapping[str, Any]], NetworkModel]] = {
    "EDMPrecond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
}


def _network(class_name: str, given: Mapping[str, Any]) -> NCSNpp | ADMUNet:
    """Build the network inside a preconditioning."""
    size, multipliers = given["img_resolution"], tuple(given["channel_mult"])
    attended, learned = given["attn_resolutions"], class_name == "iDDPMPrecond"
    options: dict[str, Any] = {
        "channels": given["img_channels"],
        "width": given["model_channels"],
        "multipliers": multipliers,
        "blocks": given["num_blocks"],
        "attention_levels": tuple(i for i in range(len(multipliers)) if size >> i in attended),
        "dropout": given["dropout"],
        "num_classes": given["label_dim"] or None,
        "condition_features": given["augment_dim"] or None,
    }
    if given["model_type"] == "DhariwalUNet":
        return ADMUNet(**options, head_channels=64, resblock_updown=True, learn_sigma=learned)
    residual = given["encoder_type"] == "residual"
    kernel = tuple(given["resample_filter"]) if len(multipliers) > 1 else (1, 1)
    return NCSNpp(
        **options,
        out_channels=given["img_channels"] * (2 if learned else 1),
        embedding="positional" if given["embedding_type"] == "positional" else "fourier_linear",
        # EDM's residual branch averages outputs of a convolution at the full resolution, not those
        # of one with stride 2: without an FIR kernel ours would be the latter.
        fir_kernel=None if kernel == (1, 1) and not residual else kernel,
        progressive_input=_INPUTS[given["encoder_type"]],
        progressive=_OUTPUTS[given["decoder_type"]],
        scale_by_sigma=False,
    )


def _sources(network: NCSNpp | ADMUNet, size: int) -> dict[str, Source]:
    """Return the source of each tensor of a network for images of a resolution."""
    song = isinstance(network, NCSNpp)
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
