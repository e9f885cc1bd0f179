"""Networks of diffusers, with their schedulers, as score models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_callable, check_choice
from .._files import CheckpointError, listed
from ..models import StepLabel
from ..models.network import NetworkModel
from .flow_match import flow_match_model, is_flow_match
from .schedulers import (
    PREDICTIONS,
    Scheduler,
    chain_from_scheduler,
    read_json,
    scheduler_settings,
)

_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned": "fixed_small",
    "learned_range": "learned_range",
}
# A DiT has the second name of its kind in older folders.
_NETWORKS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "Transformer2DModel",
)
_FOLDERS = ("unet", "transformer")
_IMAGES = (-1.0, 1.0)


def from_diffusers(
    unet: Callable[..., Any],
    scheduler: Scheduler | str | os.PathLike[str],
    *,
    data_range: tuple[float, float] | None = _IMAGES,
) -> NetworkModel:
    """Return a network of diffusers as a score model on the process of its scheduler.

    With a ``FlowMatchEulerDiscreteScheduler`` it is a `VelocityModel` on a `FlowMatchingSDE`; its
    noise label is the timestep, 1000 t. With ``invert_sigmas`` the time and the velocity of the
    network are reversed. For other schedulers the process is a chain:

    The prediction type makes it an `EpsModel`, an `X0Model` or a `VModel`; its noise label is the
    timestep, `StepLabel`. A network with twice the channels has learned the variance of its steps.
    The scheduler's clipping and timesteps belong to sampling: see `sampler_from_scheduler`.

    Args:
        unet: the network, such as a `UNet2DModel` or a `DiTTransformer2DModel`, called with
            (x, timestep, **cond). Conditions keep their names: ``class_labels``,
            ``encoder_hidden_states``.
        scheduler: its scheduler, the scheduler's configuration, or a file or folder with it.
        data_range: the range of the training data, see `NetworkModel`; None for latents.

    Raises:
        ValueError: if the scheduler has no betas, the prediction type is none of the three, or
            the network embeds the noise level instead of the timestep or learned a variance that
            the scheduler does not name.
        TypeError: if an argument has the wrong type.

    Source: von Platen et al., Diffusers, 2022.

    >>> from diffusionkit.interop import from_diffusers
    >>> model = from_diffusers(lambda x, t: x, {"beta_schedule": "linear"})
    >>> type(model).__name__, model.sde, model.label
    ('EpsModel', DDPMChain(1000 steps, betas 0.0001 ... 0.02), StepLabel(steps=1000, scale=1.0))
    """
    check_callable(unet, "unet")
    settings = scheduler_settings(scheduler)
    if is_flow_match(settings):
        return flow_match_model(unet, settings, data_range)
    chain = chain_from_scheduler(scheduler)
    kind = settings.get("prediction_type", "epsilon")
    if not settings.get("predict_epsilon", True):  # of the first releases
        kind = "sample"
    check_choice("prediction_type", kind, tuple(PREDICTIONS))
    config = getattr(unet, "config", None)
    config = config if isinstance(config, Mapping) else {}
    embedding = config.get("time_embedding_type", "positional")
    if embedding == "fourier":
        raise ValueError(
            "time_embedding_type: expected 'positional' or 'learned' for a chain, got 'fourier', "
            "which embeds the noise level; use RawScoreModel(unet, VESDE(...))"
        )
    return PREDICTIONS[kind](
        _WholeTimesteps(unet) if embedding == "learned" else unet,
        chain,
        label=StepLabel(chain.steps),
        data_range=data_range,
        variance=_variance(settings, config),
    )


def _variance(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    kind = settings.get("variance_type") or "fixed_small"
    check_choice("variance_type", kind, tuple(_VARIANCES))
    channels, out = config.get("in_channels"), config.get("out_channels")
    if channels is not None and out == 2 * channels:
        if kind == "learned":
            raise ValueError(
                "variance_type: expected 'learned_range' for a network with learned variances, "
                "got 'learned', the variance itself"
            )
        return "learned_range"  # of schedulers without the setting too
    if kind == "learned_range" and out is not None:
        raise ValueError(
            f"variance_type: expected a network of {2 * (channels or 0)} output channels for "
            f"'learned_range', got {out}"
        )
    return _VARIANCES[kind]


class _WholeTimesteps(nn.Module):
    """A network that looks its timesteps up in a table."""

    def __init__(self, unet: Callable[..., Any]) -> None:
        super().__init__()
        self.unet = unet

    @override
    def forward(self, x: Tensor, timestep: Tensor, /, **cond: Any) -> Any:
        return self.unet(x, timestep.round().long(), **cond)


def load_diffusers(
    folder: str | os.PathLike[str], *, data_range: tuple[float, float] | None = _IMAGES
) -> NetworkModel:
    """Load a folder of diffusers: a U-Net or a DiT, and the configuration of its scheduler.

    The folder must contain ``unet/config.json`` or ``transformer/config.json``, the weights next
    to it and ``scheduler/scheduler_config.json``, as `DDPMPipeline.save_pretrained` and
    `DiTPipeline.save_pretrained` write them, or the three files in the folder itself, as in the
    first releases. ``model_index.json`` is not read.

    Args:
        folder: the folder, on this machine; `huggingface_hub.snapshot_download` returns one.
        data_range: the range of the training data, see `NetworkModel`; None for latents.

    Returns:
        The score model in evaluation mode, see `from_diffusers`.

    Raises:
        ImportError: if the package diffusers is not installed.
        FileNotFoundError: if a file is missing.
        CheckpointError: if a file is damaged or of another kind, or the weights do not fit.
        ValueError: see `from_diffusers`.
    """
    root = Path(os.fsdecode(folder))
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: expected a folder with unet/ or transformer/, and scheduler/; "
            "huggingface_hub.snapshot_download returns that of a repository"
        )
    settings = scheduler_settings(root)
    place = next((root / name for name in _FOLDERS if (root / name).is_dir()), root)
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"{place}: expected config.json, the configuration of a network")
    name = read_json(place / "config.json").get("_class_name")
    if name not in _NETWORKS:
        raise CheckpointError(
            f"{place}: expected the configuration of one of {', '.join(_NETWORKS)}, got {name!r}"
        )
    return from_diffusers(_read(place, name), settings, data_range=data_range).eval()


def _read(place: Path, name: str) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "reading networks of diffusers needs that package: "
            'pip install "diffusionkit-torch[diffusers]"'
        ) from error
    kind = getattr(diffusers, name)
    try:
        # Its tensors are copied after it is built; otherwise accelerate is needed.
        unet, found = kind.from_pretrained(
            place, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of many types, for damaged files
        if isinstance(error, OSError) and not list(place.glob("*.safetensors")) + list(
            place.glob("*.bin")
        ):
            raise FileNotFoundError(f"{place}: expected the weights of a {name}") from error
        reason = " ".join(f"{error}".split())
        raise CheckpointError(
            f"{place}: expected the weights of a {name}, got {reason:.300}"
        ) from error
    problems = [f"missing {key}" for key in found["missing_keys"]]
    problems += [f"unexpected {key}" for key in found["unexpected_keys"]]
    problems += [f"misshapen {key}" for key in found["mismatched_keys"]]
    if problems:
        raise CheckpointError(f"{place}: the network does not fit, {listed(problems)}")
    module: nn.Module = unet
    return module
