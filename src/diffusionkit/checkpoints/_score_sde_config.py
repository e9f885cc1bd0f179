"""The configurations of score_sde: what they say about a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .._files import CheckpointError
from ..networks import DDPMUNet, NCSNpp, NCSNv2
from ..networks.ncsnv2 import LEVELS_64, LEVELS_128, LEVELS_256
from ..sde import VPSDE, SubVPSDE
from ._score_sde_settings import PUBLISHED, Configured, Setting, ddpm, smld, smld_sigmas, ve

_ACTIVATIONS = {"swish": "silu", "lrelu": "leaky_relu", "elu": "elu", "relu": "relu"}


@dataclass(frozen=True)
class _Section:
    """One level of a configuration: a mapping or an object with attributes."""

    name: str
    values: Any

    def get(self, name: str, *default: Any) -> Any:
        values = self.values
        if isinstance(values, Mapping) and name in values:
            return values[name]
        if not isinstance(values, Mapping) and hasattr(values, name):
            return getattr(values, name)
        if not default:
            raise ValueError(f"config: expected {self.name}.{name}, got a configuration without it")
        return default[0]


def configured(config: Any) -> Configured:
    """Read a configuration of score_sde.

    Args:
        config: Name of a published one, a mapping, or an object with attributes, with the
            sections model, data and training.

    Returns:
        What makes the network, and its setting.

    Raises:
        ValueError: If something is missing or unknown.
    """
    if isinstance(config, str):
        if config not in PUBLISHED:
            raise ValueError(f"config: expected one of {', '.join(PUBLISHED)}, got {config!r}")
        return PUBLISHED[config]
    root = _Section("config", config)
    model, data, training = (_Section(s, root.get(s)) for s in ("model", "data", "training"))
    kind = model.get("name")
    sigmas = smld_sigmas(model.get("sigma_min"), model.get("sigma_max"), model.get("num_scales"))
    setting = _setting(training, model, sigmas)
    size, multipliers = data.get("image_size"), tuple(model.get("ch_mult", (1,)))
    options: dict[str, Any] = {
        "channels": data.get("num_channels", data.get("channels", 3)),
        "width": model.get("nf"),
        "data_range": (-1.0, 1.0) if data.get("centered") else (0.0, 1.0),
    }
    if str(kind).startswith("ncsnv2"):
        return partial(ncsnv2_of, kind, size, sigmas=tuple(sigmas), **options), setting
    if kind not in ("ncsnpp", "ddpm"):
        raise ValueError(f"config: expected model.name ncsnpp, ddpm or ncsnv2_*, got {kind!r}")
    activation = model.get("nonlinearity", "swish")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"config: expected model.nonlinearity {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    conditional = model.get("conditional", True)
    embedding = model.get("embedding_type", "positional") if kind == "ncsnpp" else "positional"
    scaled = model.get("scale_by_sigma", False)
    attended = model.get("attn_resolutions")
    levels = range(len(multipliers))
    options |= {
        "multipliers": multipliers,
        "blocks": model.get("num_res_blocks"),
        "attention_levels": tuple(i for i in levels if size // 2**i in attended),
        "dropout": model.get("dropout", 0.0),
        "resample_with_conv": model.get("resamp_with_conv", True),
        "embedding": embedding if conditional else None,
        "activation": _ACTIVATIONS[activation],
        "scale_by_sigma": scaled,
        "sigmas": tuple(sigmas) if scaled and embedding == "positional" else None,
    }
    if kind == "ddpm":
        return partial(DDPMUNet, **options), setting
    kernel = tuple(model.get("fir_kernel", (1, 3, 3, 1)))
    options |= {
        "fir_kernel": kernel if model.get("fir", False) else None,
        "fourier_scale": model.get("fourier_scale", 16),
        "resblock": model.get("resblock_type").lower(),
        "progressive": model.get("progressive").lower(),
        "progressive_input": model.get("progressive_input").lower(),
        "progressive_combine": model.get("progressive_combine", "sum").lower(),
        "skip_rescale": model.get("skip_rescale"),
    }
    return partial(NCSNpp, **options), setting


def _setting(training: _Section, model: _Section, sigmas: list[float]) -> Setting:
    kind, continuous = str(training.get("sde")).lower(), training.get("continuous")
    if kind == "vesde":
        return ve(model.get("sigma_min"), model.get("sigma_max")) if continuous else smld(sigmas)
    betas = model.get("beta_min", 0.1), model.get("beta_max", 20.0)
    if kind == "subvpsde":
        return Setting(SubVPSDE(*betas))
    if kind != "vpsde":
        raise ValueError(f"config: expected training.sde vesde, vpsde or subvpsde, got {kind!r}")
    return Setting(VPSDE(*betas)) if continuous else ddpm(len(sigmas), *betas)


def ncsnv2_of(kind: str, size: int, **options: Any) -> NCSNv2:
    """Make the NCSNv2 that score_sde calls ncsnv2_64, ncsnv2_128 or ncsnv2_256."""
    levels = {"ncsnv2_64": LEVELS_64, "ncsnv2_128": LEVELS_128, "ncsnv2_256": LEVELS_256}
    if kind not in levels:
        raise ValueError(f"config: expected model.name {', '.join(levels)}, got {kind!r}")
    return NCSNv2(levels=levels[kind], **options)


def infer_ncsnv2(path: object, tensors: Mapping[str, Tensor], sigmas: list[float]) -> NCSNv2:
    """Make the NCSNv2 that tensors belong to, for data in [0, 1]."""
    width, channels = tensors["begin_conv.weight"].shape[:2]
    count = sum(f"res{i}.0.conv1.weight" in tensors for i in (1, 2, 3, 31, 4, 5))
    kind = {4: "ncsnv2_64", 5: "ncsnv2_128", 6: "ncsnv2_256"}.get(count)
    if kind is None:
        raise CheckpointError(f"{path}: expected an NCSNv2 of 4 to 6 levels, got {count}")
    options = {"channels": channels, "width": width, "data_range": (0.0, 1.0)}
    return ncsnv2_of(kind, 0, sigmas=tuple(sigmas), **options)
