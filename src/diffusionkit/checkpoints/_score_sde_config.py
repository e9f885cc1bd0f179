"""Stage 2 of `load_score_sde`: the network and the setting of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any

import torch
from torch import nn

from ..interfaces import ForwardSDE
from ..models import EpsModel, IndexLabel, RawScoreModel, SigmaLabel, StepLabel
from ..models.labels import Label
from ..models.network import NetworkModel
from ..networks import DDPMpp, DDPMUNet, NCSNpp, NCSNv2
from ..networks.ncsnv2 import LEVELS_64, LEVELS_128, LEVELS_256
from ..sde import VESDE, VPSDE, DDPMChain, SubVPSDE

_ACTIVATIONS = {"swish": "silu", "lrelu": "leaky_relu", "elu": "elu", "relu": "relu"}
_NCSNV2_LEVELS = {"ncsnv2_64": LEVELS_64, "ncsnv2_128": LEVELS_128, "ncsnv2_256": LEVELS_256}

_HUGE = 2**31

Network = NCSNpp | NCSNv2


@dataclass(frozen=True)
class Setting:
    """The process and the score model that a network was trained for.

    Args:
        sde: the process.
        kind: the class of score model, which defines what the network predicts.
        label: the noise label; the default of `kind` if None.
        sigmas: the noise levels by number, or only the largest and the smallest; None for VP.
    """

    sde: ForwardSDE
    kind: type[NetworkModel] = EpsModel
    label: Label | None = None
    sigmas: tuple[float, ...] | None = None

    def model(self, network: Network) -> NetworkModel:
        """Return the score model of a network."""
        data_range = network.config["data_range"]
        return self.kind(network, self.sde, label=self.label, data_range=data_range)


Configured = tuple[Callable[[], Network], Setting]


def configured(config: Any, sigmas: Sequence[float]) -> Configured:
    """Return what makes the network that a configuration describes, and its setting.

    Args:
        config: a name in `PUBLISHED`; a mapping or an object with attributes, with the sections
            ``model``, ``data`` and ``training``; or a network itself.
        sigmas: the noise levels in the file.

    Raises:
        ValueError: if an entry is missing, unknown or out of range.
        TypeError: if a network of another class is given, or an entry has another type.
    """
    if isinstance(config, nn.Module):
        return _of_network(config, sigmas)
    if isinstance(config, str):
        if config not in PUBLISHED:
            raise ValueError(f"network: expected one of {', '.join(PUBLISHED)}, got {config!r}")
        return PUBLISHED[config]
    return _of_sections(config, len(sigmas))


def _of_network(network: nn.Module, sigmas: Sequence[float]) -> Configured:
    if not isinstance(network, Network):
        raise TypeError(
            "network: expected an NCSNpp, DDPMpp, DDPMUNet or NCSNv2, a configuration or its "
            f"name, got {type(network).__name__}"
        )
    config = network.config
    if config.get("sigmas") is not None:
        return lambda: network, _smld(config["sigmas"])
    if config["scale_by_sigma"] or config["embedding"] == "fourier":
        return lambda: network, _ve(sigmas[-1], sigmas[0])
    return lambda: network, Setting(VPSDE())


@dataclass(frozen=True)
class _Section:
    """A section of a configuration: a mapping or an object with attributes."""

    name: str
    values: Any

    def get(self, name: str, *default: Any) -> Any:
        values = self.values
        if isinstance(values, Mapping) and name in values:
            return values[name]
        if not isinstance(values, Mapping) and hasattr(values, name):
            return getattr(values, name)
        if not default:
            raise ValueError(f"network: expected {self.name}.{name}, got none")
        return default[0]

    def typed(self, kinds: type | UnionType, name: str, *default: Any) -> Any:
        """Return an entry, or raise unless it has one of some types or is the default."""
        value = self.get(name, *default)
        wrong = isinstance(value, bool) and kinds is not bool
        missing = bool(default) and value is default[0]
        if not missing and (wrong or not isinstance(value, kinds)):
            known = getattr(kinds, "__name__", str(kinds))
            raise TypeError(
                f"network: expected {self.name}.{name} of type {known}, got {type(value).__name__}"
            )
        if isinstance(value, int) and abs(value) >= _HUGE:
            raise ValueError(f"network: expected {self.name}.{name} below {_HUGE:g}, got more")
        return value

    def sequence(self, kinds: type | UnionType, name: str, *default: Any) -> tuple[Any, ...]:
        """Return an entry as a tuple, or raise unless it is a sequence of some types."""
        # The lists of a configuration may be of a class of their own.
        values = self.typed(Sequence, name, *default)
        section = _Section(f"{self.name}.{name}", {str(i): value for i, value in enumerate(values)})
        return tuple(section.typed(kinds, name) for name in section.values)


def _of_sections(config: Any, levels: int) -> Configured:
    root = _Section("config", config)
    model, data, training = (_Section(s, root.get(s)) for s in ("model", "data", "training"))
    kind = model.typed(str, "name")
    ends = model.typed(float | int, "sigma_min"), model.typed(float | int, "sigma_max")
    if model.typed(int, "num_scales") != levels:
        got = model.get("num_scales")
        raise ValueError(f"network: expected model.num_scales {levels} as in the file, got {got}")
    if not 0 < ends[0] < ends[1] < math.inf:
        raise ValueError(f"network: expected 0 < model.sigma_min < model.sigma_max, got {ends}")
    sigmas = _smld_sigmas(*ends, levels)
    setting = _setting(training, model, sigmas)
    size, multipliers = data.typed(int, "image_size"), model.sequence(int, "ch_mult", (1,))
    options: dict[str, Any] = {
        "channels": data.typed(int, "num_channels", data.typed(int, "channels", 3)),
        "width": model.typed(int, "nf"),
        "data_range": (-1.0, 1.0) if data.typed(bool, "centered") else (0.0, 1.0),
    }
    if kind.startswith("ncsnv2"):
        return _ncsnv2(kind, sigmas=tuple(sigmas), **options), setting
    if kind not in ("ncsnpp", "ddpm"):
        raise ValueError(f"network: expected model.name ncsnpp, ddpm or ncsnv2_*, got {kind!r}")
    activation = model.typed(str, "nonlinearity", "swish")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"network: expected model.nonlinearity {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    conditional = model.typed(bool, "conditional", True)
    embedding = "positional"
    if kind == "ncsnpp":
        embedding = model.typed(str, "embedding_type", "positional")
    scaled = model.typed(bool, "scale_by_sigma", False)
    attended = model.sequence(int, "attn_resolutions")
    options |= {
        "multipliers": multipliers,
        "blocks": model.typed(int, "num_res_blocks"),
        "attention_levels": tuple(i for i in range(len(multipliers)) if size >> i in attended),
        "dropout": model.typed(float | int, "dropout", 0.0),
        "resample_with_conv": model.typed(bool, "resamp_with_conv", True),
        "embedding": embedding if conditional else None,
        "activation": _ACTIVATIONS[activation],
        "scale_by_sigma": scaled,
        "sigmas": tuple(sigmas) if scaled and embedding == "positional" else None,
    }
    if kind == "ddpm":
        return partial(DDPMUNet, **options), setting
    kernel = model.sequence(float | int, "fir_kernel", (1, 3, 3, 1))
    options |= {
        "fir_kernel": kernel if model.typed(bool, "fir", False) else None,
        "fourier_scale": model.typed(float | int, "fourier_scale", 16),
        "resblock": model.typed(str, "resblock_type").lower(),
        "progressive": model.typed(str, "progressive").lower(),
        "progressive_input": model.typed(str, "progressive_input").lower(),
        "progressive_combine": model.typed(str, "progressive_combine", "sum").lower(),
        "skip_rescale": model.typed(bool, "skip_rescale"),
    }
    return partial(NCSNpp, **options), setting


def _setting(training: _Section, model: _Section, sigmas: list[float]) -> Setting:
    kind, continuous = training.typed(str, "sde").lower(), training.typed(bool, "continuous")
    if kind == "vesde":
        return _ve(model.get("sigma_min"), model.get("sigma_max")) if continuous else _smld(sigmas)
    betas = model.typed(float | int, "beta_min", 0.1), model.typed(float | int, "beta_max", 20.0)
    if kind == "subvpsde":
        return Setting(SubVPSDE(*betas))
    if kind != "vpsde":
        raise ValueError(f"network: expected training.sde vesde, vpsde or subvpsde, got {kind!r}")
    return Setting(VPSDE(*betas)) if continuous else _ddpm(len(sigmas), *betas)


def _ncsnv2(kind: str, **options: Any) -> Callable[[], NCSNv2]:
    if kind not in _NCSNV2_LEVELS:
        known = ", ".join(_NCSNV2_LEVELS)
        raise ValueError(f"network: expected model.name {known}, got {kind!r}")
    return partial(NCSNv2, levels=_NCSNV2_LEVELS[kind], **options)


def _ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Setting:
    """VE at all times: the network is conditioned on sigma."""
    sde = VESDE(sigma_min, sigma_max)
    return Setting(sde, RawScoreModel, SigmaLabel(), (sigma_max, sigma_min))


def _smld(sigmas: Sequence[float]) -> Setting:
    """VE with numbered levels, the largest first: the network is conditioned on the number."""
    sde = VESDE(sigmas[-1], sigmas[0])
    return Setting(sde, RawScoreModel, IndexLabel(list(sigmas)), tuple(sigmas))


def _ddpm(steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> Setting:
    """VP with numbered steps: the network is conditioned on the number."""
    chain = DDPMChain.linear(steps, beta_min=beta_min, beta_max=beta_max)
    return Setting(chain, label=StepLabel(steps))


def _smld_sigmas(sigma_min: float, sigma_max: float, levels: int) -> list[float]:
    """Return the noise levels of a discrete VE chain, the largest first."""
    ratio = torch.linspace(0, 1, levels, dtype=torch.float64)
    sigmas: list[float] = (sigma_max * (sigma_min / sigma_max) ** ratio).tolist()
    return sigmas


def _continuous(make: Callable[[], Network], sigma_max: float) -> Configured:
    return make, _ve(sigma_max=sigma_max)


def _numbered(make: Callable[..., Network], sigma_max: float, levels: int = 1000) -> Configured:
    sigmas = _smld_sigmas(0.01, sigma_max, levels)
    return partial(make, sigmas=tuple(sigmas)), _smld(sigmas)


_ddpm_on_smld = partial(DDPMUNet.cifar10, scale_by_sigma=True, data_range=(0.0, 1.0))
_unconditional = partial(DDPMUNet.cifar10, embedding=None)
_VP, _SUBVP, _DDPM = Setting(VPSDE()), Setting(SubVPSDE()), _ddpm()

# The published configurations by their names in the released code.
PUBLISHED: dict[str, Configured] = {
    "ve/cifar10_ncsnpp": _numbered(NCSNpp.cifar10_smld, 50.0),
    "ve/cifar10_ncsnpp_continuous": _continuous(NCSNpp.cifar10, 50.0),
    "ve/cifar10_ncsnpp_deep_continuous": _continuous(partial(NCSNpp.cifar10, deep=True), 50.0),
    "ve/cifar10_ddpm": _numbered(_ddpm_on_smld, 50.0),
    "ve/celeba_ncsnpp": _numbered(NCSNpp.celeba_64_smld, 90.0),
    "ve/bedroom_ncsnpp_continuous": _continuous(NCSNpp.lsun_256, 378.0),
    "ve/church_ncsnpp_continuous": _continuous(NCSNpp.lsun_256, 380.0),
    "ve/celebahq_256_ncsnpp_continuous": _continuous(NCSNpp.celebahq_256, 348.0),
    "ve/ffhq_256_ncsnpp_continuous": _continuous(NCSNpp.ffhq_256, 348.0),
    "ve/celebahq_ncsnpp_continuous": _continuous(NCSNpp.celebahq_1024, 1348.0),
    "ve/ffhq_ncsnpp_continuous": _continuous(NCSNpp.ffhq_1024, 1348.0),
    "vp/cifar10_ddpmpp": (DDPMpp.cifar10, _DDPM),
    "vp/cifar10_ddpmpp_continuous": (DDPMpp.cifar10, _VP),
    "vp/cifar10_ddpmpp_deep_continuous": (partial(DDPMpp.cifar10, deep=True), _VP),
    "vp/cifar10_ncsnpp": (NCSNpp.cifar10_vp, _DDPM),
    "vp/cifar10_ncsnpp_continuous": (NCSNpp.cifar10_vp, _VP),
    "vp/cifar10_ncsnpp_deep_continuous": (partial(NCSNpp.cifar10_vp, deep=True), _VP),
    "vp/ddpm/cifar10": (DDPMUNet.cifar10, _DDPM),
    "vp/ddpm/cifar10_continuous": (DDPMUNet.cifar10, _VP),
    "vp/ddpm/cifar10_unconditional": (_unconditional, _DDPM),
    "vp/ddpm/celebahq": (DDPMUNet.celebahq_256, _DDPM),
    "vp/ddpm/bedroom": (DDPMUNet.lsun_256, _DDPM),
    "vp/ddpm/church": (DDPMUNet.lsun_256, _DDPM),
    "ve/ncsnv2/cifar10": _numbered(NCSNv2.cifar10, 50.0, 232),
    "ve/ncsnv2/celeba": _numbered(NCSNv2.celeba_64, 90.0, 500),
    "ve/ncsnv2/bedroom": _numbered(NCSNv2.bedroom_128, 190.0, 1086),
    "subvp/cifar10_ddpm_continuous": (DDPMUNet.cifar10, _SUBVP),
    "subvp/cifar10_ddpmpp_continuous": (DDPMpp.cifar10, _SUBVP),
    "subvp/cifar10_ddpmpp_deep_continuous": (partial(DDPMpp.cifar10, deep=True), _SUBVP),
    "subvp/cifar10_ncsnpp_continuous": (NCSNpp.cifar10_vp, _SUBVP),
    "subvp/cifar10_ncsnpp_deep_continuous": (partial(NCSNpp.cifar10_vp, deep=True), _SUBVP),
}
