"""Checkpoints of score_sde, the code of Song et al., 2021, in PyTorch."""

import itertools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._files import CheckpointError, read_torch
from ..models.network import NetworkModel
from ..networks import NCSNpp, NCSNv2
from ..sde import VPSDE
from ._ncsnv2_keys import ncsnv2_keys
from ._score_sde_config import configured, infer_ncsnv2
from ._score_sde_infer import FIR, infer_options
from ._score_sde_keys import score_sde_sources
from ._score_sde_settings import Setting, smld, ve
from ._transfer import Source, transfer

_EXPECTED = "a checkpoint of score_sde, {optimizer, model, ema, step}"
_LOG = logging.getLogger(__name__)
_FOURIER = "all_modules.0.W"


def load_score_sde(
    path: str | os.PathLike[str], network: Any = None, *, ema: bool = True
) -> NetworkModel:
    """Load a checkpoint of score_sde as a score model that is ready to sample.

    The file is read without running code in it, and strictly: missing, extra or misshapen
    tensors are an error that lists them.

    A file holds weights alone. What leaves no trace in them - sub-VP or VP, numbered steps or
    all times, the FIR filter where it has no convolution, the division by sigma - is taken from
    the configuration; without one what most published networks of its kind have is assumed, and
    a warning that says so is logged.

    Args:
        path: The file.
        network: The configuration: the name of a published one, such as
            "ve/cifar10_ncsnpp_continuous"; the configuration object or dictionary that the
            network was trained with; or the network itself, into which the weights are then
            loaded. None to infer it from the file.
        ema: Whether to take the averaged weights rather than the last ones.

    Returns:
        The score model in evaluation mode, with its process, its label and its data range.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, foreign or hostile, or does not fit the network.
        ValueError: If the configuration is incomplete or unknown.

    Source:
        Y. Song et al., Score-Based Generative Modeling through Stochastic Differential
        Equations, 2021, https://arxiv.org/abs/2011.13456.
    """
    tensors = _read(path, ema)
    sigmas = _levels(path, tensors.pop("sigmas", None))
    if isinstance(network, nn.Module):
        setting = _guess(network, sigmas)
    elif network is None:
        try:
            network = _infer(path, tensors, sigmas)
        except CheckpointError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: expected {_EXPECTED}, got {error}") from error
        setting = _guess(network, sigmas)
    else:
        make, setting = configured(network)
        network = make()
    _check_levels(path, setting.sigmas, sigmas)
    sources = _sources(network, tensors)
    transfer(path, network, sources, tensors)
    return setting.model(network, network.config["data_range"]).eval()


def _read(path: str | os.PathLike[str], ema: bool) -> dict[str, Tensor]:
    data = read_torch(path, expected=_EXPECTED)
    wanted = ("model", "ema") if ema else ("model",)
    if not isinstance(data, Mapping) or any(key not in data for key in wanted):
        keys = list(data) if isinstance(data, Mapping) else type(data).__name__
        raise CheckpointError(f"{path}: expected {_EXPECTED}, got {keys!s:.200}")
    model = data["model"]
    tensors_only = isinstance(model, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in model.items()
    )
    if not tensors_only or not model:
        raise CheckpointError(f"{path}: expected tensors by name under 'model', got something else")
    tensors = {key.removeprefix("module."): value for key, value in model.items()}
    if len(tensors) < len(model):
        raise CheckpointError(f"{path}: expected names with or without 'module.', got one as both")
    return _averaged(path, data["ema"], tensors) if ema else tensors


