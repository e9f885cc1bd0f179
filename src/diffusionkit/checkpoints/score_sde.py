"""Checkpoints of score_sde, the code of Song et al., 2021, in PyTorch.

A file is read (`_score_sde_file`), its network built from a configuration or from the weights
(`_score_sde_config`, `_score_sde_infer`), the weights renamed (`_score_sde_keys`) and transferred
(`_transfer`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from .._files import CheckpointError
from .._weights import laid_out
from ..models.network import NetworkModel
from ..networks import NCSNpp
from ._score_sde_config import configured
from ._score_sde_file import FOURIER, read_score_sde
from ._score_sde_infer import infer_network
from ._score_sde_keys import score_sde_sources
from ._transfer import transfer


def load_score_sde(
    path: str | os.PathLike[str], network: Any = None, *, ema: bool = True
) -> NetworkModel:
    """Load a checkpoint of score_sde as a score model that is ready to sample.

    The file is read without running its code, and strictly: missing, extra or misshapen tensors
    raise an error that lists them.

    A file holds only weights. Choices that they do not determine - sub-VP or VP, discrete steps or
    continuous time, the FIR filter if it has no convolution, the division by sigma - are taken from
    the configuration. Without a configuration those of most published networks of the same kind are
    assumed, and a warning lists them.

    Args:
        path: the file.
        network: the configuration: the name of a published one, such as
            "ve/cifar10_ncsnpp_continuous"; the configuration object or dictionary that the
            network was trained with; or the network itself, into which the weights are then
            loaded. None to infer it from the file.
        ema: whether to load the averaged weights rather than the last ones.

    Returns:
        The score model in evaluation mode, with its process, noise label and data range.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, malicious or of another kind, or does not fit the
            network.
        TypeError: if an entry of the configuration has another type.
        ValueError: if the configuration is incomplete, unknown or out of range.

    Source: Song et al., Score-Based Generative Modeling through Stochastic Differential
    Equations, 2021, arXiv 2011.13456.
    """
    tensors, sigmas = read_score_sde(path, ema=ema)
    if network is None:
        network = laid_out(path, partial(infer_network, path, tensors, sigmas), tensors)
    make, setting = configured(network, sigmas)
    _check_levels(path, setting.sigmas, sigmas)
    network = laid_out(path, make, tensors)
    first = 0
    if isinstance(network, NCSNpp) and network.embedding is None:
        # Files of unconditional networks hold the unused layers of an embedding.
        first = int(tensors.pop(FOURIER, None) is not None)
        tensors = {key: value for key, value in tensors.items() if ".Dense_0." not in key}
    transfer(path, network, score_sde_sources(network, first), tensors)
    return setting.model(network).eval()


def _check_levels(
    path: str | os.PathLike[str], wanted: Sequence[float] | None, sigmas: Sequence[float]
) -> None:
    """Raise unless a file has the noise levels of the setting, or its largest and smallest."""
    if wanted is None:
        return
    got = sigmas if len(wanted) > 2 else (sigmas[0], sigmas[-1])
    if len(wanted) != len(got) or not all(map(partial(math.isclose, rel_tol=1e-6), wanted, got)):
        raise CheckpointError(
            f"{path}: sigmas: expected {wanted[0]:g} ... {wanted[-1]:g}, {len(wanted)} levels, "
            f"got {got[0]:g} ... {got[-1]:g}, {len(got)} levels"
        )
