"""The arguments of a network in a pickle of EDM, with the defaults of the released classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._checks import check_choice, check_count, check_number
from ._edm_keys import EDMObject

PRECONDITIONINGS: dict[str, dict[str, Any]] = {
    "EDMPrecond": {
        "sigma_min": 0.0,
        "sigma_max": math.inf,
        "sigma_data": 0.5,
        "model_type": "DhariwalUNet",
    },
    "VPPrecond": {
        "beta_d": 19.9,
        "beta_min": 0.1,
        "M": 1000,
        "epsilon_t": 1e-5,
        "model_type": "SongUNet",
    },
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0, "model_type": "SongUNet"},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000, "model_type": "DhariwalUNet"},
}
_SHARED: dict[str, Any] = {
    "label_dim": 0,
    "augment_dim": 0,
    "use_fp16": False,
    "channel_mult_emb": 4,
    "dropout": 0.1,
    "label_dropout": 0.0,
}
_NETWORKS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": (1, 1),
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
    },
}
_CHOICES = {
    "model_type": tuple(_NETWORKS),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
_LARGEST = 1e6
_FROM_ZERO = ("label_dim", "augment_dim")


def edm_arguments(ema: EDMObject, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the validated arguments of a preconditioned network, defaults included.

    Args:
        ema: the network.
        tensors: its tensors by name.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is unknown or out of range, contradicts the tensors, or gives a
            network that ours cannot be.
    """
    if ema.class_name == "Precond":
        raise ValueError("class_name: expected a preconditioning of EDM, got 'Precond' of EDM2; "
                         "use load_edm2")  # fmt: skip
    check_choice("class_name", ema.class_name, tuple(PRECONDITIONINGS))
    if ema.init_args:
        raise ValueError(f"init_args: expected keyword arguments, got {len(ema.init_args)} others")
    given = ema.init_kwargs
    defaults = PRECONDITIONINGS[ema.class_name]
    kind = given.get("model_type", defaults["model_type"])
    check_choice("model_type", kind, _CHOICES["model_type"])
    # The resolution and the channels have no default.
    known = {"img_resolution": 1, "img_channels": 1} | _SHARED | defaults | _NETWORKS[kind]
    for name in ("img_resolution", "img_channels", *given):
        if name not in given:
            raise ValueError(f"{name}: expected a number, got none")
        if name not in known:
            raise ValueError(f"init_kwargs: expected arguments of {kind}, got {name!r:.50}")
        check_argument(name, given[name], known[name])
    found = known | given
    if "M" in found and ema.class_name == "iDDPMPrecond":
        _check_shape("u", tensors, (found["M"] + 1,))
    _check_supported(found, tensors)
    return found


def check_argument(name: str, value: Any, default: Any) -> None:
    """Raise unless a value has the type of an argument's default."""
    if name in _CHOICES:
        check_choice(name, value, _CHOICES[name])
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    elif isinstance(default, int):
        check_count(value, name, least=0 if name in _FROM_ZERO else 1)
    elif isinstance(default, float):
        check_number(value, name)
        if not (0 <= value <= _LARGEST or value == default):
            raise ValueError(f"{name}: expected a number in [0, {_LARGEST:g}], got {value!r:.40}")
    else:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
        for entry in value:
            if name == "resample_filter":
                check_number(entry, name)
            else:
                check_count(entry, name)


def _check_supported(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless a network of ours computes the same as that of the arguments."""
    levels, size = len(found["channel_mult"]), found["img_resolution"]
    if levels and size >> (levels - 1) < 1:
        raise ValueError(f"img_resolution: expected {levels} different halvings, got {size}")
    if found["channel_mult_emb"] != 4:
        raise ValueError(f"channel_mult_emb: expected 4, got {found['channel_mult_emb']}")
    if "resample_filter" not in found:
        return
    noise = {"positional": 1, "fourier": 2}[found["embedding_type"]]
    if found["channel_mult_noise"] != noise:
        raise ValueError(
            f"channel_mult_noise: expected {noise} with a {found['embedding_type']} embedding, "
            f"got {found['channel_mult_noise']}"
        )
    taps = list(found["resample_filter"])
    # With an odd number, EDM's upsampling yields 2 n - 1 entries. An asymmetric filter is flipped
    # in EDM's downsampling only. With one level there is no resampling.
    if levels > 1 and (len(taps) % 2 or taps != taps[::-1]):
        raise ValueError(
            f"resample_filter: expected a symmetric filter of even length, got {taps[:6]}"
        )
    for name in tensors:
        if name.endswith(".resample_filter"):
            _check_shape(name, tensors, (1, 1, len(taps), len(taps)))


def _check_shape(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    got = tuple(tensors[name].shape) if name in tensors else "none"
    if got != shape:
        raise ValueError(f"{name:.200}: expected a tensor of shape {shape} as described, got {got}")