def _averaged(
    path: str | os.PathLike[str], ema: Any, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Put the averages, a list in the order of the trained parameters, under their names."""
    shadows = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadows, list) or not all(isinstance(s, Tensor) for s in shadows):
        raise CheckpointError(
            f"{path}: expected a list of tensors under 'ema', 'shadow_params', got something else"
        )
    names = [name for name in tensors if name not in ("sigmas", _FOURIER)]
    if len(shadows) != len(names):
        raise CheckpointError(
            f"{path}: expected {len(names)} averaged tensors, one for each trained one, "
            f"got {len(shadows)}"
        )
    for name, shadow in zip(names, shadows, strict=True):
        if shadow.shape != tensors[name].shape:
            raise CheckpointError(
                f"{path}: expected an average of {name} of shape {tuple(tensors[name].shape)}, "
                f"got {tuple(shadow.shape)}"
            )
    return tensors | dict(zip(names, shadows, strict=True))


def _levels(path: str | os.PathLike[str], sigmas: Tensor | None) -> list[float]:
    # To 12 digits: the file has them by way of logarithms.
    given = [] if sigmas is None or sigmas.is_complex() else sigmas.flatten().tolist()
    levels = [float(f"{sigma:.12g}") for sigma in given]
    if len(levels) < 2 or not all(a > b for a, b in itertools.pairwise((math.inf, *levels, 0.0))):
        raise CheckpointError(
            f"{path}: expected sigmas, decreasing noise levels, got {len(levels)}: {levels[:6]}"
        )
    return levels


def _check_levels(
    path: str | os.PathLike[str], wanted: Sequence[float] | None, sigmas: Sequence[float]
) -> None:
    """Refuse a file of other noise levels than the setting's, numbered or only bounded."""
    if wanted is None:
        return
    got = sigmas if len(wanted) > 2 else (sigmas[0], sigmas[-1])
    if len(wanted) != len(got) or not all(map(partial(math.isclose, rel_tol=1e-6), wanted, got)):
        raise CheckpointError(
            f"{path}: sigmas: expected {wanted[0]:g} ... {wanted[-1]:g}, {len(wanted)} levels, "
            f"got {got[0]:g} ... {got[-1]:g}, {len(got)} levels"
        )


def _infer(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], sigmas: list[float]
) -> nn.Module:
    if "begin_conv.weight" in tensors:
        return infer_ncsnv2(path, tensors, sigmas)
    options = infer_options(path, tensors)
    fourier, ddpm = options["embedding"] == "fourier", options["resblock"] == "ddpm"
    # What the published networks of this kind have, where the file leaves it open.
    assumed: dict[str, Any] = {
        "fir_kernel": FIR if fourier or options["progressive_input"] == "input_skip" else None,
        "skip_rescale": not ddpm,
        "group_channels": 1 if ddpm and not fourier else 4,
        "scale_by_sigma": fourier,
        "data_range": (0.0, 1.0) if fourier else (-1.0, 1.0),
    }
    _LOG.warning(
        "%s: the file does not say for which process its network was trained; assumed %s at all "
        "times and %s. To be sure pass the configuration, by name if it is a published one, such "
        "as 've/cifar10_ncsnpp_continuous'",
        path,
        "VE" if fourier else "VP",
        {key: value for key, value in assumed.items() if key not in options},
    )
    return NCSNpp(**assumed | options)


def _guess(network: nn.Module, sigmas: list[float]) -> Setting:
    if not isinstance(network, NCSNpp | NCSNv2):
        raise TypeError(
            "network: expected an NCSNpp, DDPMpp, DDPMUNet or NCSNv2, a configuration or its "
            f"name, got {type(network).__name__}"
        )
    config = network.config
    if config.get("sigmas") is not None:
        return smld(list(config["sigmas"]))
    if config["scale_by_sigma"] or config["embedding"] == "fourier":
        return ve(sigmas[-1], sigmas[0])
    return Setting(VPSDE())


def _sources(network: NCSNpp | NCSNv2, tensors: dict[str, Tensor]) -> dict[str, Source]:
    if isinstance(network, NCSNv2):
        return {ours: Source((theirs,)) for ours, theirs in ncsnv2_keys(network).items()}
    if network.embedding is not None:
        return score_sde_sources(network)
    # A network that is not told the time has all that it would need for it, and never uses it.
    first = int(tensors.pop(_FOURIER, None) is not None)
    for key in [key for key in tensors if ".Dense_0." in key]:
        del tensors[key]
    return score_sde_sources(network, first)
